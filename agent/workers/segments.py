"""Segments of the slots: what a step of one shows, how one got where it is, and its part of the state of all.

A segment is a range of neighbouring slots. A worker usually keeps one, but nothing ties the two: every call says which
segment, at which point, and carries or can be given the segment's state and the weights. So any worker can take over
any segment at any time, and plays it on exactly as the one that was lost would have.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from manako.agent.errors import TrainingError

State = dict[str, Any]  # VectorEnv.state_dict()
ROUND = "round"  # the one key of a state that is the start of a round


class Segment(NamedTuple):
    """A range of neighbouring slots."""

    first_slot: int
    num_slots: int


class Played(NamedTuple):
    """What n slots show after a step."""

    images: np.ndarray  # (n, H, W, 3) uint8, what the step returned
    instructions: tuple[str, ...]
    rewards: np.ndarray  # (n,)
    terminated: np.ndarray  # (n,) bool
    truncated: np.ndarray  # (n,) bool
    success: np.ndarray  # (n,) int8, see `Stepped`
    returns: np.ndarray  # (n,) of the episodes that the step belonged to
    lengths: np.ndarray  # (n,)
    seeds: np.ndarray  # (n,) int64
    next_images: np.ndarray  # (ended, H, W, 3), the first frames of the new episodes, in the order of their slots
    next_instructions: tuple[str, ...]  # of all slots, after the new episodes' start
    digests: tuple[str, ...]  # of all slots, after the new episodes' start
    state: State | None  # after the step, where it was asked for
    masks: np.ndarray | None = None  # (n, A) bool, which actions were allowed by what the step returned
    next_masks: np.ndarray | None = None  # (n, A) bool, likewise after the new episodes' start
    failed: np.ndarray = np.zeros(0, bool)  # (n,) see `Stepped`
    started: tuple[int, ...] = ()  # n, how many episodes each slot has started
    running: tuple[tuple[int, int], ...] = ()  # n, (seed, steps so far), after the new episodes' start
    faults: tuple[Any, ...] = ()  # `Fault`s that were survived


class History(NamedTuple):
    """How a segment got where it is: a state, or None for the start, and the actions since."""

    state: State | None
    actions: tuple[np.ndarray, ...]  # each (n,)
    digests: tuple[str, ...] | None = None  # n, of the episodes then; None where the learner has not seen them


class Observed(NamedTuple):
    """What n slots show at the end of a history without actions."""

    images: np.ndarray  # (n, H, W, 3) uint8
    instructions: tuple[str, ...]
    digests: tuple[str, ...]
    given_up: int  # slots whose episode did not replay, and that have started it anew
    state: State | None  # with their new episodes, where there are such slots
    past_frames: np.ndarray | None  # (n, frames, H, W, 3) before these, where the learner remembers some
    past_turns: np.ndarray  # (n, turns, 2)
    masks: np.ndarray | None = None  # (n, A) bool, which actions are allowed; None where the env does not say
    started: tuple[int, ...] = ()  # n, how many episodes each slot has started
    running: tuple[tuple[int, int], ...] = ()  # n, (seed, steps so far) of the episodes


class Advice(NamedTuple):
    """What the env's expert would do in n slots."""

    actions: np.ndarray  # (n, ...)
    thoughts: tuple[str, ...] | None  # n; None where the environment does not say


class Differs(NamedTuple):
    """The answer of a worker that replayed a segment, and came out elsewhere than the learner has been."""

    segment: Segment


class ReplayDiffersError(Exception):
    """What the learner has seen cannot be gone on with: the rollout is to be played again from its start."""


def segments_of(num_envs: int, num_workers: int) -> list[Segment]:
    """Returns N slots in equal neighbouring ranges, one a worker.

    Raises:
        TrainingError: they do not divide.
    """
    if num_workers < 1 or num_envs % num_workers:
        raise TrainingError(
            f"{num_envs} environments cannot be divided among {num_workers} workers: expected a number of workers that "
            "divides --num_envs."
        )
    size = num_envs // num_workers
    return [Segment(first, size) for first in range(0, num_envs, size)]


def split_state(state: State, segments: Sequence[Segment]) -> list[State]:
    """Returns the state of each segment, from that of all slots."""
    parts = []
    for first, size in segments:
        rows = slice(first, first + size)
        part = {**state, "first_slot": state["first_slot"] + first, "episodes": state["episodes"][rows]}
        if state["slots"] is not None:
            part |= {"slots": state["slots"][rows], "replacements": state["replacements"][rows]}
        parts.append(part)
    return parts


def merge_states(states: Sequence[State]) -> State:
    """Returns the state of all slots, from those of neighbouring segments: what one process would have saved."""
    merged = {**states[0], "episodes": [episode for state in states for episode in state["episodes"]]}
    if states[0]["slots"] is not None:
        merged |= {
            "slots": [slot for state in states for slot in state["slots"]],
            "replacements": [text for state in states for text in state["replacements"]],
            "instructions": list(dict.fromkeys(text for state in states for text in state["instructions"])),
        }
    return merged
