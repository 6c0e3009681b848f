"""Frames as a server is sent them: PNG, scaled up by a whole factor, since small pictures are hard to see."""

import base64
import io

import numpy as np
from PIL import Image

# The highest counts that are published for a picture (gpt-4o-mini: a base, and each tile of 512 x 512 pixels). Models
# that count patches of 28 or 32 pixels stay below.
BASE_TOKENS, TILE_TOKENS, TILE = 2_833, 5_667, 512


def scaled_up(frame: np.ndarray, side: int) -> np.ndarray:
    """Returns a frame (H, W, 3) whose shorter side has at least `side` pixels, each pixel k times k.

    Args:
        frame: (H, W, 3) uint8.
        side: pixels; a larger frame stays as it is.
    """
    factor = max(1, -(-side // min(frame.shape[:2])))
    return frame.repeat(factor, axis=0).repeat(factor, axis=1)


def data_url(frame: np.ndarray, side: int) -> str:
    """Returns the scaled frame as a data URL of a PNG file, the same bytes for the same frame."""
    buffer = io.BytesIO()
    Image.fromarray(scaled_up(frame, side)).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def most_tokens(frame_shape: tuple[int, ...], side: int) -> int:
    """Returns an upper bound of the tokens that a server counts for such a frame, once it is scaled up."""
    factor = max(1, -(-side // min(frame_shape[:2])))
    tiles = -(-frame_shape[0] * factor // TILE) * -(-frame_shape[1] * factor // TILE)
    return BASE_TOKENS + TILE_TOKENS * tiles
