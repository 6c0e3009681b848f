"""Cards and lines of text, drawn at the size that is seen.

    sprites of a 300 x 300 picture ─ averaged over factor x factor pixels, once ─► laid on a (size, size, 3) frame

Every sprite lies on a grid of 30 pixels and its sides are multiples of 30, so laying small sprites on a small frame
gives, pixel by pixel, what `PIL.Image.reduce` makes of the big one, at the cost of a copy. The suits are drawn by us,
the letters are of the font that ships with Pillow.
"""

from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from manako.envs.errors import EnvError

BIG, GRID = 300, 30  # pixels of the big picture
SIZES = (300, 150, 100, 60, 50, 30)
CARD = (60, 90)  # width, height
RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
SUITS = ("spades", "hearts", "diamonds", "clubs")
BACK = (0, 0)  # a card whose face is hidden

_TABLE = (24, 92, 58)
_PAPER, _EDGE, _INK, _RED = (255, 255, 255), (120, 120, 120), (0, 0, 0), (208, 24, 32)


def check_size(size: int) -> int:
    """Returns the size.

    Raises:
        EnvError: none that divides the big picture evenly on its grid.
    """
    if isinstance(size, bool) or size not in SIZES:
        raise EnvError(f"size is {size!r}, expected one of {', '.join(map(str, SIZES))} (pixels a side)")
    return size


def empty_frame(size: int) -> np.ndarray:
    """Returns a table without cards, (size, size, 3) uint8."""
    return np.full((size, size, 3), _TABLE, np.uint8)


def lay(frame: np.ndarray, sprite: np.ndarray, x: int, y: int) -> None:
    """Lays a sprite of the frame's own scale at a place of the big picture, which is a multiple of 30."""
    factor = BIG // len(frame)
    top, left = y // factor, x // factor
    height, width = sprite.shape[:2]
    frame[top : top + height, left : left + width] = sprite


@cache
def card(size: int, rank: int, suit: int) -> np.ndarray:
    """Returns a card as it is on a frame of this size, (90 / factor, 60 / factor, 3) uint8, not to be written to.

    Args:
        size: of the frame.
        rank: 1 (ace) to 13 (king); 0 for the back.
        suit: 0 to 3.
    """
    width, height = CARD
    picture = Image.new("RGB", CARD, _TABLE)
    pen = ImageDraw.Draw(picture)
    pen.rounded_rectangle((1, 1, width - 2, height - 2), 6, _PAPER, _EDGE, 1)
    if rank == 0:
        pen.rounded_rectangle((6, 6, width - 7, height - 7), 4, (40, 64, 150))
        for offset in range(-height, width, 8):
            pen.line((offset, height - 8, offset + height, 8), (120, 140, 210), 1)
        pen.rectangle((0, 0, 5, height), _PAPER)
        pen.rectangle((width - 6, 0, width, height), _PAPER)
    else:
        color = _RED if SUITS[suit] in ("hearts", "diamonds") else _INK
        pen.text((width / 2, 32), RANKS[rank - 1], color, _font(46 if rank != 10 else 40), anchor="mm")
        _suit(pen, SUITS[suit], width / 2, 70, color)
    return _reduced(picture, size)


@cache
def line_of_text(size: int, text: str, height: int = 60) -> np.ndarray:
    """Returns a line across a frame of this size, (height / factor, size, 3) uint8, not to be written to."""
    picture = Image.new("RGB", (BIG, height), _PAPER)
    ImageDraw.Draw(picture).text((BIG / 2, height / 2), text, _INK, _font(44), anchor="mm")
    return _reduced(picture, size)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _reduced(picture: Image.Image, size: int) -> np.ndarray:
    small = np.asarray(picture.reduce(BIG // size))
    small.flags.writeable = False
    return small


def _suit(pen: ImageDraw.ImageDraw, suit: str, x: float, y: float, color: tuple[int, int, int]) -> None:
    """Draws a suit around a point, some 22 pixels wide."""
    if suit == "diamonds":
        pen.polygon([(x, y - 13), (x + 10, y), (x, y + 13), (x - 10, y)], color)
    elif suit == "hearts":
        pen.ellipse((x - 11, y - 11, x, y), color)
        pen.ellipse((x, y - 11, x + 11, y), color)
        pen.polygon([(x - 11, y - 4), (x + 11, y - 4), (x, y + 12)], color)
    else:
        if suit == "spades":
            pen.polygon([(x, y - 13), (x - 11, y + 3), (x + 11, y + 3)], color)
            pen.ellipse((x - 11, y - 3, x, y + 8), color)
            pen.ellipse((x, y - 3, x + 11, y + 8), color)
        else:
            for left, top in ((-5, -12), (-11, -3), (1, -3)):
                pen.ellipse((x + left, y + top, x + left + 10, y + top + 10), color)
        pen.polygon([(x, y), (x - 5, y + 13), (x + 5, y + 13)], color)
