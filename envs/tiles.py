"""Drawing by look-up: a board of tile numbers becomes a picture in one indexing operation.

Each tile is 8 x 8 pixels, painted once when an environment is made. Tile 0 is the floor, tile 1 the agent, and the
objects follow, shape by shape and colour by colour.
"""

from collections.abc import Sequence

import numpy as np

from manako.envs.errors import EnvError

TILE = 8  # pixels
FLOOR, AGENT, FIRST_OBJECT = 0, 1, 2

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (228, 40, 40),
    "green": (40, 184, 60),
    "blue": (50, 90, 245),
    "yellow": (245, 215, 40),
    "purple": (160, 50, 200),
    "orange": (250, 135, 25),
    "cyan": (50, 210, 225),
    "pink": (250, 135, 190),
}

_BACKGROUND = (38, 38, 44)
_GRID = (62, 62, 70)
_WHITE = (255, 255, 255)

_MASKS: dict[str, tuple[str, ...]] = {
    "agent": (
        "........",
        "...##...",
        "...##...",
        ".######.",
        ".######.",
        "...##...",
        "...##...",
        "........",
    ),
    "ball": (
        "........",
        "..####..",
        ".######.",
        ".######.",
        ".######.",
        ".######.",
        "..####..",
        "........",
    ),
    "box": (
        "........",
        ".######.",
        ".######.",
        ".##..##.",
        ".##..##.",
        ".######.",
        ".######.",
        "........",
    ),
    "key": (
        "........",
        "..###...",
        "..#.#...",
        "..###...",
        "...#....",
        "...###..",
        "...#....",
        "...###..",
    ),
}
SHAPES: tuple[str, ...] = ("ball", "box", "key")


def resolve_colors(colors: int | Sequence[str]) -> tuple[str, ...]:
    """Returns colour names for a number (the first so many) or for names, which are checked.

    Raises:
        EnvError: Fewer than 2, too many, unknown or repeated.
    """
    if isinstance(colors, int):
        if not 2 <= colors <= len(COLORS):
            raise EnvError(f"colors is {colors}, expected 2 to {len(COLORS)}, or names from {', '.join(COLORS)}")
        return tuple(COLORS)[:colors]
    return _check_names("colors", colors, tuple(COLORS), at_least=2)


def resolve_shapes(shapes: Sequence[str]) -> tuple[str, ...]:
    """Returns the shapes' names, checked.

    Raises:
        EnvError: None, unknown or repeated.
    """
    return _check_names("shapes", shapes, SHAPES, at_least=1)


def paint_tiles(colors: Sequence[str], shapes: Sequence[str]) -> np.ndarray:
    """Paints the floor, the agent, and every shape in every colour.

    Returns:
        (2 + shapes x colours, 8, 8, 3) uint8; the object of shape s and colour c has the number `FIRST_OBJECT + s *
        len(colors) + c`.
    """
    floor = np.full((TILE, TILE, 3), _BACKGROUND, np.uint8)  # (8, 8, 3)
    floor[0], floor[:, 0] = _GRID, _GRID
    painted = [floor, _paint(floor, "agent", _WHITE)]
    painted += [_paint(floor, shape, COLORS[color]) for shape in shapes for color in colors]
    return np.stack(painted)


def draw(tiles: np.ndarray, board: np.ndarray) -> np.ndarray:
    """Draws a board of tile numbers (rows, columns) as a fresh frame (8 rows, 8 columns, 3) uint8."""
    rows, columns = board.shape
    return tiles[board].swapaxes(1, 2).reshape(rows * TILE, columns * TILE, 3)


def _paint(floor: np.ndarray, shape: str, color: tuple[int, int, int]) -> np.ndarray:
    tile = floor.copy()
    tile[np.array([[pixel == "#" for pixel in row] for row in _MASKS[shape]])] = color
    return tile


def _check_names(what: str, names: Sequence[str], known: Sequence[str], at_least: int) -> tuple[str, ...]:
    listed = (names,) if isinstance(names, str) else tuple(names)
    if len(listed) < at_least or len(set(listed)) < len(listed) or not set(listed) <= set(known):
        raise EnvError(f"{what} is {names!r}, expected at least {at_least} different names from {', '.join(known)}")
    return listed
