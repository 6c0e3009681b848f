"""Slide a square onto another one: both directions at once, an action of two numbers (`MultiDiscrete([3, 3])`).

Each number is 0, 1 or 2: back, stay or forward, across and down. The white square is the agent, the green one the goal;
an episode ends on it, or after `limit` steps. The fewest steps are the larger of the two distances, so moves along one
direction at a time are too slow.
"""

from typing import Any

import gymnasium as gym
import numpy as np

CELL = 8  # pixels
AGENT, GOAL = (255, 255, 255), (40, 200, 80)


class Slide(gym.Env):
    """A square on a board without walls inside.

    Args:
        size: cells along each side, at least 3.
        limit: steps of an episode; by default `size`.
        render_mode: `rgb_array`.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}
    action_names = ("across", "down")
    instruction = "slide onto the green square"

    def __init__(self, size: int = 4, limit: int | None = None, render_mode: str | None = None) -> None:
        if size < 3:
            raise ValueError(f"size is {size}: expected at least 3")
        self.size, self.limit, self.render_mode = size, limit or size, render_mode
        self.action_space = gym.spaces.MultiDiscrete([3, 3])
        self.observation_space = gym.spaces.MultiDiscrete([size] * 4)
        self.agent = self.goal = np.zeros(2, np.int64)  # across, down
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        """Puts both squares on different cells."""
        super().reset(seed=seed)
        agent, goal = self.np_random.choice(self.size**2, 2, replace=False)
        self.agent, self.goal = (np.array(divmod(int(cell), self.size)) for cell in (agent, goal))
        self.steps = 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Moves by -1, 0 or 1 each way."""
        self.steps += 1
        self.agent = np.clip(self.agent + np.asarray(action) - 1, 0, self.size - 1)
        won = bool((self.agent == self.goal).all())
        return self._observation(), float(won) - 0.05, won, self.steps >= self.limit and not won, {"success": won}

    def render(self) -> np.ndarray:
        """Draws the board, (size * 8, size * 8, 3) uint8."""
        frame = np.zeros((self.size * CELL, self.size * CELL, 3), np.uint8)
        for (across, down), color in ((self.goal, GOAL), (self.agent, AGENT)):
            frame[down * CELL : (down + 1) * CELL, across * CELL : (across + 1) * CELL] = color
        return frame

    def expert_action(self) -> np.ndarray:
        """Returns a move of a shortest way."""
        return np.sign(self.goal - self.agent) + 1

    def _observation(self) -> np.ndarray:
        return np.concatenate([self.agent, self.goal])
