"""Models that read with an encoder and answer with a decoder: the prompt goes to one, the answer's tokens to the other.

prompt and image ── encoder ──┐
start, path      ── decoder ──┴─►  hidden (B, D) behind the start -> logits of the answer's tokens
"""

import torch
from torch import Tensor

from manako.policies.interface import Rows
from manako.policies.reading.reading import behind
from manako.policies.reading.whole_prompt import WholePrompt


class EncoderDecoder(WholePrompt):
    """One pass over whole prompts; the decoder runs over the start tokens and a path of the token trie."""

    name = "whole prompts, encoder and decoder"

    def _places(self, inputs: Rows) -> Tensor:
        return torch.full_like(inputs["lengths"], len(self.model.answer_start) - 1)

    def _run_answers(self, inputs: Rows, answers: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        given = self.processing.model_inputs(inputs)
        start = torch.tensor(self.model.answer_start, device=answers.device).expand(len(answers), -1)
        decoder_ids = torch.cat([start, answers], dim=1)
        return self._forward({**given, "decoder_input_ids": decoder_ids}, decoder_ids.shape[1])

    def _run(self, inputs: Rows, path: tuple[int, ...] | Tensor) -> tuple[Tensor, Tensor]:
        given, lengths = self.processing.model_inputs(inputs), inputs["lengths"]
        start = torch.tensor(self.model.answer_start, device=lengths.device).expand(len(inputs), -1)
        decoder_ids = torch.cat([start, behind(path, lengths)], 1)
        return self._forward({**given, "decoder_input_ids": decoder_ids}, decoder_ids.shape[1])
