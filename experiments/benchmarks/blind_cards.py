"""What can be won at the card games without the picture: the best policy that reads the text alone, computed.

    python experiments/benchmarks/blind_cards.py

NumberLine's and Blackjack's text never changes, so such a policy does the same in every turn, by some probability; all
of them are tried, in steps of a hundredth. EZPoints' text is the formula so far, with a blank for each number that was
not on the cards: a policy that does one thing at each text knows what it tried, and the best one is found by trying
all, of which those deals are left that fit (a decision tree over 283 deals). Left out: Points24, whose tree is too
large.
"""

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a file: `manako` is this checkout
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.envs.cards.blackjack import CHANCES, DEALER_STANDS, MOST  # noqa: E402
from manako.envs.cards.formulas import value_of, worth_of_rank  # noqa: E402
from manako.envs.cards.points import END, EZPoints  # noqa: E402
from manako.experiments.common.command_line import parse, run_main  # noqa: E402

Deals = tuple[tuple[tuple[int, int], Fraction], ...]  # values in ascending order, how likely
GRID = [number / 100 for number in range(101)]


@dataclass(frozen=True)
class BlindCommand:
    """Nothing can be set."""


def read_line(arguments: Sequence[str] | None = None) -> BlindCommand:
    """Reads these words, by default this program's command line."""
    return parse(BlindCommand, "Computes what the text alone gives in the card games; takes no settings.", arguments)


def main() -> int:
    """Prints a line a game."""
    read_line()
    line, chance = max((number_line(chance), chance) for chance in GRID)
    print(f"NumberLine  {line:.1%}, by + with probability {chance:g}; always +: {number_line(1.0):.1%}")
    for strict in (False, True):
        print(f"EZPoints    {float(ez_points(strict)):.1%}" + (", at the first try (strict)" if strict else ""))
    won, chance = max((blackjack(chance), chance) for chance in GRID)
    print(f"Blackjack   {won:.1%}, by hitting with probability {chance:g}; always to stand: {blackjack(0.0):.1%}")
    return 0


def number_line(plus: float, largest: int = 5) -> float:
    """Returns how often every move is right where + is made with this probability: each wrong one costs the success."""
    total = 0.0
    for start in range(largest + 1):
        for goal in range(largest + 1):
            target = goal if goal != start else (goal + 1) % largest
            distance = abs(target - start)
            total += plus**distance if target > start else (1 - plus) ** distance
    return total / (largest + 1) ** 2


def ez_deals() -> Deals:
    """Returns the pairs of values that are dealt, by the rules of `EZPoints.reset`."""
    found: Counter[tuple[int, int]] = Counter()
    for first in range(2, 14):
        value = worth_of_rank(first)
        divides = Fraction(1, 2) if value in (1, 2, 3, 4, 6) else Fraction(0)
        for second, part in ((12 // value, divides), (12 - value, 1 - divides)):
            if part:
                low, high = sorted((value, second))
                found[low, high] += part / 12  # type: ignore[assignment]  # a Counter of fractions
    return tuple(sorted(found.items()))  # type: ignore[arg-type]


def ez_points(strict: bool) -> Fraction:
    """Returns how often the best policy without the picture succeeds; strict: with no wrong number on the way."""
    game = EZPoints

    def of_text(written: tuple[str, ...], deals: Deals) -> Fraction:
        return max(after(written, token, deals) for token in game.action_names)

    def after(written: tuple[str, ...], token: str, deals: Deals) -> Fraction:
        if not deals or len(written) > game.longest:
            return Fraction(0)
        if token == END:
            right = value_of(written) == game.target
            return sum((part for cards, part in deals if right and not left(cards, written)), Fraction(0))
        if not token.isdigit():
            return best((*written, token), deals)
        fits = tuple(deal for deal in deals if token in left(deal[0], written))
        others = tuple(deal for deal in deals if deal not in fits)
        if len(fits) == 0:
            return Fraction(0)  # nothing is learned by a number that none holds
        missed = Fraction(0) if strict or not others else best((*written, " "), others)
        return best((*written, token), fits) + missed

    best = cache(of_text)
    return best((), ez_deals())


def left(cards: tuple[int, ...], written: tuple[str, ...]) -> list[str]:
    """Returns the numbers of the cards that are not in the formula."""
    numbers = [str(card) for card in cards]
    for token in written:
        if token in numbers:
            numbers.remove(token)
    return numbers


def blackjack(hit: float) -> float:
    """Returns how often a policy wins that hits with this probability whatever it holds."""

    @cache
    def dealer(total: int, ace: bool) -> dict[int, float]:
        worth = total + 10 if ace and total + 10 <= MOST else total
        if worth >= DEALER_STANDS:
            return {0 if worth > MOST else worth: 1.0}
        ends: Counter[int] = Counter()
        for card, chance in CHANCES.items():
            for end, part in dealer(total + card, ace or card == 1).items():
                ends[end] += chance * part  # type: ignore[assignment]
        return dict(ends)

    @cache
    def player(total: int, ace: bool, seen: int) -> float:
        if total > MOST:
            return 0.0
        worth = total + 10 if ace and total + 10 <= MOST else total
        stands = sum(part for end, part in of_dealer(seen).items() if worth > end)
        if not hit:
            return stands
        drawn = sum(chance * player(total + card, ace or card == 1, seen) for card, chance in CHANCES.items())
        return (1 - hit) * stands + hit * drawn

    @cache
    def of_dealer(seen: int) -> dict[int, float]:
        ends: Counter[int] = Counter()
        for card, chance in CHANCES.items():
            for end, part in dealer(seen + card, 1 in (seen, card)).items():
                ends[end] += chance * part  # type: ignore[assignment]
        return dict(ends)

    return sum(
        a * b * c * player(one + two, 1 in (one, two), seen)
        for one, a in CHANCES.items()
        for two, b in CHANCES.items()
        for seen, c in CHANCES.items()
    )


if __name__ == "__main__":
    run_main(main)
