"""Two rollouts held against each other: to the last bit, or to rounding."""

from collections.abc import Mapping

import numpy as np
import torch

from manako.agent.rollout import Record, Rollout
from manako.policies.interface import Rows


def same_rows(one: Rows, other: Rows, name: str = "rows") -> None:
    """Asserts that two sets of rows hold the same columns, padded the same."""
    assert one.columns.keys() == other.columns.keys() and one.fillers == other.fillers, name
    assert (one.shared is None) == (other.shared is None), name
    shared = () if one.shared is None or other.shared is None else one.shared.pool
    assert not shared or one.shared.pool.keys() == other.shared.pool.keys(), name
    for column in (*one.columns, *shared):
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


def breaks_of_drift(rollouts):
    """Holds that Drift's column goes one place a step in all that was seen; returns where an episode began anew.

    Returns:
        (t, slot) of the first steps of episodes that came before the one before had ended; t over all rollouts.
    """
    slots = rollouts[0].rewards.shape[1]
    places = np.concatenate([r.record.images[:, 0, :, 0].argmax(1).reshape(-1, slots) for r in rollouts])  # (T, N)
    steps, ended, seeds, rewards = (
        np.concatenate([np.asarray(part) for part in column])
        for column in zip(*((r.record.steps, r.truncated, r.record.seeds, r.rewards) for r in rollouts), strict=True)
    )
    anew = []
    for t, slot in np.ndindex(places.shape):
        if t == 0 or ended[t - 1, slot]:
            assert steps[t, slot] == 0 and places[t, slot] == 30
        elif steps[t, slot] == 0:  # given up: the same seed again, from its beginning
            assert places[t, slot] == 30 and seeds[t, slot] == seeds[t - 1, slot] and t % len(rollouts[0].rewards) == 0
            anew.append((t, slot))
        else:
            assert steps[t, slot] == steps[t - 1, slot] + 1 and seeds[t, slot] == seeds[t - 1, slot]
            assert abs(places[t, slot] - places[t - 1, slot]) == 1 and rewards[t - 1, slot] == places[t, slot]
    return anew
