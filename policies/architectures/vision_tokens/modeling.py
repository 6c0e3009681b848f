"""The language model with a table of codes before it and a head of codes behind it; see the package for the figure."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from manako.policies.adapters import Adapter, Text
from manako.policies.architectures.composed.modeling import ManakoForConditionalGeneration, ManakoModel
from manako.policies.architectures.vision_tokens.configuration import VisionTokensConfig

CODE_STD = 1.0  # of the embeddings: words and codes alike are scaled by the language model's first norm


class CodeTable(Adapter):
    """Codes to embeddings, and states back to codes.

    Args:
        num_codes: C.
        text_width: D.
    """

    def __init__(self, num_codes: int, text_width: int) -> None:
        super().__init__(1, text_width)
        self.embedding = nn.Embedding(num_codes, text_width)
        self.head = nn.Linear(text_width, num_codes, bias=False)

    def forward(self, features: Tensor, text: Text | None = None) -> Tensor:
        """Returns embeddings (B, P, D) of codes (B, P, 1), which come as numbers of the model's precision."""
        return self.embedding(features[..., 0].long())


class VisionTokensModel(ManakoModel):
    """Frame tokenizer, table of codes and language model without its LM head."""

    config: VisionTokensConfig
    gives_text = False

    def make_adapter(self, config: Any) -> Adapter:
        """Returns the table of codes."""
        return CodeTable(config.vision_config.num_codes, config.text_config.hidden_size)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CodeTable):
            init.normal_(module.embedding.weight, std=CODE_STD)

    @torch.no_grad()
    def get_vision_features(self, pixel_values: Tensor) -> Tensor:
        """Returns the codes (B, P, 1) of pixels (B, 3, h, w)."""
        return self.vision_tower(pixel_values=pixel_values.to(self.dtype)).last_hidden_state


class VisionTokensForConditionalGeneration(ManakoForConditionalGeneration):
    """The model with the language model's head; the codes' own is in `model.adapter`."""

    config: VisionTokensConfig
    kind = VisionTokensModel
