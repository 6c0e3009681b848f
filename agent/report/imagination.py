"""Imagined frames beside real ones: how often they are the same, and both as a GIF. No torch here.

A frame is compared by its codes, K of them; a frame counts as right where all are. Copying the frame before, which is
right wherever nothing moved, is the row to beat.

Legend: F frames, T steps, K codes of a frame.
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from manako.agent.errors import TrainingError
from manako.agent.report.figures import scaled_size
from manako.agent.report.statistics import Interval, wilson_interval

_MARGIN, _LINE, _BORDER = 12, 20, 4  # px
_PAPER, _INK, _RIGHT, _WRONG = "#ffffff", "#1b1f24", "#1f7a4d", "#b3362b"
_HOLD = 3  # the last frame stays this many times as long


class Agreement(NamedTuple):
    """How often said frames were the real ones."""

    frames: int
    right: int  # of them, every code
    changed: int  # codes that are not those of the frame before
    changed_right: int

    @property
    def interval(self) -> Interval:
        """95 % Wilson interval of the share of whole frames."""
        return wilson_interval(self.right, self.frames)

    def summary(self) -> dict[str, Any]:
        """Returns numbers for JSON; None where no code ever changed."""
        return {
            "frames": self.frames,
            "whole_frames": self.right / self.frames,
            "whole_frames_ci95": list(self.interval),
            "changed_cells": self.changed,
            "changed_cells_right": self.changed_right / self.changed if self.changed else None,
        }


def agreement(said: np.ndarray, real: np.ndarray, before: np.ndarray) -> Agreement:
    """Returns how often frames are right.

    Args:
        said: (F, K) codes that were said.
        real: (F, K) codes of the frames that came.
        before: (F, K) codes of the frames before them.

    Raises:
        TrainingError: no frames, or unequal shapes.
    """
    if not len(real) or not said.shape == real.shape == before.shape:
        raise TrainingError(
            f"Codes of shapes {said.shape}, {real.shape} and {before.shape} came: expected equal ones of at least one "
            "frame."
        )
    same, changed = said == real, real != before  # (F, K)
    return Agreement(len(real), int(same.all(1).sum()), int(changed.sum()), int((same & changed).sum()))


class Imagined(NamedTuple):
    """One episode as it was played and as it was imagined from its first frame."""

    real: Sequence[np.ndarray]  # T + 1 frames (H, W, 3) uint8
    imagined: Sequence[np.ndarray]  # T + 1 frames (h, w, 3) uint8; the first is the real one, drawn of its codes
    right: Sequence[bool]  # T + 1
    actions: Sequence[str]  # T names
    instruction: str


def imagination_gif(episodes: Sequence[Imagined], path: Path | str, fps: float = 2) -> None:
    """Draws episodes step by step, the real frame on the left, the imagined one on the right in green or red.

    Args:
        episodes: at least one.
        path: the GIF to write.
        fps: steps shown per second.

    Raises:
        TrainingError: no episodes.
    """
    from PIL import Image, ImageDraw, ImageFont

    if not episodes:
        raise TrainingError(f"No episodes for {path}: expected at least one, so play one before drawing.")
    sizes = [scaled_size(np.shape(frame)) for episode in episodes for frame in (*episode.real, *episode.imagined)]
    wide, high = max(width for width, _ in sizes), max(height for _, height in sizes)
    size = 2 * wide + 3 * _MARGIN, high + 3 * _LINE + 3 * _MARGIN
    font = ImageFont.load_default(14)
    pictures, durations = [], []
    for number, episode in enumerate(episodes, 1):
        steps = len(episode.actions)
        for t in range(steps + 1):
            picture = Image.new("RGB", size, _PAPER)
            draw = ImageDraw.Draw(picture)
            head = f"episode {number} of {len(episodes)}  ·  step {t} of {steps}"
            action = f"after {episode.actions[t - 1]}" if t else "start"
            draw.text((_MARGIN, _MARGIN), f"{head}  ·  {action}", _INK, font)
            draw.text((_MARGIN, _MARGIN + _LINE), episode.instruction[:80], _INK, font)
            top = 2 * _MARGIN + 3 * _LINE
            for column, (name, frame) in enumerate((("real", episode.real[t]), ("imagined", episode.imagined[t]))):
                left = _MARGIN + column * (wide + _MARGIN)
                color = _INK if not column or not t else _RIGHT if episode.right[t] else _WRONG
                draw.text((left, top - _LINE), name, color, font)
                shown = Image.fromarray(frame).resize((wide, high), Image.Resampling.NEAREST)
                picture.paste(shown, (left, top))
                if column:
                    draw.rectangle((left, top, left + wide - 1, top + high - 1), outline=color, width=_BORDER)
            pictures.append(picture)
            durations.append(round(1000 / fps) * (_HOLD if t == steps else 1))
    first, *others = [picture.quantize(256, dither=Image.Dither.NONE) for picture in pictures]
    stored = BytesIO()
    first.save(stored, format="GIF", save_all=True, append_images=others, duration=durations, loop=0, disposal=1)
    Path(path).write_bytes(stored.getvalue())
