"""What an environment says of itself, wherever in its wrappers it says it: the outermost one is heard."""

from typing import Any

import gymnasium as gym


def owner_of(env: gym.Env, *names: str) -> tuple[Any, str] | None:
    """Returns the outermost of an environment and its wrappers that has one of these attributes, and which; or None.

    An attribute that is None counts as missing. Of one object's attributes the first name goes first.
    """
    layer: Any = env
    while True:
        for name in names:
            if getattr(layer, name, None) is not None:
                return layer, name
        if not isinstance(layer, gym.Wrapper):
            return None
        layer = layer.env


def attribute_of(env: gym.Env, *names: str) -> Any:
    """Returns what `owner_of` finds; None where nobody has it."""
    found = owner_of(env, *names)
    return None if found is None else getattr(*found)
