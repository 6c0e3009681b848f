"""Faults of an environment that a run survives, and a clock for steps that do not come back.

What an environment raises may be chance (a simulator, a network): its episode is played again in a new object, from its
seed and actions, and goes on where it shows and pays the same. One that cannot be brought back is given up.
"""

import ctypes
import logging
import os
import threading
import time
import traceback
from typing import Any, NamedTuple

REPLAYS = 3  # attempts to bring an episode back
IN_A_ROW = 3  # faults of one slot without a step between them, which end the run
WARN_AFTER = 30.0  # seconds
GRACE = 5.0  # seconds for code that does not hear of an exception
log = logging.getLogger("manako.envs")


class Fault(NamedTuple):
    """An environment's fault."""

    slot: int  # counted over all workers
    seed: int  # of the episode
    step: int  # that was being taken, from 1; 0 for a reset
    given_up: bool  # whether the episode was lost, and is in no number; else it was played again and goes on
    sentence: str
    traceback: str


def fault_of(slot: int, seed: int, step: int, given_up: bool, error: BaseException) -> Fault:
    """Returns the fault that an error is, with its traceback."""
    text = "".join(traceback.format_exception(error))
    return Fault(slot, seed, step, given_up, str(error), text)


def forget_frames(error: BaseException) -> None:
    """Lets go of the frames of an error that is written down: they hold the environment that broke, and it them."""
    following: BaseException | None = error
    while following is not None:
        following.__traceback__, following = None, following.__cause__ or following.__context__


class HangError(BaseException):
    """Raised inside an environment that does not return; no Exception, which its code might catch."""


class Watchdog:
    """Looks at what a thread's environments are doing, from another thread.

    Args:
        env_id: of the environments.
        step_timeout: seconds after which an environment's step is interrupted, and its process ended where that does
            not help; None warns alone.
    """

    def __init__(self, env_id: str, step_timeout: float | None = None) -> None:
        self.env_id, self.step_timeout = env_id, step_timeout
        self.busy: tuple[float, int, int, int] | None = None  # since when, slot, seed, step
        self._owner = 0  # the thread that plays
        self._lock = threading.Lock()
        self._told: Any = None
        self._stop = threading.Event()
        limit = WARN_AFTER if step_timeout is None else min(step_timeout, WARN_AFTER)
        self._pause = min(1.0, limit / 4)
        threading.Thread(target=self._watch, name="env watchdog", daemon=True).start()

    def enter(self, slot: int, seed: int, step: int) -> None:
        """Says that an environment is called now."""
        self._owner, self.busy = threading.get_ident(), (time.monotonic(), slot, seed, step)

    def leave(self) -> None:
        """Says that it has returned; after this it is not interrupted."""
        with self._lock:
            self.busy = None

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()

    def _watch(self) -> None:
        while not self._stop.wait(self._pause):
            busy = self.busy
            if busy is None:
                continue
            took = time.monotonic() - busy[0]
            if self.step_timeout is None:
                if took > WARN_AFTER and self._told is not busy:
                    self._told = busy
                    log.warning("warning: %s", self._sentence(busy, took))
            elif took > self.step_timeout + GRACE and self._told is busy:
                os._exit(1)  # it hangs in code that hears of nothing: a new worker takes over
            elif took > self.step_timeout and self._told is not busy:
                self._interrupt(busy)

    def _interrupt(self, busy: tuple[float, int, int, int]) -> None:
        with self._lock:
            if self.busy is busy:
                self._told = busy
                thread, kind = ctypes.c_ulong(self._owner), ctypes.py_object(HangError)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, kind)

    def _sentence(self, busy: tuple[float, int, int, int], took: float) -> str:
        _, slot, seed, step = busy
        return (
            f"{self.env_id} has not returned for {took:.0f} s (slot {slot}, episode seed {seed}, step {step}): if it "
            "hangs, --rollout_backend ray-env with --step_timeout replaces it"
        )
