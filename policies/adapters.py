"""Adapters: visual features (B, P, Dv) -> visual tokens (B, K, D), the translation into the language model's space.

To add one: a subclass of `Adapter` and a line in `ADAPTERS`; `--adapter NAME` then selects it.
"""

from abc import ABC, abstractmethod

import torch
from torch import nn

from manako.policies.errors import PolicyError


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


class ZScoreMLPAdapter(MLPAdapter):
    """`MLPAdapter` of standardised features: (f - mean) / standard deviation, of each of the Dv channels.

    Features hardly differ between the frames of one environment (a small random ViT's on FrozenLake by a tenth of their
    size), and a step of the optimizer moves all visual tokens along what they share instead of telling them apart. The
    statistics are those of the frames given to `fit`, are saved as buffers and never change by themselves; before `fit`
    they are 0 and 1, and it is an `MLPAdapter`.
    """

    feature_mean: torch.Tensor  # (Dv,)
    feature_std: torch.Tensor  # (Dv,)

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__(vision_width, text_width)
        self.register_buffer("feature_mean", torch.zeros(vision_width))
        self.register_buffer("feature_std", torch.ones(vision_width))

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` was called, in this process or before the weights were saved."""
        return bool((self.feature_mean != 0).any())

    @torch.no_grad()
    def fit(self, features: torch.Tensor) -> None:
        """Takes the statistics of features (B, P, Dv); a channel that hardly varies is not blown up."""
        spread = features.float().std((0, 1))  # (Dv,)
        self.feature_mean.copy_(features.float().mean((0, 1)))
        self.feature_std.copy_(spread.clamp_min(max(0.1 * float(spread.mean()), 1e-6)))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features (B, P, Dv) -> visual tokens (B, P, D)."""
        return super().forward((features - self.feature_mean) / self.feature_std)


ADAPTERS: dict[str, type[Adapter]] = {"linear": LinearAdapter, "mlp": MLPAdapter, "mlp_zscore": ZScoreMLPAdapter}


def build_adapter(name: str, vision_width: int, text_width: int) -> Adapter:
    """The adapter of that name; raises PolicyError on an unknown name."""
    if name not in ADAPTERS:
        raise PolicyError(f"Unknown adapter {name!r}: expected one of {', '.join(sorted(ADAPTERS))}.")
    return ADAPTERS[name](vision_width, text_width)
