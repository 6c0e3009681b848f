"""Two matrices with a GELU between, as in LLaVA 1.5."""

import torch
from torch import nn

from manako.policies.adapters.base import Adapter, Text


class MLPAdapter(Adapter):
    """Two matrices with a GELU between, as in LLaVA 1.5 (arXiv:2310.03744); K = P."""

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__(vision_width, text_width)
        self.up = nn.Linear(vision_width, text_width)
        self.act = nn.GELU()
        self.down = nn.Linear(text_width, text_width)

    def forward(self, features: torch.Tensor, text: Text | None = None) -> torch.Tensor:
        """Returns visual tokens (B, P, D) of features (B, P, Dv)."""
        return self.down(self.act(self.up(features)))
