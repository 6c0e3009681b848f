"""One matrix, as in LLaVA 1.0."""

import torch
from torch import nn

from manako.policies.adapters.base import Adapter, Text


class LinearAdapter(Adapter):
    """One matrix, as in LLaVA 1.0 (arXiv:2304.08485); K = P."""

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__(vision_width, text_width)
        self.proj = nn.Linear(vision_width, text_width)

    def forward(self, features: torch.Tensor, text: Text | None = None) -> torch.Tensor:
        """Returns visual tokens (B, P, D) of features (B, P, Dv)."""
        return self.proj(features)
