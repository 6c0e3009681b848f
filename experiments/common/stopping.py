"""Ctrl-C and SIGTERM, wherever a runner is: exit code 130, nothing half-written, one line that says how to go on.

Before a runner has begun anything a signal ends it at once: while libraries are imported, an exception would be raised
in the middle of one, which may take it for a fault of its own. From `tidy_up_from_here` on it raises
`KeyboardInterrupt`, so that what was begun can be put in order; a library that swallows it is found out by `check`.
While a run trains, its own callbacks answer, at the end of a step. Standard library alone: this is imported first.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOPPED = 130

_asked = 0  # signals that came
_tidies = _waits = False
_undo: list[Callable[[], None]] = []
_hint = "nothing was begun"


def answer_signals(hint: str | None = None) -> None:
    """Lets a signal end the process at once.

    Args:
        hint: what is said then.
    """
    global _tidies, _hint
    _tidies, _hint = False, hint or _hint
    _install()


def tidy_up_from_here() -> None:
    """Lets a signal raise `KeyboardInterrupt` from here on."""
    global _tidies
    _tidies = True
    _install()
    check()


def check() -> None:
    """Raises the `KeyboardInterrupt` that somebody else's code has swallowed."""
    if _asked:
        raise KeyboardInterrupt


@contextlib.contextmanager
def at_the_next_step() -> Iterator[None]:
    """Lets a block answer a first signal by itself, by asking `asked`; a second one raises `KeyboardInterrupt`."""
    global _waits
    check()
    _waits = True
    try:
        yield
    finally:
        _waits = False


@contextlib.contextmanager
def undone(call: Callable[[], None]) -> Iterator[None]:
    """Lets a signal that ends the process at once call `call` before, as long as the block lasts."""
    _undo.append(call)
    try:
        yield
    finally:
        _undo.remove(call)


def asked() -> bool:
    """Says whether a signal came."""
    return _asked > 0


def forget() -> None:
    """Begins anew, for a second runner in one process; no signal has come then."""
    global _asked, _tidies, _waits
    _asked, _tidies, _waits = 0, False, False
    for number in SIGNALS:
        if signal.getsignal(number) is _answer:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _install() -> None:
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread may, and only it is interrupted
    for number in SIGNALS:
        signal.signal(number, _answer)


def _answer(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked += 1
    if _waits and _asked == 1:
        os.write(2, b"stopping at the end of this step; a second signal stops at once\n")
        return
    if _tidies:
        raise KeyboardInterrupt
    try:
        for call in _undo[::-1]:
            with contextlib.suppress(Exception):
                call()
        sys.stdout.flush()
        os.write(2, f"stopped: {_hint}\n".encode(errors="replace"))  # not print: it may run in the middle of one
    finally:
        os._exit(STOPPED)
