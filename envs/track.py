"""`manako/Track-v0`: say where the ball goes next, which no single frame shows.

A ball crosses a small board along its row or its column, one cell a step, and turns round at the border. Place and
direction are drawn. The action is the direction in which it goes next: right is worth +1, wrong -1; all right is a
success. The first step is not judged and pays nothing, since nobody can know it. An episode has `steps` steps, whatever
is said, and nothing that is said changes what is shown, so the board keeps no note of it.

On its way to and fro the ball passes the same cells in both directions. Whoever sees one frame at a time says the same
in both and is wrong in one: by default no episode is a success then. Two frames in a row, or a first one at the border,
say the direction.
"""

from typing import Any

import gymnasium as gym
import numpy as np

from manako.envs.captions import place_name
from manako.envs.errors import EnvError
from manako.envs.goto import MOVES
from manako.envs.observation import InstructionText
from manako.envs.tiles import FIRST_OBJECT, FLOOR, TILE, draw, paint_tiles

BALL = "red"


class Track(gym.Env[dict[str, Any], Any]):
    """A board with a ball that moves; `info["success"]` is there at every step."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}
    action_names = tuple(MOVES)
    instruction = "where does the ball go?"

    def __init__(self, size: int = 4, steps: int = 6, render_mode: str | None = None) -> None:
        """Makes the environment.

        Args:
            size: Cells a side; a cell is 8 pixels.
            steps: Of an episode, the first of which is not judged.
            render_mode: None or "rgb_array".

        Raises:
            EnvError: A parameter is out of range.
        """
        for name, value, least in (("size", size, 2), ("steps", steps, 2)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise EnvError(f"{name} is {value!r}, expected a whole number from {least} on")
        self.size, self.steps = size, steps
        self.render_mode = render_mode
        self._tiles = paint_tiles((BALL,), ("ball",))
        self._place, self._direction = (0, 0), 0  # (row, column), index of the next move
        self._step, self._all_right = 0, True
        side = size * TILE
        self.observation_space = gym.spaces.Dict(
            image=gym.spaces.Box(0, 255, (side, side, 3), np.uint8), instruction=InstructionText()
        )
        self.action_space = gym.spaces.Discrete(len(MOVES))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draws the ball's place and direction."""
        super().reset(seed=seed)
        row, column, direction = self.np_random.integers((self.size, self.size, len(MOVES))).tolist()
        self._place, self._direction = (row, column), direction
        self._step, self._all_right = 0, True
        self._turn_at_the_border()
        return self._observe(), {"success": False}

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Moves the ball, whatever was said of it."""
        self._step += 1
        reward = 0.0
        if self._step > 1:
            is_right = int(action) == self._direction
            reward = 1.0 if is_right else -1.0
            self._all_right = self._all_right and is_right
        self._place = self._next()
        self._turn_at_the_border()
        terminated = self._step == self.steps
        return self._observe(), reward, terminated, False, {"success": terminated and self._all_right}

    def render(self) -> np.ndarray:
        """Returns the frame of the observation."""
        board = np.full((self.size, self.size), FLOOR)
        board[self._place] = FIRST_OBJECT
        return draw(self._tiles, board)

    def caption(self) -> str:
        """Returns the ball's place, in words."""
        return f"{BALL} ball at {place_name(*self._place, self.size, self.size)}."

    def expert_action(self) -> int:
        """Returns the ball's direction, which it knows from the first step on."""
        return self._direction

    def _next(self) -> tuple[int, int]:
        down, right = MOVES[self.action_names[self._direction]]
        return self._place[0] + down, self._place[1] + right

    def _turn_at_the_border(self) -> None:
        if not all(0 <= number < self.size for number in self._next()):
            self._direction ^= 1  # up and down, left and right are neighbours

    def _observe(self) -> dict[str, Any]:
        return {"image": self.render(), "instruction": self.instruction}
