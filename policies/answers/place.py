"""`place`: a cell of a grid is said as the box that covers it, in Kosmos-2's grounding tokens (arXiv:2306.14824).

    "row 2, column 1" of 3 x 3, 32 x 32 bins        <object><patch_index_0320><patch_index_0682></object>
                                                             top left: row 10, 0   bottom right: row 21, column 10

The frame is cut into bins, row by row, and each is a token of the vocabulary; a box is its first and its last bin. Of
cells that the bins tell apart no two begin in the same one, so the bin of the top left corner decides and the other
tokens follow from it: they cost nothing, since the trie renormalises over the cells alone.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from manako.policies.answers.kind import AnswerKind

BEGIN, END = "<object>", "</object>"
CELL = re.compile(r"row (\d+), column (\d+)", re.IGNORECASE)


def bin_token(number: int) -> str:
    """Returns the token of a bin."""
    return f"<patch_index_{number:04}>"


@dataclass(frozen=True)
class Place(AnswerKind):
    """Boxes of grounding tokens.

    Attributes:
        side: bins along each side of the frame; 0: no tokenizer was seen, or it has none.
    """

    side: int = 0
    one_token = False

    def of_tokenizer(self, tokenizer: Any) -> "Place":
        """Returns the kind with as many bins as the tokenizer has, which are a square number."""
        vocabulary = tokenizer.get_vocab()
        if BEGIN not in vocabulary or END not in vocabulary:
            return Place()
        count = 0
        while bin_token(count) in vocabulary:
            count += 1
        return Place(math.isqrt(count))

    def problem(self, names: Sequence[str]) -> str | None:
        """Returns why these names cannot be said as places."""
        cells = _cells(names)
        if cells is None:
            return "the names are not all of the form 'row 1, column 2'"
        rows, columns = grid(cells)
        if not len(set(cells)) == len(cells) == rows * columns:
            return f"the names are not each cell of a grid of {rows} x {columns} once"
        if not self.side:
            return f"the tokenizer has no grounding tokens {BEGIN}, {bin_token(0)}, ..., {END}"
        if max(rows, columns) > self.side:
            return f"{self.side} x {self.side} bins cannot tell {rows} x {columns} cells apart"
        return None

    def answers(self, names: Sequence[str]) -> tuple[str, ...]:
        """Returns the boxes."""
        cells = _cells(names) or []
        boxes = [box_bins(*cell, *grid(cells), self.side) for cell in cells]
        return tuple(f"{BEGIN}{bin_token(first)}{bin_token(last)}{END}" for first, last in boxes)

    def legend(self, names: Sequence[str]) -> str:
        """Returns the size of the grid."""
        rows, columns = grid(_cells(names) or [])
        return f"a place, {rows} rows x {columns} columns"


def grid(cells: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Returns how many rows and columns hold all of the cells."""
    return max((row for row, _ in cells), default=-1) + 1, max((column for _, column in cells), default=-1) + 1


def box_bins(row: int, column: int, rows: int, columns: int, side: int) -> tuple[int, int]:
    """Returns the first and the last bin that a cell touches, row by row in a square of `side` bins.

    Args:
        row: the cell's, from 0.
        column: the cell's, from 0.
        rows: cells down, at most `side`.
        columns: cells across, at most `side`.
        side: bins along each side.
    """
    top, left = row * side // rows, column * side // columns
    bottom, right = ((row + 1) * side - 1) // rows, ((column + 1) * side - 1) // columns
    return top * side + left, bottom * side + right


def _cells(names: Sequence[str]) -> list[tuple[int, int]] | None:
    """Rows and columns of names, from 0; None where one is no cell."""
    found = [CELL.fullmatch(name.strip()) for name in names]
    cells = [(int(match[1]) - 1, int(match[2]) - 1) for match in found if match]
    return cells if len(cells) == len(names) and all(min(cell) >= 0 for cell in cells) else None
