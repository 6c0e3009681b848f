"""A judge of actions behind a chat API: which of two is better in this frame. Each pair is asked in both orders.

Models prefer what is named first, or last; an action counts as better only where both orders say so.
"""

from collections.abc import Sequence

import numpy as np

from manako.policies.plain_text import as_plain_text
from manako.policies.remote.choosing import Chooser, Chosen, Question

SYSTEM = (
    "You see a frame of an environment and an instruction. Which of the two actions is better here? Actions: {actions}."
)


class RemoteJudge:
    """Asks a server about pairs of actions.

    Args:
        chooser: of the server.
        action_names: the A actions.

    Attributes:
        asked: pairs so far.
        agreed: of them those where both orders say the same.
        unparsed: of them those with an answer that names neither action.
    """

    def __init__(self, chooser: Chooser, action_names: Sequence[str]) -> None:
        self.chooser, self.names = chooser, tuple(action_names)
        self.asked = self.agreed = self.unparsed = 0

    def question(self, frame: np.ndarray, instruction: str, pair: tuple[int, int]) -> Question:
        """Returns the question about two actions, in this order."""
        names = (self.names[pair[0]], self.names[pair[1]])
        return Question(SYSTEM, frame, as_plain_text(instruction, []), names)

    def __call__(
        self, frames: Sequence[np.ndarray], instructions: Sequence[str], pairs: Sequence[tuple[int, int]]
    ) -> list[int | None]:
        """Returns the better action of each pair, None where that is not said.

        Args:
            frames: B of (H, W, 3) uint8.
            instructions: B texts.
            pairs: B of two actions.

        Raises:
            RemoteError: the budget is used up, or the server gives no answers.
        """
        orders = [ordered for pair in pairs for ordered in (pair, pair[::-1])]
        seen = zip((f for f in frames for _ in range(2)), (i for i in instructions for _ in range(2)), strict=True)
        answers = self.chooser.choose(
            [self.question(frame, text, order) for (frame, text), order in zip(seen, orders, strict=True)]
        )
        said = [_taken(chosen, order) for chosen, order in zip(answers, orders, strict=True)]
        better: list[int | None] = []
        for first, second in zip(said[::2], said[1::2], strict=True):
            self.asked += 1
            self.unparsed += None in (first, second)
            better.append(first if first == second else None)
            self.agreed += better[-1] is not None
        return better

    def in_words(self) -> str:
        """Returns how often it agreed with itself, for a line of text."""
        return f"{self.agreed:,} of {self.asked:,} pairs told apart in both orders, {self.unparsed:,} not answered"


def _taken(chosen: Chosen, order: tuple[int, int]) -> int | None:
    place = int(chosen.logprobs.argmax()) if chosen.logprobs is not None else chosen.choice
    return None if place is None else order[place]
