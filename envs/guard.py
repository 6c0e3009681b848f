"""What an environment's own code may raise and return: every value outside the contract becomes a sentence.

An environment may raise anything: `sys.exit()` in it is no success of ours, and a KeyboardInterrupt of its own no
Ctrl-C of the user's. What a signal raises while an environment runs is the user's, and passes.

Observations are held to their space as far as it is cheap: shape, kind and bounds of arrays, texts, choices. Not held:
the width of numbers (float64 for float32), and the bounds of large arrays, but for the first steps and every 64th.
"""

import dis
import functools
import numbers
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import gymnasium as gym
import numpy as np

LARGE = 1_024  # numbers of an array whose bounds are not looked at in every step
OFTEN, RARELY = 8, 64  # first checks of large bounds, and every how-manieth later
STEP = "(observation, reward, terminated, truncated, info)"
Check = Callable[[Any], str | None]


def pass_ours(error: BaseException) -> None:
    """Raises `error` again where it is not of the code that was called: a signal came, or an interpreter ends."""
    if isinstance(error, Exception):
        return
    traceback: TracebackType | None = error.__traceback__
    handlers = {getattr(signal.getsignal(number), "__code__", None) for number in signal.valid_signals()} - {None}
    last = traceback
    while traceback is not None:
        if traceback.tb_frame.f_code in handlers:
            raise error
        last, traceback = traceback, traceback.tb_next
    if isinstance(error, KeyboardInterrupt) and (last is None or not _raises(last)):
        raise error


def _raises(traceback: TracebackType) -> bool:
    """Whether a frame stands at a `raise` of its own: what a signal raises comes at any other instruction."""
    frame: FrameType = traceback.tb_frame
    return dis.opname[frame.f_code.co_code[traceback.tb_lasti]] == "RAISE_VARARGS"


def unpacked(error: BaseException, expected: str) -> str | None:
    """Returns what to say of a tuple of the wrong length, over which one of Gymnasium's wrappers stumbles; else None.

    Args:
        error: what was raised.
        expected: what should have been returned, in words.
    """
    text = str(error) if isinstance(error, (ValueError, TypeError)) else ""
    if "values to unpack" in text or ("cannot unpack non-iterable" in text):
        return f"returned something else than {expected} ({text})"
    return None


def wrong_reward(reward: Any) -> str | None:
    """Returns what is wrong with the type of a reward; None for a number, also one in an array without a shape."""
    if isinstance(reward, (numbers.Real, np.bool_)):
        return None
    if isinstance(reward, np.ndarray) and reward.size == 1 and reward.dtype.kind in "biuf":
        return None
    return f"gave the reward {_short(reward)}, expected a number"


def wrong_flag(name: str, flag: Any) -> str | None:
    """Returns what is wrong with `terminated` or `truncated`; None for True and False."""
    if isinstance(flag, (bool, np.bool_)):
        return None
    return f"gave {_short(flag)} as {name}, expected True or False"


def wrong_info(info: Any) -> str | None:
    """Returns what is wrong with an info; None for a dict."""
    return None if isinstance(info, dict) else f"gave {_short(info)} as info, expected a dict"


def wrong_success(info: dict[str, Any]) -> str | None:
    """Returns what is wrong with what an ended episode says of its success; None where it says yes, no or nothing."""
    for key in ("is_success", "success"):
        value = info.get(key)
        if value is None or isinstance(value, (numbers.Real, np.bool_)):
            continue
        if not (isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in "biuf"):
            return f"gave {_short(value)} as info[{key!r}], expected True or False"
    return None


def _short(value: Any) -> str:
    """A value in one short line, with its type where that does not go without saying."""
    if value is None or type(value) in (int, float):
        return repr(value)
    try:
        text = " ".join(repr(value).split())
    except BaseException as error:
        pass_ours(error)
        text = "a value that cannot be shown"
    return f"{text if len(text) <= 60 else text[:57] + '...'} of type {type(value).__name__}"


def folder_now() -> str | None:
    """Returns the working directory; None where it was deleted."""
    try:
        return os.getcwd()
    except OSError:
        return None


def disturbed(folder: str | None) -> str | None:
    """Returns what an environment has changed of its process, and puts it back; None where all is as it was.

    Args:
        folder: the working directory before.
    """
    now = folder_now()
    if now != folder and folder is not None:
        os.chdir(folder)
        return f"changed the working directory to {now!r}, expected it as it was: use absolute paths instead"
    if getattr(sys.stdout, "closed", False):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (it is for the rest of the process)
        return "closed the standard output, expected it open"
    return None


