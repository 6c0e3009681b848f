"""`manako/Spell-v0`: write the initials of two coloured squares, such as "rb". The action is a text.

    action space   Text(1 to `longest` characters among r, g, b)
    reward         1 for the right word, which ends the episode; after three wrong ones it is truncated

A white mark in the corner counts the tries. Longer and shorter texts than two letters are allowed, and wrong.
"""

from typing import Any

import gymnasium as gym
import numpy as np

from manako.envs.errors import EnvError
from manako.envs.tiles import COLORS, TILE

LETTERS = {name[0]: name for name in ("red", "green", "blue")}
SIDE, TRIES = 2 * TILE, 3  # pixels of a square


class Spell(gym.Env[Any, str]):
    """Two squares side by side, and a word for them."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}
    observation_space = gym.spaces.Discrete(len(LETTERS) ** 2)
    instruction = "write the initials of both colours"

    def __init__(self, longest: int = 3, render_mode: str | None = None) -> None:
        """Makes the environment.

        Args:
            longest: How long a text may be.
            render_mode: None or "rgb_array".

        Raises:
            EnvError: No room for two letters.
        """
        if isinstance(longest, bool) or not isinstance(longest, int) or longest < 2:
            raise EnvError(f"longest is {longest!r}, expected a whole number from 2 on")
        self.action_space = gym.spaces.Text(longest, min_length=1, charset="".join(LETTERS))
        self.render_mode = render_mode
        self.word, self.tries = "rr", 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        """Draws the two colours."""
        super().reset(seed=seed)
        self.word, self.tries = "".join(self.np_random.choice(list(LETTERS), 2)), 0
        return self._number(), {"success": False}

    def step(self, action: str) -> tuple[int, float, bool, bool, dict[str, Any]]:
        """Takes a word."""
        self.tries += 1
        success = action == self.word
        return self._number(), float(success), success, self.tries == TRIES and not success, {"success": success}

    def expert_action(self) -> str:
        """Returns the right word."""
        return self.word

    def render(self) -> np.ndarray:
        """Returns the frame."""
        frame = np.zeros((SIDE, 2 * SIDE, 3), np.uint8)
        for place, letter in enumerate(self.word):
            frame[:, SIDE * place : SIDE * (place + 1)] = COLORS[LETTERS[letter]]
        frame[0, self.tries] = 255
        return frame

    def _number(self) -> int:
        first, second = (list(LETTERS).index(letter) for letter in self.word)
        return len(LETTERS) * first + second
