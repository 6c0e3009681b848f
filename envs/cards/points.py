"""`manako/EZPoints-v0` and `manako/Points24-v0`: write a formula of the cards that is worth the target.

    an action is a number, an operator, a parenthesis, or "=", which ends the game
    +10 for the target, reached with every card once; -1 for anything else at "="
    -1 for a number that is not, or no longer, on the cards: a blank is written, and the game goes on
    -1 and cut off once the formula is longer than 5 tokens, or 20

The formula so far stands in the instruction; the frame stays as it is all episode long. `faithful=True` reads formulas
as the original does, see `formulas`.
"""

import zlib
from collections.abc import Sequence
from typing import Any, ClassVar

from manako.envs.cards.drawing import BIG, SUITS, card, check_size, empty_frame, lay
from manako.envs.cards.formulas import OPERATORS, solutions, value_of, worth_of_rank
from manako.envs.cards.game import CardGame
from manako.envs.errors import EnvError

BLANK, END = " ", "="
NUMBERS = tuple(str(number) for number in range(1, 11))
DEALS = ("all", "train", "held_out")
HELD_OUT_PART = 5  # one multiset of values in so many is never trained on


class FormulaGame(CardGame):
    """Cards in a row, and a formula to write."""

    target: ClassVar[int]
    longest: ClassVar[int]  # of a formula that can still be written on

    def __init__(
        self, size: int = BIG, faithful: bool = False, strict: bool = False, render_mode: str | None = None
    ) -> None:
        self.ranks: tuple[int, ...] = ()
        self.formula: tuple[str, ...] = ()
        super().__init__(check_size(size), faithful, strict, render_mode)

    @property
    def instruction(self) -> str:
        """The target, and the formula so far, in which `_` stands for a blank."""
        written = " ".join("_" if token == BLANK else token for token in self.formula)
        return f"make {self.target}: {written}".rstrip()

    @property
    def values(self) -> tuple[int, ...]:
        """What the cards count, from left to right."""
        return tuple(map(worth_of_rank, self.ranks))

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Writes a token, or ends the game."""
        token = self.action_names[int(action)]
        if len(self.formula) > self.longest:
            return self._turn(-1.0, truncated=True)
        if token in NUMBERS and token not in self.left():
            self.formula += (BLANK,)
            return self._turn(-1.0)
        if token == END:
            right = value_of(self.formula, self.faithful) == self.target and not self.left()
            return self._turn(10.0 if right else -1.0, terminated=True)
        self.formula += (token,)
        return self._turn(0.0)

    def left(self) -> list[str]:
        """Returns the numbers of the cards that are not yet in the formula."""
        left = [str(value) for value in self.values]
        for token in self.formula:
            if token in left:
                left.remove(token)
        return left

    def solution(self) -> tuple[str, ...] | None:
        """Returns the plainest formula that goes on from what is written; None where nothing does."""
        written = tuple(token for token in self.formula if token != BLANK)
        for each in solutions(tuple(sorted(self.values)), self.target):
            room = len(self.formula) - len(written) + len(each) <= self.longest
            if each[: len(written)] == written and room and self._can_say(each):
                return each
        return None

    def expert_action(self) -> int:
        """Returns the next token of the plainest formula; "=" where it is written, or where nothing leads there."""
        solution = self.solution() or ()
        written = sum(token != BLANK for token in self.formula)
        return self.action_names.index(solution[written] if written < len(solution) else END)

    def expert_thought(self) -> str:
        """Returns what the cards count, and the formula."""
        solution = self.solution()
        return f"{' '.join(map(str, self.values))}: {'nothing' if solution is None else ''.join(solution)}"

    def caption(self) -> str:
        """Returns what the cards count."""
        return f"The cards count {', '.join(map(str, self.values))}."

    def _can_say(self, tokens: Sequence[str]) -> bool:
        return set(tokens) <= set(self.action_names)

    def _deal(self, ranks: tuple[int, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
        self.ranks, self.formula = ranks, ()
        suits = self.np_random.integers(0, len(SUITS), len(ranks)).tolist()
        frame = empty_frame(self.size)
        for place, (rank, suit) in enumerate(zip(ranks, suits, strict=True)):
            lay(frame, card(self.size, rank, suit), 30 + 60 * place, 90)
        return self._begin(frame)


class EZPoints(FormulaGame):
    """Two cards, 12, `+` and `*`. Every deal can be solved."""

    target, longest = 12, 5
    action_names = (*NUMBERS, "+", "*", END)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draws a card and one that makes 12 of it, by a product or a sum."""
        super().reset(seed=seed)
        first = int(self.np_random.integers(2, 14))
        value = worth_of_rank(first)
        divides = value in (1, 2, 3, 4, 6) and self.np_random.random() < 0.5
        second = 12 // value if divides else 12 - value
        ranks = (second, first) if self.np_random.random() < 0.5 else (first, second)
        return self._deal(ranks)


class Points24(FormulaGame):
    """Four cards, 24, the four operations and parentheses. Of all deals 73.09 % can be solved.

    Args:
        deals: "all"; "train", without every fifth multiset of values; "held_out", those alone.
        solvable: deal only what can be solved.
        size, faithful, strict, render_mode: see `CardGame`.
    """

    target, longest = 24, 20
    action_names = (*NUMBERS, *OPERATORS, "(", ")", END)

    def __init__(
        self,
        deals: str = "all",
        solvable: bool = False,
        size: int = BIG,
        faithful: bool = False,
        strict: bool = False,
        render_mode: str | None = None,
    ) -> None:
        if deals not in DEALS:
            raise EnvError(f"deals is {deals!r}, expected one of {', '.join(DEALS)}")
        if not isinstance(solvable, bool):
            raise EnvError(f"solvable is {solvable!r}, expected true or false")
        self.deals, self.solvable = deals, solvable
        super().__init__(size, faithful, strict, render_mode)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Draws four cards until they are of the deals that are asked for."""
        super().reset(seed=seed)
        while True:
            ranks = tuple(self.np_random.integers(1, 14, 4).tolist())
            values = tuple(sorted(map(worth_of_rank, ranks)))
            wanted = self.deals == "all" or is_held_out(values) == (self.deals == "held_out")
            if wanted and (not self.solvable or solutions(values, self.target)):
                return self._deal(ranks)


def is_held_out(values: tuple[int, ...]) -> bool:
    """Returns whether four values, in ascending order, are of those that are never trained on."""
    return zlib.crc32(" ".join(map(str, values)).encode()) % HELD_OUT_PART == 0
