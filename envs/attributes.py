"""What an environment says of itself, wherever in its wrappers it says it: the outermost one is heard."""

import inspect
from typing import Any

import gymnasium as gym


def owner_of(env: gym.Env, *names: str) -> tuple[Any, str] | None:
    """Returns the outermost of an environment and its wrappers that has one of these attributes, and which; or None.

    An attribute that is None counts as missing. Of one object's attributes the first name goes first.
    """
    layer: Any = env
    while True:
        for name in names:
            if _has(layer, name):
                return layer, name
        if not isinstance(layer, gym.Wrapper):
            return None
        layer = layer.env


def _has(layer: Any, name: str) -> bool:
    """Whether it is this object's own: a wrapper may hand everything on by `__getattr__`, and has nothing then."""
    if isinstance(layer, gym.Wrapper) and inspect.getattr_static(layer, name, None) is None:
        return False
    return getattr(layer, name, None) is not None


def attribute_of(env: gym.Env, *names: str) -> Any:
    """Returns what `owner_of` finds; None where nobody has it."""
    found = owner_of(env, *names)
    return None if found is None else getattr(*found)
