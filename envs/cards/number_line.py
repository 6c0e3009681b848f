"""`manako/NumberLine-v0`: move a number to its target, both drawn in the picture.

+1 and the end at the target, -1 for a move that does not come nearer, else 0; 10 moves at most
"""

from typing import Any

import numpy as np

from manako.envs.cards.drawing import BIG, check_size, empty_frame, lay, line_of_text
from manako.envs.cards.game import CardGame
from manako.envs.errors import EnvError

MOST_MOVES = 10


class NumberLine(CardGame):
    """Two lines of text, `-` and `+`. Nothing in its rules differs from the original's.

    Args:
        max_position: the numbers are 0 to this one.
        size, faithful, strict, render_mode: see `CardGame`.
    """

    action_names = ("-", "+")
    instruction = "move the current number to the target"

    def __init__(
        self,
        max_position: int = 5,
        size: int = BIG,
        faithful: bool = False,
        strict: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if isinstance(max_position, bool) or not isinstance(max_position, int) or not 2 <= max_position <= 99:
            raise EnvError(f"max_position is {max_position!r}, expected a whole number from 2 to 99")
        self.max_position, self.target, self.position, self._moves = max_position, 1, 0, 0
        super().__init__(check_size(size), faithful, strict, render_mode)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draws a start and another number as the target."""
        super().reset(seed=seed)
        self.position, self.target = self.np_random.integers(0, self.max_position + 1, 2).tolist()
        if self.target == self.position:
            self.target = (self.target + 1) % self.max_position
        self._moves = 0
        return self._begin(self._draw())

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Moves by one; the ends of the line hold the number back."""
        before = abs(self.target - self.position)
        self.position = min(max(self.position + (1 if int(action) else -1), 0), self.max_position)
        self._moves += 1
        self._frame = self._draw()
        left = abs(self.target - self.position)
        reward = 1.0 if left == 0 else 0.0 if left < before else -1.0
        return self._turn(reward, left == 0, left > 0 and self._moves >= MOST_MOVES)

    def expert_action(self) -> int:
        """Returns the move towards the target."""
        return int(self.target > self.position)

    def expert_thought(self) -> str:
        """Returns both numbers."""
        return f"target {self.target}, current {self.position}"

    def caption(self) -> str:
        """Returns both numbers, in a sentence."""
        return f"The target is {self.target}, the current number {self.position}."

    def _draw(self) -> np.ndarray:
        frame = empty_frame(self.size)
        lay(frame, line_of_text(self.size, f"Target: {self.target}"), 0, 60)
        lay(frame, line_of_text(self.size, f"Current: {self.position}"), 0, 180)
        return frame
