"""Two matrices on features that are standardised by statistics of their own."""

import torch

from manako.policies.adapters.base import Text
from manako.policies.adapters.mlp import MLPAdapter


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
    def fit(self, features: torch.Tensor) -> bool:
        """Takes the statistics of features (B, P, Dv), returns True; a channel that hardly varies is not blown up."""
        spread = features.float().std((0, 1))  # (Dv,)
        self.feature_mean.copy_(features.float().mean((0, 1)))
        self.feature_std.copy_(spread.clamp_min(max(0.1 * float(spread.mean()), 1e-6)))
        return True

    def forward(self, features: torch.Tensor, text: Text | None = None) -> torch.Tensor:
        """Returns visual tokens (B, P, D) of features (B, P, Dv)."""
        return super().forward((features - self.feature_mean) / self.feature_std)
