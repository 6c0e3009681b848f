"""Action spaces as a policy sees them: one choice of A (`Discrete`), or a vector of d numbers laid flat.

A vector is a `MultiDiscrete` (whole numbers from 0 on) or a `Box` of float32 with finite bounds. Light: no torch here.
"""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np


def is_vector(space: gym.Space) -> bool:
    """Returns whether actions are vectors (d,), and not one choice."""
    return not isinstance(space, gym.spaces.Discrete)


def action_shape(space: gym.Space) -> tuple[int, ...]:
    """Returns () for one choice, (d,) for a vector."""
    return tuple(space.shape or ()) if is_vector(space) else ()


def action_dtype(space: gym.Space) -> type[np.generic]:
    """Returns float32 for a `Box`, else int64."""
    return np.float32 if isinstance(space, gym.spaces.Box) else np.int64


def random_vectors(space: gym.Space, draw: Callable[[], np.ndarray]) -> np.ndarray:
    """Returns vectors (N, d), each entry uniform over its values.

    Args:
        space: of vectors.
        draw: gives (N,) numbers in [0, 1), an entry after the other.
    """
    uniforms = np.stack([draw() for _ in range(action_shape(space)[0])], 1)  # (N, d)
    if isinstance(space, gym.spaces.MultiDiscrete):
        return (uniforms * space.nvec).astype(np.int64)
    assert isinstance(space, gym.spaces.Box)
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    return np.clip(low + uniforms * (high - low), low, high).astype(np.float32)


def ranges(space: gym.Space) -> list[tuple[float, float]]:
    """Returns the least and the largest value of each of a vector's d entries."""
    if isinstance(space, gym.spaces.MultiDiscrete):
        return [(0, int(count) - 1) for count in space.nvec]
    assert isinstance(space, gym.spaces.Box)
    return list(zip(space.low.tolist(), space.high.tolist(), strict=True))


def shares(space: gym.Space, vectors: np.ndarray) -> np.ndarray:
    """Returns how far vectors (B, d) are from the least to the largest value of each entry, in [0, 1]; 0 if equal."""
    low, high = np.array(ranges(space), np.float64).T
    return (vectors - low) / np.where(high > low, high - low, 1)


def short_number(value: float) -> str:
    """Returns a number in a few characters."""
    return f"{value:.4g}"


def vector_in_words(action: Sequence[float] | np.ndarray) -> str:
    """Returns a vector's numbers."""
    return "[" + ", ".join(short_number(value) for value in np.ravel(action).tolist()) + "]"


def actions_in_words(space: gym.Space, names: Sequence[str]) -> str:
    """Returns the names of A actions, or what each entry of a vector is."""
    if not is_vector(space):
        return ", ".join(names)
    kind = "whole numbers" if isinstance(space, gym.spaces.MultiDiscrete) else "numbers"
    spans = zip(names, ranges(space), strict=True)
    entries = ", ".join(f"{name} from {short_number(low)} to {short_number(high)}" for name, (low, high) in spans)
    return f"{len(names)} {kind}: {entries}"


def space_to_json(space: gym.Space) -> dict[str, Any]:
    """Returns a space as JSON."""
    if isinstance(space, gym.spaces.MultiDiscrete):
        return {"kind": "MultiDiscrete", "nvec": space.nvec.tolist()}
    if isinstance(space, gym.spaces.Box):
        return {"kind": "Box", "low": space.low.tolist(), "high": space.high.tolist()}
    assert isinstance(space, gym.spaces.Discrete)
    return {"kind": "Discrete", "n": int(space.n)}


def space_from_json(description: dict[str, Any]) -> gym.Space:
    """Returns the space of `space_to_json`.

    Raises:
        ValueError: it is none.
    """
    kind = description.get("kind")
    if kind == "MultiDiscrete":
        return gym.spaces.MultiDiscrete(description["nvec"])
    if kind == "Box":
        return gym.spaces.Box(np.float32(description["low"]), np.float32(description["high"]), dtype=np.float32)
    if kind == "Discrete":
        return gym.spaces.Discrete(description["n"])
    raise ValueError(f"action_space is of kind {kind!r}")
