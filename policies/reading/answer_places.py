"""Whole prompts of which the LM head sees the answer's places alone.

    input_ids (B, L + path) ─ decoder ─ hidden (B, L + path, D) ─ logits_to_keep ─ (B, n, D) ─ LM head ─ (B, n, V)

For small models with a large vocabulary, whose head over all places costs more than their layers. The model's forward
must take `logits_to_keep` as places.
"""

import torch
from torch import Tensor

from manako.policies.interface import Rows
from manako.policies.reading.reading import Read, behind, what_the_head_sees
from manako.policies.reading.whole_prompt import WholePrompt


class AnswerPlaces(WholePrompt):
    """One pass over right-padded prompts, as `WholePrompt`, without logits of what is not read."""

    name = "whole prompts, the head at the answer"

    def read(self, inputs: Rows) -> Read:
        """Returns hidden states and logits."""
        passes = [(path, self._run_at(inputs, path)) for path in self.codec.path_tokens or ((),)]
        logits = []
        for branch in self.codec.branches:
            out = next(out for path, out in passes if path[: len(branch.path)] == branch.path)
            logits.append(out[1][:, len(branch.path), list(branch.children)])
        return Read(passes[0][1][0][:, 0], logits)

    def read_vectors(self, inputs: Rows, answers: Tensor) -> Read:
        """Returns hidden states and logits, by one pass over prompts and answers."""
        hidden, out = self._run_at(inputs, answers)
        entries = enumerate(self.codec.branches[: answers.shape[1] + 1])
        return Read(hidden[:, 0], [out[:, entry, list(branch.children)] for entry, branch in entries])

    def read_hidden(self, inputs: Rows) -> Tensor:
        """Returns the hidden states (B, D) at the token before the answer."""
        return self._run_at(inputs, (self.codec.path_tokens or ((),))[0])[0][:, 0]

    def _run_at(self, inputs: Rows, path: tuple[int, ...] | Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, 1 + path, D) and logits (B, 1 + path, V), from the token before the answer on."""
        given, count = self.processing.model_inputs(inputs, path), behind(path, inputs["lengths"]).shape[1]
        own = self._places(inputs)[:, None] + torch.arange(count + 1, device=inputs["lengths"].device)
        kept, where = torch.unique(own, return_inverse=True)  # (n,), (B, 1 + path): prompts differ in length
        with what_the_head_sees(self.vlm) as seen:
            logits = self.vlm(**given, use_cache=False, logits_to_keep=kept).logits  # (B, n, V)
        rows = torch.arange(len(own), device=own.device)[:, None]
        return seen[0][rows, where], logits[rows, where]
