"""Two rollouts held against each other: to the last bit, or to rounding."""

from collections.abc import Mapping

import numpy as np
import torch

from manako.agent.rollout import Record, Rollout
from manako.policies.interface import Rows


def same_rows(one: Rows, other: Rows, name: str = "rows") -> None:
    """Asserts that two sets of rows hold the same columns, padded the same."""
    assert one.columns.keys() == other.columns.keys() and one.fillers == other.fillers, name
    for column in one.columns:
        same_tensor(one[column], other[column], f"{name}: {column}")


def same_tensor(one: torch.Tensor, other: torch.Tensor, name: str) -> None:
    """Asserts that two tensors are of the same kind and equal in every bit."""
    assert one.dtype == other.dtype and torch.equal(one, other), name


def same_bits(one: Rollout | Record, other: Rollout | Record) -> None:
    """Asserts that two rollouts, or their records, are equal in every field but the time they took."""
    assert type(one) is type(other)
    for name, mine, theirs in zip(one._fields, one, other, strict=True):
        if name == "seconds":
            continue
        if isinstance(mine, torch.Tensor):
            same_tensor(mine, theirs, name)
        elif isinstance(mine, np.ndarray):
            assert mine.dtype == theirs.dtype and np.array_equal(mine, theirs), name
        elif isinstance(mine, Rows):
            same_rows(mine, theirs, name)
        elif isinstance(mine, Record):
            same_bits(mine, theirs)
        elif isinstance(mine, Mapping):  # frames by (t, slot)
            assert mine.keys() == theirs.keys(), name
            assert all(np.array_equal(image, theirs[place]) for place, image in mine.items()), name
        else:
            assert mine == theirs, name


def close_enough(one: Rollout, other: Rollout) -> None:
    """Asserts that two rollouts hold the same frames, actions and rewards, and floats equal to rounding."""
    for name in ("logprobs", "values", "next_values"):
        assert torch.allclose(getattr(one, name), getattr(other, name), atol=1e-5), name
    for name in ("mask", "rewards", "terminated", "truncated", "bootstrap_at"):
        same_tensor(getattr(one, name), getattr(other, name), name)
    for name in ("inputs", "actions", "bootstrap"):
        same_rows(getattr(one, name), getattr(other, name), name)
    assert one.episodes == other.episodes and one.outcomes == other.outcomes
    assert (one.record is None) == (other.record is None)
    if one.record is not None:
        same_bits(one.record, other.record)
