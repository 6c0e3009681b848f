"""`place`: a cell of a grid is said as the box that covers it, in Kosmos-2's grounding tokens (arXiv:2306.14824).

    "row 2, column 1" of 3 x 3, 32 x 32 bins        <object><patch_index_0320><patch_index_0682></object>
                                                     top left: row 10, column 0   bottom right: row 21, column 10

The frame is cut into bins, row by row, and each is a token of the vocabulary; a box is its first and its last bin. Of
cells that the bins tell apart no two begin in the same one, so the bin of the top left corner decides and the other
tokens follow from it: they cost nothing, since the trie renormalises over the cells alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from manako.places import Grid, grid_of
from manako.policies.answers.kind import AnswerKind

BEGIN, END = "<object>", "</object>"


@dataclass(frozen=True)
class Place(AnswerKind):
    """Boxes of grounding tokens.

    Attributes:
        side: bins along each side of the frame; 0: no tokenizer was seen, or it has none.
    """

    side: int = 0
    one_token = False

    def of_tokenizer(self, tokenizer: Any) -> "Place":
        """Returns the kind with as many bins as the tokenizer has, a square of them."""
        vocabulary = tokenizer.get_vocab()
        if BEGIN not in vocabulary or END not in vocabulary:
            return Place()
        count = 0
        while bin_token(count) in vocabulary:
            count += 1
        return Place(math.isqrt(count))

    def problem(self, names: Sequence[str]) -> str | None:
        """Returns why these names cannot be said as places."""
        grid = grid_of(names)
        if grid is None:
            return "the names are not all of the form 'row 1, column 2'"
        size = f"{grid.rows} x {grid.columns}"
        if not grid.is_whole:
            return f"the names are not each cell of a grid of {size} once"
        if not self.side:
            return f"the tokenizer has no grounding tokens {BEGIN}, {bin_token(0)}, ..., {END}, as Kosmos-2's has"
        if max(grid.rows, grid.columns) > self.side:
            return f"{self.side} x {self.side} bins cannot tell {size} cells apart"
        return None

    def answers(self, names: Sequence[str]) -> tuple[str, ...]:
        """Returns the boxes of names without a `problem`."""
        grid = grid_of(names)
        boxes = [] if grid is None else [box_bins(grid, action, self.side) for action in range(len(names))]
        return tuple(f"{BEGIN}{bin_token(first)}{bin_token(last)}{END}" for first, last in boxes)

    def legend(self, names: Sequence[str]) -> str:
        """Returns the size of the grid."""
        grid = grid_of(names)
        return "" if grid is None else f"a place, {grid.rows} rows x {grid.columns} columns"


def bin_token(number: int) -> str:
    """Returns the token of a bin."""
    return f"<patch_index_{number:04}>"


def box_bins(grid: Grid, action: int, side: int) -> tuple[int, int]:
    """Returns the first and the last bin that an action's cell touches, row by row in a square of bins.

    Args:
        grid: of at most `side` rows and columns.
        action: one of its cells.
        side: bins along each side.
    """
    row, column = grid.cells[action]
    top, left = row * side // grid.rows, column * side // grid.columns
    bottom, right = ((row + 1) * side - 1) // grid.rows, ((column + 1) * side - 1) // grid.columns
    return top * side + left, bottom * side + right
