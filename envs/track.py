"""`manako/Track-v0`: say where the ball goes next, which no single frame shows.

A coloured ball crosses a small board in a straight line, one cell a step, and leaves it on one side to come back on the
other. Its direction is drawn with its place. The action is the direction in which it goes next: right is worth +1,
wrong -1; all right is a success. The first step is not judged and pays nothing, since nobody can know it. An episode
has `steps` steps, whatever is said.

Every place is as likely in every direction, so a frame alone says nothing of the answer: whoever sees one frame at a
time has the direction right in a quarter of the episodes, whatever it says. Two frames in a row say it. Nothing that is
done changes what is shown, so the board keeps no note of it.
"""

from typing import Any

import gymnasium as gym
import numpy as np

from manako.envs.captions import place_name
from manako.envs.errors import EnvError
from manako.envs.goto import MOVES
from manako.envs.observation import InstructionText
from manako.envs.tiles import FIRST_OBJECT, FLOOR, TILE, draw, paint_tiles, resolve_colors


class Track(gym.Env[dict[str, Any], Any]):
    """A board with a ball that moves; `info["success"]` is there at every step."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}
    action_names = tuple(MOVES)
    instruction = "where does the ball go?"

    def __init__(self, size: int = 3, steps: int = 4, colors: int = 4, render_mode: str | None = None) -> None:
        """Makes the environment.

        Args:
            size: Cells a side; a cell is 8 pixels.
            steps: Of an episode, the first of which is not judged.
            colors: How many colours the ball may have.
            render_mode: None or "rgb_array".

        Raises:
            EnvError: A parameter is out of range.
        """
        # on 2 cells a side, left and right lead to the same one
        for name, value, least in (("size", size, 3), ("steps", steps, 2)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise EnvError(f"{name} is {value!r}, expected a whole number from {least} on")
        self.size, self.steps = size, steps
        self.render_mode = render_mode
        self._colors = resolve_colors(colors)
        self._tiles = paint_tiles(self._colors, ("ball",))
        self._ball, self._place, self._direction = FIRST_OBJECT, (0, 0), 0
        self._step, self._all_right = 0, True
        side = size * TILE
        self.observation_space = gym.spaces.Dict(
            image=gym.spaces.Box(0, 255, (side, side, 3), np.uint8), instruction=InstructionText()
        )
        self.action_space = gym.spaces.Discrete(len(MOVES))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draws the ball, its place and its direction."""
        super().reset(seed=seed)
        row, column, color, direction = self.np_random.integers(
            (self.size, self.size, len(self._colors), len(MOVES))
        ).tolist()
        self._ball, self._place, self._direction = FIRST_OBJECT + color, (row, column), direction
        self._step, self._all_right = 0, True
        return self._observe(), {"success": False}

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Moves the ball, whatever was said of it."""
        self._step += 1
        down, right = MOVES[self.action_names[self._direction]]
        row, column = self._place
        self._place = (row + down) % self.size, (column + right) % self.size
        reward = 0.0
        if self._step > 1:
            is_right = int(action) == self._direction
            reward = 1.0 if is_right else -1.0
            self._all_right = self._all_right and is_right
        terminated = self._step == self.steps
        return self._observe(), reward, terminated, False, {"success": terminated and self._all_right}

    def render(self) -> np.ndarray:
        """Returns the frame of the observation."""
        board = np.full((self.size, self.size), FLOOR)
        board[self._place] = self._ball
        return draw(self._tiles, board)

    def caption(self) -> str:
        """Returns the ball's place, in words."""
        color = self._colors[self._ball - FIRST_OBJECT]
        return f"{color} ball at {place_name(*self._place, self.size, self.size)}."

    def expert_action(self) -> int:
        """Returns the ball's direction, which it knows from the first step on."""
        return self._direction

    def _observe(self) -> dict[str, Any]:
        return {"image": self.render(), "instruction": self.instruction}
