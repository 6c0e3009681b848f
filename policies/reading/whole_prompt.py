"""Whole prompts by the model's own forward: what every faster reading is compared with."""

from typing import Any

import torch
from torch import Tensor

from manako.policies.interface import Rows
from manako.policies.reading.going_on import GoingOn, Said, SaidAll
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

    def read_vectors(self, inputs: Rows, answers: Tensor) -> Read:
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

    def go_on(self, inputs: Rows) -> GoingOn:
        """Returns the prompts; each token is a forward over all that was said before."""
        return _Again(self, inputs)

    def read_answers(self, inputs: Rows, answers: Tensor, lengths: Tensor, asked: Tensor) -> SaidAll:
        """Returns what the model says of whole answers, in one forward."""
        hidden, logits = self._run_answers(inputs, answers, lengths)
        steps = torch.arange(answers.shape[1], device=answers.device)
        places = self._places(inputs)[:, None] + steps  # (B, S): the token before each
        rows = torch.arange(len(answers), device=answers.device)[:, None]
        row, step = asked.nonzero(as_tuple=True)
        return SaidAll(hidden[rows, places], logits[row, places[row, step]])

    def _run_answers(self, inputs: Rows, answers: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, L + S, D) and logits (B, L + S, V) of the prompts, each followed by its own answer."""
        given = self.processing.with_answers(inputs, answers, lengths)
        return self._forward(given, given["input_ids"].shape[1])

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


class _Again(GoingOn):
    """Reads prompts and answers anew for each token: a model needs no cache, and none of its own has to be known."""

    def __init__(self, reading: WholePrompt, inputs: Rows) -> None:
        self.reading, self.inputs = reading, inputs
        self.answers = inputs["lengths"].new_zeros(len(inputs), 0)  # (B, said so far)
        self.now = self._read()

    def say(self, tokens: Tensor) -> Said:
        """Takes the next token of each answer."""
        self.answers = torch.cat([self.answers, tokens[:, None]], dim=1)
        self.now = self._read()
        return self.now

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows alone."""
        self.inputs, self.answers = self.inputs.select(rows), self.answers[rows]
        self.now = Said(self.now.hidden[rows], self.now.logits[rows])

    def _read(self) -> Said:
        count = self.answers.shape[1]
        lengths = torch.full_like(self.inputs["lengths"], count)
        hidden, logits = self.reading._run_answers(self.inputs, self.answers, lengths)
        rows, last = torch.arange(len(lengths), device=lengths.device), self.reading._places(self.inputs) + count
        return Said(hidden[rows, last], logits[rows, last])
