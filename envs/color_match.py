"""`manako/ColorMatch-v0`: name the colour of a square. One step by default, and no way to do it without looking.

The square lies on a random cell of a dark board. The actions are the colours' names; the right one is worth 1, any
other 0, and the episode ends. A blind policy scores 1 in K, so the frames are all that lifts it above that.

With `answers` above 1 the colour is to be named so many times, and the square is shown in the first frame alone: then
the board is dark. Each right answer is worth 1; all right is a success. Whoever remembers neither the first frame nor
what was said of it scores 1 in K.
"""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from manako.envs.captions import place_name
from manako.envs.errors import EnvError
from manako.envs.observation import InstructionText
from manako.envs.tiles import COLORS, TILE, resolve_colors


class ColorMatch(gym.Env[dict[str, Any], Any]):
    """One coloured square, one answer."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}
    instruction = "name the colour of the square"

    def __init__(
        self, size: int = 3, colors: int | Sequence[str] = 4, answers: int = 1, render_mode: str | None = None
    ) -> None:
        """Makes the environment.

        Args:
            size: Cells a side; a cell is 8 pixels.
            colors: How many colours, or their names.
            answers: How many times the colour is named.
            render_mode: None or "rgb_array".

        Raises:
            EnvError: A parameter is out of range.
        """
        if isinstance(size, bool) or not isinstance(size, int) or size < 2:
            raise EnvError(f"size is {size!r}, expected a whole number of cells from 2 on")
        if isinstance(answers, bool) or not isinstance(answers, int) or answers < 1:
            raise EnvError(f"answers is {answers!r}, expected a whole number from 1 on")
        self.size, self.answers = size, answers
        self._answered, self._all_right = 0, True
        self.action_names = resolve_colors(colors)
        self.render_mode = render_mode
        self._rgb = np.array([COLORS[name] for name in self.action_names], np.uint8)  # (K, 3)
        self.color = 0
        side = size * TILE
        self._frame = np.zeros((side, side, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(
            image=gym.spaces.Box(0, 255, (side, side, 3), np.uint8), instruction=InstructionText()
        )
        self.action_space = gym.spaces.Discrete(len(self.action_names))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draws a colour and a cell."""
        super().reset(seed=seed)
        self.color, row, column = self.np_random.integers((len(self.action_names), self.size, self.size)).tolist()
        top, left = row * TILE, column * TILE
        self._answered, self._all_right = 0, True
        self._frame[:] = 0
        self._frame[top : top + TILE, left : left + TILE] = self._rgb[self.color]
        return self._observe(), {"success": False}

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Answers with a colour's number; the frame stays, unless the colour is asked for several times."""
        is_right = int(action) == self.color
        self._answered += 1
        self._all_right = self._all_right and is_right
        terminated = self._answered == self.answers
        if self.answers > 1:
            self._frame[:] = 0
        return self._observe(), float(is_right), terminated, False, {"success": terminated and self._all_right}

    def caption(self) -> str:
        """Returns colour and place of the square, in words."""
        rows, columns = np.nonzero(self._frame[::TILE, ::TILE].any(-1))
        if not len(rows):
            return "a dark board."
        where = place_name(int(rows[0]), int(columns[0]), self.size, self.size)
        return f"{self.action_names[self.color]} square at {where}."

    def expert_action(self) -> int:
        """Returns the square's colour."""
        return self.color

    def expert_thought(self) -> str:
        """Returns what lies on the board."""
        return self.caption().rstrip(".")

    def render(self) -> np.ndarray:
        """Returns the frame of the observation."""
        return self._frame.copy()

    def _observe(self) -> dict[str, Any]:
        return {"image": self._frame.copy(), "instruction": self.instruction}
