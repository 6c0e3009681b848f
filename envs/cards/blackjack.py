"""`manako/Blackjack-v0`: stand or hit, against a dealer whose second card is hidden.

    infinite deck, an ace counts 11 where that is not too much; the dealer draws below 17 and stands on a soft 17
    reward: the sign of player - dealer at the end; -1 for more than 21

The dealer's open card lies above beside the back of the other one, the player's cards below. The last frame shows the
dealer's hand as it was played.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from manako.envs.cards.drawing import BACK, BIG, RANKS, SUITS, card, empty_frame, lay
from manako.envs.cards.formulas import worth_of_rank
from manako.envs.cards.game import CardGame

STAND, HIT = 0, 1
MOST, DEALER_STANDS = 21, 17
CHANCES = {**dict.fromkeys(range(1, 10), 1 / 13), 10: 4 / 13}  # of a card's value
Card = tuple[int, int]  # rank, suit


class Blackjack(CardGame):
    """Two cards each; nothing in its rules differs from the original's, but no card lies outside the picture."""

    action_names = ("stand", "hit")
    instruction = "blackjack: stand or hit"

    def __init__(
        self, size: int = BIG, faithful: bool = False, strict: bool = False, render_mode: str | None = None
    ) -> None:
        self.player: list[Card] = []
        self._dealer: list[Card] = []
        super().__init__(size, faithful, strict, render_mode)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Deals two cards each."""
        super().reset(seed=seed)
        self.player = [self._card(), self._card()]
        self._dealer = [self._card(), self._card()]
        return self._begin(self._draw())

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Draws a card, or lets the dealer draw."""
        if int(action) == HIT:
            self.player.append(self._card())
            bust = total(self.player)[0] > MOST
            self._frame = self._draw(over=bust)
            return self._turn(-1.0 if bust else 0.0, terminated=bust)
        while total(self._dealer)[0] < DEALER_STANDS:
            self._dealer.append(self._card())
        self._frame = self._draw(over=True)
        mine, theirs = total(self.player)[0], total(self._dealer)[0]
        return self._turn(float(np.sign(mine - (theirs if theirs <= MOST else 0))), terminated=True)

    def expert_action(self) -> int:
        """Returns what wins most often."""
        mine, soft = total(self.player)
        stand, hit = chances_to_win(mine, soft, worth_of_rank(self._dealer[0][0]))
        return HIT if hit > stand else STAND

    def expert_thought(self) -> str:
        """Returns what the hands count."""
        mine, soft = total(self.player)
        return f"dealer {RANKS[self._dealer[0][0] - 1]}, {'soft ' * soft}{mine}"

    def caption(self) -> str:
        """Returns the open cards."""
        cards = ", ".join(RANKS[rank - 1] for rank, _ in self.player)
        return f"The dealer shows {RANKS[self._dealer[0][0] - 1]}; the player holds {cards}."

    def _card(self) -> Card:
        rank, suit = self.np_random.integers(1, len(RANKS) + 1), self.np_random.integers(0, len(SUITS))
        return int(rank), int(suit)

    def _draw(self, over: bool = False) -> np.ndarray:
        frame = empty_frame(self.size)
        self._lay_row(frame, self._dealer if over else [self._dealer[0], BACK], 0)
        if len(self.player) <= 10:
            self._lay_row(frame, self.player[:5], 120)
            self._lay_row(frame, self.player[5:], 210)
        else:  # one over the other, their ranks in sight
            for first in range(0, len(self.player), 9):
                self._lay_row(frame, self.player[first : first + 9], 120 + 30 * (first // 9), 30)
        return frame

    def _lay_row(self, frame: np.ndarray, cards: Sequence[Card], y: int, step: int = 60) -> None:
        step = step if len(cards) <= 5 else 30
        for place, (rank, suit) in enumerate(cards[: 1 + (BIG - 60) // step]):
            lay(frame, card(self.size, rank, suit), place * step, y)


def total(cards: Sequence[Card]) -> tuple[int, bool]:
    """Returns what a hand counts, and whether an ace of it counts 11."""
    return count([worth_of_rank(rank) for rank, _ in cards])


def count(values: Sequence[int]) -> tuple[int, bool]:
    """Returns the sum of values, an ace 11 where that is not too much; and whether one does."""
    soft = 1 in values and sum(values) + 10 <= MOST
    return sum(values) + 10 * soft, soft


@cache
def dealer_ends(mine: int, soft: bool) -> dict[int, float]:
    """Returns the chances of what a dealer's hand that counts so much ends at; 0 stands for more than 21."""
    if mine >= DEALER_STANDS:
        return {mine if mine <= MOST else 0: 1.0}
    ends: dict[int, float] = {}
    for value, chance in CHANCES.items():
        for end, share in dealer_ends(*_with(mine, soft, value)).items():
            ends[end] = ends.get(end, 0.0) + chance * share
    return ends


@cache
def chances_to_win(mine: int, soft: bool, shown: int) -> tuple[float, float]:
    """Returns the chances to win by standing, and by hitting and playing on as well as can be.

    Args:
        mine: what the player's hand counts.
        soft: whether an ace of it counts 11.
        shown: value of the dealer's open card.
    """
    if mine > MOST:
        return 0.0, 0.0
    stand = sum(
        chance * share
        for value, chance in CHANCES.items()
        for end, share in dealer_ends(*count([shown, value])).items()
        if mine > end
    )
    hit = sum(chance * max(chances_to_win(*_with(mine, soft, value), shown)) for value, chance in CHANCES.items())
    return stand, hit


def _with(mine: int, soft: bool, value: int) -> tuple[int, bool]:
    """A hand with another card: what it counts, and whether an ace of it counts 11."""
    mine += value
    if value == 1 and not soft and mine + 10 <= MOST:
        return mine + 10, True
    return (mine - 10, False) if soft and mine > MOST else (mine, soft)
