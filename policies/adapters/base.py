"""What every adapter does."""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import nn


class Text(NamedTuple):
    """What an adapter may read beside the features: the prompt's text before the image, instruction included."""

    embeddings: torch.Tensor  # (B, T, D), the language model's own of the tokens
    mask: torch.Tensor  # (B, T) bool, True where a token is


class Adapter(nn.Module, ABC):
    """Maps P feature vectors of width Dv to K tokens of width D.

    Its buffers count as learned: they are saved and compared with the weights that learn.

    Attributes:
        wants_text: whether it reads the prompt's text; an architecture that gives none refuses such an adapter.
    """

    wants_text: ClassVar[bool] = False

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, features: torch.Tensor, text: Text | None = None) -> torch.Tensor:
        """Returns visual tokens (B, K, D) of features (B, P, Dv) and, where it wants some, the prompt's text."""

    @property
    def is_fitted(self) -> bool:
        """Whether it has the statistics that it wants; it is, where it takes none."""
        return True

    def fit(self, features: torch.Tensor) -> bool:
        """Takes statistics of features (B, P, Dv) and returns whether it took any; by default it takes none."""
        return False
