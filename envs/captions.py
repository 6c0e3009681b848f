"""What a frame shows, in words, from the environment's own state: to align a vision encoder with a language model.

An environment of your own offers it by a method `caption()`. Known here beside that: FrozenLake.
"""

from typing import Any

import gymnasium as gym
import numpy as np

from manako.envs.attributes import attribute_of
from manako.envs.errors import EnvError

LAKE = {b"S": "ice", b"F": "ice", b"H": "hole", b"G": "goal"}


def place_name(row: int, column: int, rows: int, columns: int) -> str:
    """Returns a cell in words: 'top left', 'middle', 'row 2, column 5' on boards larger than 3 x 3."""
    if rows > 3 or columns > 3:
        return f"row {row + 1}, column {column + 1}"
    vertical = {0: "top", rows - 1: "bottom"}.get(row, "middle")
    horizontal = {0: "left", columns - 1: "right"}.get(column, "middle")
    return vertical if vertical == horizontal else f"{vertical} {horizontal}"


def caption_of(env: gym.Env, env_id: str) -> str:
    """Returns what the environment shows now, in words.

    Raises:
        EnvError: nobody knows.
    """
    raw: Any = env.unwrapped
    caption = attribute_of(env, "caption")
    if caption is not None:
        return str(caption())
    if hasattr(raw, "desc") and hasattr(raw, "s") and hasattr(raw, "ncol"):
        return _frozen_lake(raw.desc, *divmod(int(raw.s), int(raw.ncol)))
    raise EnvError(
        f"{env_id} says nowhere what its frames show: expected a method caption() on the environment that returns a "
        "sentence about its present state"
    )


def _frozen_lake(board: np.ndarray, row: int, column: int) -> str:
    """Where the player is and what lies around, then the goals.

    The rest of the board is left out: where it is the same in every frame, a caption would teach to say it unseen.

    Args:
        board: (rows, columns) of b"S", b"F", b"H" and b"G".
        row: the player's.
        column: the player's.
    """
    rows, columns = board.shape
    around = []
    for side, (down, right) in {"left": (0, -1), "below": (1, 0), "right": (0, 1), "above": (-1, 0)}.items():
        inside = 0 <= row + down < rows and 0 <= column + right < columns
        what = LAKE[bytes(board[row + down, column + right])] if inside else "edge"
        around.append(f"{what} {side}")
    goals = [place_name(down, right, rows, columns) for down, right in np.argwhere(board == b"G").tolist()]
    return f"player at {place_name(row, column, rows, columns)}: {', '.join(around)}. goal at {'; '.join(goals)}."
