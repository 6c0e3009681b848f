"""Random numbers as a function of (seed, purpose, ...): a resumed run and any split of slots draw the same."""

from collections.abc import Iterable

import numpy as np
from torch import Tensor

from manako.policies.interface import Draws

# What a generator is for; 0 and 1 are the seeds of training and held-out episodes, in envs/.
ACTIONS, SHUFFLES, RANDOM_ACTIONS = 11, 12, 13


def make_rng(seed: int, *key: int) -> np.random.Generator:
    """Returns the generator of that key."""
    return np.random.default_rng(np.random.SeedSequence(entropy=seed, spawn_key=key))


def action_draws(seed: int, slots: Iterable[int], iteration: int) -> Draws:
    """Returns the random numbers with which these slots sample their actions in one rollout."""
    return Draws([make_rng(seed, ACTIONS, slot, iteration) for slot in slots])


def shuffled(count: int, groups: Tensor | None, rng: np.random.Generator) -> np.ndarray:
    """Returns a random order of `count` samples, (count,) int64; those of a group one behind the other.

    Args:
        count: how many.
        groups: (count,) which group each is of; None: each is its own.
        rng: to draw from.
    """
    if groups is None:
        return rng.permutation(count)
    _, number = np.unique(groups.numpy(), return_inverse=True)
    places = rng.permutation(int(number.max()) + 1)[number]  # of each sample's group
    return np.argsort(places, kind="stable")
