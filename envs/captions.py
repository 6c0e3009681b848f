"""What a frame shows, in words, from the environment's own state: for training the alignment of eye and language.

An environment of your own offers it by a method `caption()`. Known here beside that: FrozenLake.
"""

from typing import Any

import gymnasium as gym

from envs.errors import EnvError


def place_name(row: int, column: int, rows: int, columns: int) -> str:
    """A cell in words: 'top left', 'middle', 'row 2, column 5' on boards larger than 3 x 3."""
    if rows > 3 or columns > 3:
        return f"row {row + 1}, column {column + 1}"
    vertical = {0: "top", rows - 1: "bottom"}.get(row, "middle")
    horizontal = {0: "left", columns - 1: "right"}.get(column, "middle")
    return vertical if vertical == horizontal else f"{vertical} {horizontal}"


def caption_of(env: gym.Env, env_id: str) -> str:
    """What the environment shows now.

    Raises:
        EnvError: nobody knows.
    """
    raw: Any = env.unwrapped
    if hasattr(raw, "caption"):
        return str(raw.caption())
    if hasattr(raw, "desc") and hasattr(raw, "s") and hasattr(raw, "ncol"):
        rows, columns = raw.desc.shape

        def cell(letter: bytes) -> list[str]:
            return [
                place_name(row, column, rows, columns)
                for row in range(rows)
                for column in range(columns)
                if raw.desc[row, column] == letter
            ]

        player = place_name(*divmod(int(raw.s), int(raw.ncol)), rows, columns)
        holes = "; ".join(cell(b"H"))
        return f"player at {player}. goal at {'; '.join(cell(b'G'))}." + (f" holes at {holes}." if holes else "")
    raise EnvError(
        f"{env_id} says nowhere what its frames show: expected a method caption() on the environment that returns a "
        "sentence about its present state"
    )
