"""An end to every episode: a policy that goes in circles would otherwise play one episode for ever.

Gymnasium truncates an episode of an environment that is registered with `max_episode_steps`, or wrapped in `TimeLimit`.
One that is not gets a `TimeLimit` of `DEFAULT_LIMIT` steps here. Some count their own steps (MiniGrid's `max_steps`,
Atari's `max_num_frames_per_episode`) and say so in an attribute: theirs goes first where it is larger, and where it is
smaller they end before ours. Such an episode is truncated, not terminated: what would have followed is bootstrapped.
"""

import numbers
from typing import Any

import gymnasium as gym
from gymnasium.wrappers import TimeLimit

DEFAULT_LIMIT = 1_000  # as most of Gymnasium's own environments have, or less
OWN_LIMITS = ("max_episode_steps", "_max_episode_steps", "max_steps", "_max_steps", "max_num_frames_per_episode")


def time_limit(env: gym.Env) -> TimeLimit | None:
    """Returns the outermost `TimeLimit` around an environment, None where there is none."""
    while isinstance(env, gym.Wrapper):
        if isinstance(env, TimeLimit):
            return env
        env = env.env
    return None


def limited(env: gym.Env) -> gym.Env:
    """Returns an environment whose episodes end: itself where it has a `TimeLimit`, else wrapped in one."""
    if time_limit(env) is not None:
        return env
    said = dict(env.spec.kwargs) if env.spec is not None else {}
    own = [_said(env, name, said.get(name)) for name in OWN_LIMITS]
    counts = [int(number) for number in own if isinstance(number, numbers.Integral) and not isinstance(number, bool)]
    limit = _DefaultLimit(env, max([DEFAULT_LIMIT, *counts]))
    limit.counts_itself = bool(counts)
    return limit


def _said(env: gym.Env, name: str, otherwise: Any) -> Any:
    try:
        return getattr(env.unwrapped, name, otherwise)
    except Exception:  # a property that needs a reset first
        return otherwise


class _DefaultLimit(TimeLimit):
    """A limit that nobody asked for."""

    counts_itself = False  # the environment says that it has one of its own


def is_default(env: gym.Env) -> bool:
    """Says whether nothing but this module is known to end an episode."""
    limit = time_limit(env)
    return isinstance(limit, _DefaultLimit) and not limit.counts_itself


def limit_in_words(env: gym.Env) -> tuple[int, str]:
    """Returns after how many steps an episode is truncated, and who says so."""
    limit = time_limit(env)
    assert limit is not None, "every environment is limited when it is made"
    steps = limit._max_episode_steps
    if not isinstance(limit, _DefaultLimit):
        return steps, f"truncated after {steps:,} steps"
    if limit.counts_itself:
        return steps, f"ended by the environment itself, truncated after {steps:,} steps at most"
    return steps, (
        f"truncated after {steps:,} steps, since the environment has no limit of its own; --max_episode_steps says "
        "otherwise"
    )
