"""Formulas of the card games: what is written, what it is worth, and how a target can be reached.

Nothing is ever given to `eval`. Two ways to read a formula:

    ours          numbers, + - * / and parentheses, as taught at school; exact fractions
    the original  what Python's `eval` makes of the same characters: 1 and 2 side by side are 12, * twice is a power,
                  / twice a division without rest, a sign may stand before a number, and results are floats
"""

import ast
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import Any

OPERATORS = ("+", "-", "*", "/")
MOST_BITS = 4000  # of a power; larger ones are as wrong as any other number


def value_of(tokens: Sequence[str], faithful: bool = False) -> Fraction | float | None:
    """Returns what a formula is worth; None where it is none.

    Args:
        tokens: numbers, operators, parentheses, and blanks.
        faithful: read as the original does.
    """
    if not faithful:
        tokens = [token for token in tokens if token.strip()]
        if any(each.isdigit() and then.isdigit() for each, then in pairwise(tokens)):
            return None
    try:
        tree = ast.parse("".join(tokens).strip(), mode="eval")
        return _number(tree.body, faithful)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError, TypeError):
        return None


def _number(node: ast.AST, faithful: bool) -> Any:
    """Raises ValueError where it is no formula."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value if faithful else Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and faithful and isinstance(node.op, ast.USub | ast.UAdd):
        inside = _number(node.operand, faithful)
        return -inside if isinstance(node.op, ast.USub) else inside
    if not isinstance(node, ast.BinOp):
        raise ValueError("no number, no operation")
    left, right = _number(node.left, faithful), _number(node.right, faithful)
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    if isinstance(node.op, ast.Mult):
        return left * right
    if isinstance(node.op, ast.Div):
        return left / right
    if faithful and isinstance(node.op, ast.FloorDiv):
        return left // right
    if faithful and isinstance(node.op, ast.Pow):
        if abs(left) > 1 and abs(right) * len(f"{int(abs(left)):b}") > MOST_BITS:
            raise ValueError("larger than any target")
        power = left**right
        if isinstance(power, complex):
            raise ValueError("no real number")
        return power
    raise ValueError("no operation of the game")


@cache
def solutions(values: tuple[int, ...], target: int) -> tuple[tuple[str, ...], ...]:
    """Returns formulas that use every value once and reach the target, as tokens: the plainest first.

    Plain: sums and products before differences and quotients, few parentheses, the larger number first.

    Args:
        values: of the cards, in ascending order.
        target: to reach.
    """
    found: dict[tuple[str, ...], tuple[int, int, tuple[str, ...]]] = {}
    for value, tokens, hard, _ in _made(values, target):
        if value == target and tokens not in found:
            found[tokens] = (hard, len(tokens), tokens)
    return tuple(sorted(found, key=lambda tokens: found[tokens]))


Formula = tuple[Fraction, tuple[str, ...], int, int]  # worth, tokens, how hard, what binds: 3 number, 2 product, 1 sum


@cache
def _formulas(values: tuple[int, ...]) -> tuple[Formula, ...]:
    return tuple(_made(values))


def _made(values: tuple[int, ...], target: int | None = None) -> list[Formula]:
    """All formulas of these values, or, of several values, those that are worth the target."""
    if len(values) == 1:
        return [(Fraction(values[0]), (str(values[0]),), 0, 3)]
    made: dict[tuple[str, ...], Formula] = {}
    for ones, others in _splits(values):
        for left, left_tokens, left_hard, left_binds in _formulas(ones):
            for right, right_tokens, right_hard, right_binds in _formulas(others):
                hard = left_hard + right_hard
                for operator, worth, cost in _operations(left, right, target):
                    binds = 1 if operator in "+-" else 2
                    a = left_tokens if left_binds >= binds else ("(", *left_tokens, ")")
                    closed = right_binds > binds or (right_binds == binds and operator in "+*")
                    b = right_tokens if closed else ("(", *right_tokens, ")")
                    tokens = (*a, operator, *b)
                    made.setdefault(tokens, (worth, tokens, hard + cost, binds))
    return list(made.values())


def _operations(left: Fraction, right: Fraction, target: int | None) -> Iterator[tuple[str, Fraction, int]]:
    """What can be done with two numbers, or, where a target is given, what reaches it, in whole numbers."""
    if target is None:
        yield "+", left + right, 0 if left >= right else 1
        yield "*", left * right, 0 if left >= right else 1
        yield "-", left - right, 2
        if right:
            yield "/", left / right, 4
        return
    (a, b), (c, d) = left.as_integer_ratio(), right.as_integer_ratio()
    ones, others, wanted = a * d, c * b, target * b * d  # all times b * d
    if ones + others == wanted:
        yield "+", Fraction(target), 0 if ones >= others else 1
    if a * c == wanted:
        yield "*", Fraction(target), 0 if ones >= others else 1
    if ones - others == wanted:
        yield "-", Fraction(target), 2
    if c and ones == target * others:
        yield "/", Fraction(target), 4


def _splits(values: tuple[int, ...]) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Ways to part the values in two groups that are not empty, each in order."""
    count, found = len(values), set()
    for chosen in range(1, 2**count - 1):
        ones = tuple(values[at] for at in range(count) if chosen >> at & 1)
        others = tuple(values[at] for at in range(count) if not chosen >> at & 1)
        found.add((ones, others))
    return found


def worth_of_rank(rank: int) -> int:
    """Returns what a card counts: its number, and 10 for jack, queen and king."""
    return min(rank, 10)
