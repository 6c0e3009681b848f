"""Whole prompts by the model's own forward: what every faster reading is compared with."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from manako.policies.interface import Rows
from manako.policies.reading.reading import Read, Reading


class WholePrompt(Reading):
    """One pass over right-padded prompts, for each longest path of the token trie followed by that path."""

    name = "whole prompts"

    def read(self, inputs: Rows) -> Read:
        """Returns hidden states and logits."""
        lengths = inputs["lengths"]  # (B,)
        rows = torch.arange(len(lengths), device=lengths.device)
        passes = [(path, self._run(inputs, path)) for path in self.codec.path_tokens or ((),)]
        logits = []
        for branch in self.codec.branches:
            outputs = next(out for path, out in passes if path[: len(branch.path)] == branch.path)
            logits.append(outputs.logits[rows, lengths - 1 + len(branch.path)][:, list(branch.children)])
        return Read(self.model.last_hidden(passes[0][1])[rows, lengths - 1], logits)

    def read_hidden(self, inputs: Rows) -> Tensor:
        """Returns the hidden states (B, D) at the prompts' last tokens."""
        lengths = inputs["lengths"]
        outputs = self._run(inputs, (self.codec.path_tokens or ((),))[0])
        return self.model.last_hidden(outputs)[torch.arange(len(lengths), device=lengths.device), lengths - 1]

    def _run(self, inputs: Rows, path: tuple[int, ...]) -> Any:
        """The model's outputs for the prompts followed by the path: logits (B, L + path, V), hidden states."""
        lengths = inputs["lengths"]
        ids = F.pad(inputs["input_ids"][:, : int(lengths.max())], (0, len(path)), value=self.pad_id)  # (B, L + path)
        rows = torch.arange(len(lengths), device=lengths.device)
        for offset, token in enumerate(path):
            ids[rows, lengths + offset] = token
        mask = torch.arange(ids.shape[1], device=ids.device) < (lengths + len(path))[:, None]  # (B, L + path)
        return self.vlm(
            input_ids=ids,
            attention_mask=mask.long(),
            output_hidden_states=True,
            use_cache=False,
            **self.pipeline.pixels(inputs["frames"]),
            **self.model.extra_inputs(ids),
        )
