"""What the four card games share: a frame drawn at the size that is seen, an instruction, and two kinds of success.

`info["success"]` is the original's: the episode's return is above 0. With `strict=True` it is a perfect episode: won,
and nothing paid on the way. The rules are those of Gym Cards (RL4VLM, arXiv:2405.10292), written anew: all chance comes
from the seed, nothing is given to `eval`, and nothing hidden is in `info`.
"""

from typing import Any

import gymnasium as gym
import numpy as np

from manako.envs.cards.drawing import BIG, check_size
from manako.envs.errors import EnvError
from manako.envs.observation import InstructionText


class CardGame(gym.Env[dict[str, Any], Any]):
    """A game with one picture and one line of text.

    Args:
        size: pixels a side of the frame.
        faithful: the original's rules where outcomes differ.
        strict: which success is reported, see above.
        render_mode: None or "rgb_array".

    Raises:
        EnvError: a parameter is out of range.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}
    action_names: tuple[str, ...]

    def __init__(
        self, size: int = BIG, faithful: bool = False, strict: bool = False, render_mode: str | None = None
    ) -> None:
        for name, value in (("faithful", faithful), ("strict", strict)):
            if not isinstance(value, bool):
                raise EnvError(f"{name} is {value!r}, expected true or false")
        self.size, self.faithful, self.strict, self.render_mode = check_size(size), faithful, strict, render_mode
        self.observation_space = gym.spaces.Dict(
            image=gym.spaces.Box(0, 255, (size, size, 3), np.uint8), instruction=InstructionText()
        )
        self.action_space = gym.spaces.Discrete(len(self.action_names))
        self._frame = np.zeros((size, size, 3), np.uint8)
        self._return, self._paid = 0.0, False

    @property
    def instruction(self) -> str:
        """What is to be done, and what of the game stands in words."""
        raise NotImplementedError

    def render(self) -> np.ndarray:
        """Returns the frame of the observation."""
        return self._frame.copy()

    def _begin(self, frame: np.ndarray) -> tuple[dict[str, Any], dict[str, Any]]:
        self._frame, self._return, self._paid = frame, 0.0, False
        return self._observe(), {"success": False}

    def _turn(
        self, reward: float, terminated: bool = False, truncated: bool = False
    ) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self._return += reward
        self._paid |= reward < 0
        success = (terminated or truncated) and self._return > 0 and not (self.strict and self._paid)
        return self._observe(), float(reward), terminated, truncated, {"success": success}

    def _observe(self) -> dict[str, Any]:
        return {"image": self._frame.copy(), "instruction": self.instruction}
