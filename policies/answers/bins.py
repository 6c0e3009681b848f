"""`bins`: an action vector is said entry by entry, each as one token, the label of a bin.

    Box(-2, 2), 11 bins                  A = -2, B = -1.6, ... K = 2       "C" is -1.2
    MultiDiscrete([3, 2])                A, B, C and A, B                  "C A" is [2, 0]

The token of an entry is read after those of the entries before it, so the joint probability of a vector is exact: the
product of one softmax over the entry's labels each, given what was said before. The bins of a `Box` include both of its
bounds; `linear` spaces them evenly, `symlog` closer together around the middle. Labels are the letters and digits that
the tokenizer goes on with as tokens of their own.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from manako.policies.answers.choice import LABELS as LETTERS
from manako.policies.answers.closed_set import Branch
from manako.policies.architectures.composed.processing import special_vocabulary
from manako.policies.errors import PolicyError
from manako.spaces import ranges, short_number

LABELS = LETTERS + "0123456789"
STRETCH = 3.0  # of symlog: how much closer, in e-folds, the bins are in the middle than at the ends
TRIALS = 4  # vectors whose tokens are looked at as a whole


def bin_values(low: float, high: float, count: int, spacing: str) -> np.ndarray:
    """Returns what the bins of an entry stand for, (count,) float64, from the lower to the upper bound; one if equal.

    Args:
        low: the bound.
        high: the other.
        count: of bins, 2 or more.
        spacing: "linear", or "symlog": closer together around the middle.
    """
    if low == high:
        return np.array([low])
    places = np.linspace(-1, 1, count)
    if spacing == "symlog":
        places = np.sign(places) * np.expm1(STRETCH * np.abs(places)) / np.expm1(STRETCH)
    values = (low + high) / 2 + (high - low) / 2 * places
    values[0], values[-1] = low, high  # to the last bit
    return values


class BinCodec:
    """Action vectors to tokens and back.

    Args:
        tokenizer: the language model's tokenizer.
        space: of vectors (d,): `MultiDiscrete` from 0 on, or `Box` with finite bounds.
        names: of the d entries.
        bins: how many an entry of a `Box` has.
        spacing: see `bin_values`.
        go_on: an answer to the tokens by which the tokenizer goes on from the prompt with it.

    Raises:
        PolicyError: the tokenizer does not say as many labels as one token each.

    Attributes:
        labels: what stands for the bins, in their order.
        values: for each entry what its bins stand for, (bins,).
        tokens: for each entry its labels' tokens, (bins,) int64.
        branches: the entries as nodes of a token trie, along the first label of each: what is checked of a model.
        token_ids: tokens of an answer, as an example of its length.
        answers: its text.
    """

    format = "bins"
    ends = False

    def __init__(
        self,
        tokenizer: Any,
        space: gym.Space,
        names: Sequence[str],
        bins: int,
        spacing: str,
        go_on: Callable[[str], Sequence[int]],
    ) -> None:
        self.tokenizer, self.space, self.names, self.go_on = tokenizer, space, tuple(names), go_on
        if isinstance(space, gym.spaces.MultiDiscrete):
            self.values = [np.arange(int(count), dtype=np.float64) for count in space.nvec]
        else:
            self.values = [bin_values(low, high, bins, spacing) for low, high in ranges(space)]
        self.labels: tuple[str, ...] = ()
        problems = []
        for self.separator in (" ", ""):
            problem = self._tokenize(max(map(len, self.values)))
            if problem is None:
                break
            problems.append(f"with {self.separator!r} between entries {problem}")
        else:
            raise PolicyError(
                f"The tokenizer cannot say these action vectors ({'; '.join(problems)}): expected a letter or digit of "
                "a token of its own for each bin, so give fewer --bins, wrap the environment, or use another model."
            )
        path = tuple(int(tokens[0]) for tokens in self.tokens)
        children = [tuple(tokens.tolist()) for tokens in self.tokens]
        self.branches = tuple(Branch(path[:entry], of, ()) for entry, of in enumerate(children))
        self.path_tokens = (path[:-1],) if len(path) > 1 else ()
        self.token_ids, self.answers = [path], (self.text([0] * len(path)),)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def legend(self) -> str:
        """How the prompt lists the entries and their bins."""
        parts = []
        for name, values in zip(self.names, self.values, strict=True):
            end = "" if len(values) == 1 else f" to {self.labels[len(values) - 1]} = {short_number(values[-1])}"
            parts.append(f"{name} {self.labels[0]} = {short_number(values[0])}{end}")
        return ", ".join(parts)

    def text(self, bins: Sequence[int]) -> str:
        """Returns what the policy says for the bins of a vector."""
        return self.separator.join(self.labels[index] for index in bins)

    def said(self, bins: Tensor) -> Tensor:
        """Returns the tokens (B, k) int64 of the bins (B, k) of the first entries."""
        columns = [self.tokens[entry].to(bins.device)[bins[:, entry]] for entry in range(bins.shape[1])]
        return torch.stack(columns, 1) if columns else bins

    def to_env(self, bins: np.ndarray) -> np.ndarray:
        """Returns the vectors of bins (B, d), as an environment is given them."""
        if isinstance(self.space, gym.spaces.MultiDiscrete):
            return bins.astype(np.int64)
        values = [self.values[entry][bins[:, entry]] for entry in range(len(self))]
        return np.stack(values, 1).astype(np.float32)

    def from_env(self, vectors: np.ndarray) -> np.ndarray:
        """Returns the bins (B, d) int64 whose values are nearest to vectors (B, d); of two as near the lower."""
        nearest = [
            np.abs(vectors[:, entry, None].astype(np.float64) - self.values[entry]).argmin(1)
            for entry in range(len(self))
        ]
        return np.stack(nearest, 1).astype(np.int64)

    def _tokenize(self, count: int) -> str | None:
        """Fills `labels` and `tokens`; returns what is wrong with this separator, or None."""
        first = self._single("", count)  # label -> its token, behind the prompt
        later = dict(first)
        if len(self.values) > 1 and first:
            later = self._single(next(iter(first)), len(LABELS), tuple(first))
        self.labels = tuple(label for label in first if label in later)[:count]
        if len(self.labels) < count:
            return f"it has {len(self.labels)} labels, and an entry has {count} values"
        self.tokens = [
            torch.tensor([(later if entry else first)[label] for label in self.labels[: len(values)]])
            for entry, values in enumerate(self.values)
        ]
        drawn = random.Random(0)
        for _ in range(TRIALS):
            bins = [drawn.randrange(len(values)) for values in self.values]
            if tuple(self.go_on(self.text(bins))) != tuple(self.said(torch.tensor([bins]))[0].tolist()):
                return f"{self.text(bins)!r} is not said label by label"
        return None

    def _single(self, before: str, count: int, candidates: Sequence[str] = LABELS) -> dict[str, int]:
        """The first `count` labels that are a token of their own behind what was said, and these tokens."""
        special = set(special_vocabulary(self.tokenizer).values())
        start = tuple(self.go_on(before)) if before else ()
        found: dict[str, int] = {}
        for label in candidates:
            ids = tuple(self.go_on(f"{before}{self.separator}{label}" if before else label))
            single = ids[: len(start)] == start and len(ids) == len(start) + 1
            if single and ids[-1] not in special and ids[-1] not in found.values():
                found[label] = ids[-1]
            if len(found) == count:
                break
        return found
