"""Actions that are places: the cells of a grid over the frame, by name, `row 1, column 2`; both count from 1.

The comma may be left out, so that names can stand in a list with commas, as on the command line.

Environments name them, policies say them, figures mark them.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

CELL = re.compile(r"row (\d{1,9}),? column (\d{1,9})", re.IGNORECASE)


class Grid(NamedTuple):
    """A grid and the cell of each action in it."""

    rows: int
    columns: int
    cells: tuple[tuple[int, int], ...]  # (row, column) from 0

    @property
    def is_whole(self) -> bool:
        """Whether each cell is there, once."""
        return len(set(self.cells)) == len(self.cells) == self.rows * self.columns

    def box(self, action: int) -> tuple[float, float, float, float]:
        """Returns an action's left, top, right and bottom as shares of the frame."""
        row, column = self.cells[action]
        return column / self.columns, row / self.rows, (column + 1) / self.columns, (row + 1) / self.rows


def cell_name(row: int, column: int) -> str:
    """Returns the name of a cell, given from 0."""
    return f"row {row + 1}, column {column + 1}"


def grid_of(names: Sequence[str]) -> Grid | None:
    """Returns the smallest grid that holds the cells of these names; None where a name is no cell."""
    found = [CELL.fullmatch(name.strip()) for name in names]
    cells = tuple((int(match[1]) - 1, int(match[2]) - 1) for match in found if match)
    if not cells or len(cells) < len(names) or min(map(min, cells)) < 0:
        return None
    return Grid(max(row for row, _ in cells) + 1, max(column for _, column in cells) + 1, cells)
