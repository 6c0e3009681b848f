"""What every adapter does."""

from abc import ABC, abstractmethod

import torch
from torch import nn


class Adapter(nn.Module, ABC):
    """Maps P feature vectors of width Dv to K tokens of width D.

    Its buffers count as learned: they are saved and compared with the weights that learn.
    """

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Returns visual tokens (B, K, D) of features (B, P, Dv)."""

    @property
    def is_fitted(self) -> bool:
        """Whether it has the statistics that it wants; it is, where it takes none."""
        return True

    def fit(self, features: torch.Tensor) -> bool:
        """Takes statistics of features (B, P, Dv) and returns whether it took any; by default it takes none."""
        return False
