"""Random numbers as a function of (seed, purpose, ...): a resumed run and any split of slots draw the same.

Libraries draw from generators of the process instead. `chance` and `set_chance` copy these and put them back.
"""

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from manako.policies.interface import Draws

# What a generator is for; 0 and 1 are the seeds of training and held-out episodes, in envs/.
ACTIONS, SHUFFLES, RANDOM_ACTIONS = 11, 12, 13
LEAST_GROUPS = 16  # of a batch, at least, where samples of a group are learned from together


def make_rng(seed: int, *key: int) -> np.random.Generator:
    """Returns the generator of that key."""
    return np.random.default_rng(np.random.SeedSequence(entropy=seed, spawn_key=key))


def action_draws(seed: int, slots: Iterable[int], iteration: int) -> Draws:
    """Returns the random numbers with which these slots sample their actions in one rollout."""
    return Draws([make_rng(seed, ACTIONS, slot, iteration) for slot in slots])


def chance() -> tuple[Any, ...]:
    """Returns the state of the process's own generators: Python's, NumPy's and torch's."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def set_chance(state: tuple[Any, ...]) -> None:
    """Puts back what `chance` returned."""
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def chance_kept() -> Iterator[None]:
    """Lets a block draw from these generators, and gives them back as they were."""
    before = chance()
    try:
        yield
    finally:
        set_chance(before)


def shuffled(count: int, groups: Tensor | None, batch: int, rng: np.random.Generator) -> np.ndarray:
    """Returns a random order of `count` samples, (count,) int64; those of a group stand together.

    Of a group that would fill more than a `LEAST_GROUPS`th of a batch, parts of that size stand together, drawn anew
    each time: samples of few groups are too much alike to learn from.

    Args:
        count: how many.
        groups: (count,) which group each is of; None: each is its own.
        batch: how many samples are learned from at a time.
        rng: to draw from.
    """
    order = rng.permutation(count)
    if groups is None:
        return order
    _, number = np.unique(groups.numpy()[order], return_inverse=True)
    together = np.argsort(number, kind="stable")  # of each group one behind the other, in a random order
    sizes = np.bincount(number)
    rank = np.arange(count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    starts = rank % max(1, batch // LEAST_GROUPS) == 0
    part = np.cumsum(starts) - 1
    places = rng.permutation(part[-1] + 1)[part] if count else part
    return order[together[np.argsort(places, kind="stable")]]
