"""What a policy would have been told at each step of trajectories: frames before it, actions and rewards before it.

A data set stores every frame once, in the order of its episode; the past of a step are the rows above it, as far as
its episode reaches. Where an episode had not begun there is no row, which is a black frame.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, Image

from manako.agent.data.trajectories import TAKEN
from manako.agent.errors import TrainingError
from manako.agent.png import picture, png_of
from manako.memory import turns_before

NO_ROW = -1


def past_rows(trajectories: Dataset, count: int) -> list[list[int]]:
    """Returns for each step the rows (count) of the frames before it, oldest first; `NO_ROW` before its episode.

    Raises:
        TrainingError: the rows are not whole episodes in order.
    """
    if not count:
        return [[]] * len(trajectories)
    steps = _steps_in_order(trajectories)
    return [[row - back if back <= step else NO_ROW for back in range(count, 0, -1)] for row, step in enumerate(steps)]


def past_turns(trajectories: Dataset, count: int) -> list[np.ndarray]:
    """Returns for each step the turns (count, 2) before it, as `manako.memory.Memory.turns` has them.

    Raises:
        TrainingError: the rows are not whole episodes in order.
    """
    if not count:
        return [np.zeros((0, 2))] * len(trajectories)
    done = TAKEN if TAKEN in trajectories.column_names else "action"
    actions, rewards = trajectories[done], trajectories["reward"]
    turns = []
    for row, step in enumerate(_steps_in_order(trajectories)):
        first = max(row - step, row - count)
        turns.append(turns_before(actions[first:row], rewards[first:row], row - first, count))
    return turns


def frames_of(pngs: Sequence[bytes | None], shape: tuple[int, ...]) -> np.ndarray:
    """Returns frames (len(pngs), H, W, 3) uint8 of PNG files, black where there is none.

    Args:
        pngs: of the rows of `past_rows`.
        shape: (H, W, 3).
    """
    black = np.zeros(shape, np.uint8)
    return np.stack([black if png is None else picture(png) for png in pngs])


def black_png(trajectories: Dataset) -> dict[str, Any]:
    """Returns a black frame of the size of the first one, as a data set stores it."""
    first = trajectories.cast_column("image", Image(decode=False))[0]["image"]["bytes"]
    return {"bytes": png_of(np.zeros_like(picture(first))), "path": None}


def _steps_in_order(trajectories: Dataset) -> list[int]:
    """The rows' steps, of whole episodes."""
    steps, episodes = list(trajectories["step"]), list(trajectories["episode"])
    for row, (step, episode) in enumerate(zip(steps, episodes, strict=True)):
        if step and (row == 0 or (episodes[row - 1], steps[row - 1]) != (episode, step - 1)):
            raise TrainingError(
                f"Row {row} is step {step} of episode {episode}, and the row above it is not the step before: expected "
                "whole episodes in order for --frames and --history, as experiments/collect.py writes them."
            )
    return steps
