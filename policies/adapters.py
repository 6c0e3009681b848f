"""Adapters: visual features (B, P, Dv) -> visual tokens (B, K, D), the translation into the language model's space.

To add one: a subclass of `Adapter` and a line in `ADAPTERS`; `--adapter NAME` then selects it.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn

from .errors import PolicyError


class Adapter(nn.Module, ABC):
    """Maps P feature vectors of width Dv to K tokens of width D."""

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, P, Dv) -> visual tokens (B, K, D)."""


class LinearAdapter(Adapter):
    """One matrix, as in LLaVA 1.0 (arXiv:2304.08485); K = P."""

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__(vision_width, text_width)
        self.proj = nn.Linear(vision_width, text_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, P, Dv) -> visual tokens (B, P, D)."""
        return self.proj(features)


class MLPAdapter(Adapter):
    """Two matrices with a GELU between, as in LLaVA 1.5 (arXiv:2310.03744); K = P."""

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__(vision_width, text_width)
        self.up = nn.Linear(vision_width, text_width)
        self.act = nn.GELU()
        self.down = nn.Linear(text_width, text_width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, P, Dv) -> visual tokens (B, P, D)."""
        return self.down(self.act(self.up(features)))


ADAPTERS: dict[str, type[Adapter]] = {"linear": LinearAdapter, "mlp": MLPAdapter}


def build_adapter(name: str, vision_width: int, text_width: int) -> Adapter:
    """The adapter of that name; raises PolicyError on an unknown name."""
    if name not in ADAPTERS:
        raise PolicyError(f"Unknown adapter {name!r}: expected one of {', '.join(sorted(ADAPTERS))}.")
    return ADAPTERS[name](vision_width, text_width)