def space_check(space: gym.Space) -> Check:
    """Returns a function that says what is wrong with an observation of this space; None where nothing is."""
    if isinstance(space, gym.spaces.Box):
        return _Array(space)
    if isinstance(space, gym.spaces.Dict):
        return functools.partial(_check_dict, {name: space_check(part) for name, part in space.spaces.items()})
    if isinstance(space, gym.spaces.Tuple):
        return functools.partial(_check_tuple, [space_check(part) for part in space.spaces])
    if isinstance(space, gym.spaces.MultiDiscrete):
        return functools.partial(_check_choices, space, space.start, space.start + space.nvec)
    if isinstance(space, (gym.spaces.Discrete, gym.spaces.MultiBinary)):
        return functools.partial(_check_contained, space)
    if isinstance(space, gym.spaces.Text):
        return _Text(space)
    return _anything  # graphs, sequences, spaces of others: the frame and the text are looked at anyway


class _Array:
    """An array of a Box: its shape, its kind of numbers, and that they are in their bounds, which NaN never is."""

    def __init__(self, space: gym.spaces.Box) -> None:
        self.space, self.count = space, 0
        bytes_of_all_values = space.dtype == np.uint8 and not space.low.any() and (space.high == 255).all()
        self.has_bounds = not bytes_of_all_values and space.dtype != np.bool_
        self.large = int(np.prod(space.shape)) > LARGE

    def __call__(self, value: Any) -> str | None:
        space = self.space
        if not isinstance(value, (np.ndarray, np.number, np.bool_)):
            return f"is {_short(value)}, expected an array of {space.dtype} of shape {space.shape}"
        if value.shape != space.shape:
            return f"has the shape {value.shape}, expected {space.shape}"
        if value.dtype != space.dtype and not np.can_cast(value.dtype, space.dtype, "same_kind"):
            return f"is an array of {value.dtype}, expected {space.dtype}"
        self.count += 1
        if not self.has_bounds or (self.large and self.count > OFTEN and self.count % RARELY):
            return None
        array = np.asarray(value)
        inside = (array >= space.low) & (array <= space.high)  # False for NaN
        if inside.all():
            return None
        wrong = array[~inside].flat[0]
        return f"holds {wrong}, which is not within the bounds of {_name(space)}"


def _check_dict(checks: dict[str, Check], value: Any) -> str | None:
    if not isinstance(value, dict):
        return f"is {_short(value)}, expected a dict with {', '.join(map(repr, checks))}"
    for name, check in checks.items():
        if name not in value:
            return f"lacks {name!r}"
        if wrong := check(value[name]):
            return f"of {name!r} {wrong}"
    return None


def _check_tuple(checks: list[Check], value: Any) -> str | None:
    if not isinstance(value, tuple) or len(value) != len(checks):
        return f"is {_short(value)}, expected a tuple of {len(checks)}"
    for place, (check, part) in enumerate(zip(checks, value, strict=True)):
        if wrong := check(part):
            return f"of place {place} {wrong}"
    return None


def _check_contained(space: gym.Space, value: Any) -> str | None:
    return None if space.contains(value) else f"is {_short(value)}, which is not in {_name(space)}"


def _check_choices(space: gym.spaces.MultiDiscrete, low: np.ndarray, high: np.ndarray, value: Any) -> str | None:
    """As `contains`, which takes five times as long."""
    right = isinstance(value, np.ndarray) and value.shape == low.shape and value.dtype.kind in "iu"
    if right and ((value >= low) & (value < high)).all():
        return None
    return _check_contained(space, value)


class _Text:
    """A text of a space; the same object is looked at once, since it is shown in many steps."""

    def __init__(self, space: gym.spaces.Text) -> None:
        self.space = space
        self._right: object = None

    def __call__(self, value: Any) -> str | None:
        if value is self._right and value is not None:
            return None
        wrong = _check_text(self.space, value)
        if wrong is None:
            self._right = value
        return wrong


def _check_text(space: gym.spaces.Text, value: Any) -> str | None:
    if not isinstance(value, str):
        return f"is {_short(value)}, expected a text"
    if space.contains(value):
        return None
    if not space.min_length <= len(value) <= space.max_length:
        return f"is a text of {len(value)} characters, expected {space.min_length} to {space.max_length}"
    strange = sorted({character for character in value if character not in space.character_set})
    return f"is a text with {strange[0]!r}, which is not among the space's charset" if strange else None


def _anything(value: Any) -> None:
    return None


def _name(space: gym.Space) -> str:
    text = " ".join(repr(space).split())
    return text if len(text) <= 80 else f"{type(space).__name__}{getattr(space, 'shape', '')}"
