"""`manako/Relay-v0`: follow the arrows from colour to colour. One step, and easier for those who think before they act.

    red->blue   blue->green   green->blue   ...       a tile each, in random places: left half -> right half
    start: red, 3 moves                               ■ in the first cell

The action is the colour that one stands on after `moves` arrows. Each arrow is one look at the picture; all of them at
once, in one forward, is what a small model cannot do. The expert's thought names the colours on the way.
"""

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from manako.envs.errors import EnvError
from manako.envs.observation import InstructionText
from manako.envs.tiles import COLORS, TILE, resolve_colors

COLUMNS = 3  # cells in a row of the board


class Relay(gym.Env[dict[str, Any], Any]):
    """A start, an arrow from each colour to another one, and the question where they lead."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, moves: int = 3, colors: int | Sequence[str] = 5, render_mode: str | None = None) -> None:
        """Makes the environment.

        Args:
            moves: How many arrows to follow.
            colors: How many colours, or their names.
            render_mode: None or "rgb_array".

        Raises:
            EnvError: A parameter is out of range.
        """
        if isinstance(moves, bool) or not isinstance(moves, int) or moves < 1:
            raise EnvError(f"moves is {moves!r}, expected a whole number from 1 on")
        self.moves, self.render_mode = moves, render_mode
        self.action_names = resolve_colors(colors)
        self.instruction = f"follow {moves} arrows from the first square"
        self._rgb = np.array([COLORS[name] for name in self.action_names], np.uint8)  # (K, 3)
        cells = len(self.action_names) + 1
        side = max(2, -(-cells // COLUMNS)) * TILE, COLUMNS * TILE
        self._frame = np.zeros((*side, 3), np.uint8)
        self.way: list[int] = []
        self.observation_space = gym.spaces.Dict(
            image=gym.spaces.Box(0, 255, (*side, 3), np.uint8), instruction=InstructionText()
        )
        self.action_space = gym.spaces.Discrete(len(self.action_names))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draws where the arrows lead, where they lie, and where to start."""
        super().reset(seed=seed)
        count = len(self.action_names)
        leads = (np.arange(count) + self.np_random.integers(1, count, count)) % count  # (K,) never to itself
        color = int(self.np_random.integers(count))
        self._frame[:] = 0
        self._paint(0, color, color)
        for cell, start in enumerate(self.np_random.permutation(count).tolist(), start=1):
            self._paint(cell, start, int(leads[start]))
        self.way = []
        for _ in range(self.moves):
            color = int(leads[color])
            self.way.append(color)
        return self._observe(), {"success": False}

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Answers with a colour's number; the frame stays."""
        success = int(action) == self.way[-1]
        return self._observe(), float(success), True, False, {"success": success}

    def expert_action(self) -> int:
        """Returns the colour at the end."""
        return self.way[-1]

    def expert_thought(self) -> str:
        """Returns the colours on the way, the last one too."""
        return " ".join(self.action_names[color] for color in self.way)

    def caption(self) -> str:
        """Returns the start and the arrows in the order of the board, in words."""
        halves = self._frame[TILE // 2 :: TILE, TILE // 4 :: TILE // 2].reshape(-1, 2, 3)  # (cells, 2, 3)
        named = {tuple(rgb): name for rgb, name in zip(self._rgb.tolist(), self.action_names, strict=True)}
        pairs = [[named[tuple(half)] for half in cell] for cell in halves.tolist() if any(map(any, cell))]
        return f"start {pairs[0][0]}, " + ", ".join(f"{start} to {end}" for start, end in pairs[1:]) + "."

    def render(self) -> np.ndarray:
        """Returns the frame of the observation."""
        return self._frame.copy()

    def _paint(self, cell: int, left: int, right: int) -> None:
        row, column = divmod(cell, COLUMNS)
        tile = self._frame[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
        tile[:, : TILE // 2], tile[:, TILE // 2 :] = self._rgb[left], self._rgb[right]

    def _observe(self) -> dict[str, Any]:
        return {"image": self._frame.copy(), "instruction": self.instruction}
