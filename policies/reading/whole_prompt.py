"""Whole prompts by the model's own forward: what every faster reading is compared with."""

from typing import Any

import torch
from torch import Tensor

from manako.policies.interface import Rows
from manako.policies.reading.reading import Read, Reading, what_the_head_sees


class WholePrompt(Reading):
    """One pass over right-padded prompts, for each longest path of the token trie followed by that path."""

    name = "whole prompts"

    def read(self, inputs: Rows) -> Read:
        """Returns hidden states and logits."""
        rows, places = torch.arange(len(inputs), device=inputs["lengths"].device), self._places(inputs)
        passes = [(path, *self._run(inputs, path)) for path in self.codec.path_tokens or ((),)]
        logits = []
        for branch in self.codec.branches:
            out = next(out for path, _, out in passes if path[: len(branch.path)] == branch.path)  # (B, L + path, V)
            logits.append(out[rows, places + len(branch.path)][:, list(branch.children)])
        return Read(passes[0][1][rows, places], logits)

    def read_answers(self, inputs: Rows, answers: Tensor) -> Read:
        """Returns hidden states and logits, by one pass over prompts and answers."""
        rows, places = torch.arange(len(inputs), device=inputs["lengths"].device), self._places(inputs)
        hidden, out = self._run(inputs, answers)
        entries = enumerate(self.codec.branches[: answers.shape[1] + 1])
        logits = [out[rows, places + entry][:, list(branch.children)] for entry, branch in entries]
        return Read(hidden[rows, places], logits)

    def read_hidden(self, inputs: Rows) -> Tensor:
        """Returns the hidden states (B, D) at the token before the answer."""
        hidden, _ = self._run(inputs, (self.codec.path_tokens or ((),))[0])
        return hidden[torch.arange(len(inputs), device=hidden.device), self._places(inputs)]

    def _places(self, inputs: Rows) -> Tensor:
        """Where the token before the answer stands, (B,)."""
        return inputs["lengths"] - 1

    def _run(self, inputs: Rows, path: tuple[int, ...] | Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, L + path, D) and logits (B, L + path, V) of the prompts followed by the path."""
        given = self.processing.model_inputs(inputs, path)
        return self._forward(given, given["input_ids"].shape[1])

    def _forward(self, given: dict[str, Any], width: int) -> tuple[Tensor, Tensor]:
        """The last `width` places of the sequence that the LM head sees; some models put visual tokens before it."""
        with what_the_head_sees(self.vlm) as seen:
            logits = self.vlm(**given, use_cache=False).logits
        return seen[0][:, -width:], logits[:, -width:]
