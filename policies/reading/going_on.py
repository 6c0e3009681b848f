"""Going on behind prompts token by token, and reading whole answers at once: what answers in text need of a reading.

Acting is `GoingOn`: tokens are said one after another, with what was read of the prompts kept; learning is `SaidAll`:
all tokens of all answers in one forward, read where each is said.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor


class Said(NamedTuple):
    """What a model says next, of B answers."""

    hidden: Tensor  # (B, D) at the last token so far
    logits: Tensor  # (B, V) of the next one


class SaidAll(NamedTuple):
    """What a model says of B whole answers of at most S tokens."""

    hidden: Tensor  # (B, S, D) at the token before each
    logits: Tensor  # (M, V) of the M tokens that were asked for, in the order of the answers


class GoingOn(ABC):
    """B prompts behind which tokens are said.

    Attributes:
        now: what is said next.
    """

    now: Said

    @abstractmethod
    def say(self, tokens: Tensor) -> Said:
        """Takes the next token (B,) int64 of each answer, and returns what is said then."""

    @abstractmethod
    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows (B',) alone."""
