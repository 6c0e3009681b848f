"""Which actions an environment allows now: `info["action_mask"]`, as Taxi gives one, and chance among them."""

from typing import Any

import numpy as np

from manako.envs.errors import EnvError

KEY = "action_mask"  # of `info`, from reset() and step()


def read_mask(value: Any, num_actions: int) -> np.ndarray:
    """Returns a mask of an environment as a fresh array (A,) bool, True where the action is allowed.

    Args:
        value: what stands in `info`.
        num_actions: A.

    Raises:
        EnvError: it is no array (A,) of bool, or of whole numbers that are 0 or 1. The text lacks its subject: the
            caller names the environment.
    """
    expected = f"expected an array of bool or int8, of shape ({num_actions},), 1 where the action is allowed"
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "bui":
        got = f"an array of {value.dtype}" if isinstance(value, np.ndarray) else f"a {type(value).__name__}"
        raise EnvError(f"gave {got} as info['{KEY}'], {expected}")
    if value.shape != (num_actions,):
        raise EnvError(f"gave info['{KEY}'] of shape {value.shape}, {expected}")
    if value.dtype.kind != "b" and not np.isin(value, (0, 1)).all():
        raise EnvError(f"gave info['{KEY}'] with the numbers {np.unique(value).tolist()}, {expected}")
    return value.astype(bool)


def random_actions(uniforms: np.ndarray, num_actions: int, masks: np.ndarray | None) -> np.ndarray:
    """Returns actions (N,) int64, each of those that are allowed alike.

    Args:
        uniforms: (N,) in [0, 1).
        num_actions: A.
        masks: (N, A) bool with a True in each row; None allows all.
    """
    if masks is None:
        return (uniforms * num_actions).astype(np.int64)
    which = (uniforms * masks.sum(1)).astype(np.int64)  # (N,) the how-manieth of the allowed ones
    return (masks.cumsum(1) > which[:, None]).argmax(1)
