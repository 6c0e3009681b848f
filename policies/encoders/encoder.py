"""What a file of this folder gives, and what the small random encoders share.

The small ones have width 64 and two layers. At the library's initializer_range of 0.02 the last hidden state of a
policy from scratch hardly depends on the image and learning fails; with 0.15, and positions as large as the patches'
content, it learns.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, ViTImageProcessorPil

from manako.policies.errors import PolicyError
from manako.policies.room import check_frame_room

INITIALIZER_RANGE = 0.15
TRANSFORMER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


class Encoder(NamedTuple):
    """A vision encoder and what makes its pixels."""

    model: PreTrainedModel
    image_processor: Any


# frame shape, image_size, patch_size (None: chosen by the frame) -> a random encoder that sees such frames
BuildEncoder = Callable[[tuple[int, int, int], int | None, int | None], Encoder]
# a folder or a Hub id, and what else could have been named -> an encoder
LoadEncoder = Callable[[str, Iterable[str]], Encoder]


def sides(frame_shape: tuple[int, int, int], image_size: int | None, patch_size: int | None) -> tuple[int, int]:
    """Returns the sides in pixels of the square that a small encoder sees and of its patches.

    Raises:
        PolicyError: the image is no whole number of patches.
    """
    side = image_size or min(64, max(frame_shape[:2]))
    patch = patch_size or (16 if side >= 64 else 8)
    if image_size is None:
        side = max(patch, side // patch * patch)
    if side < patch or side % patch or patch < 2:
        raise PolicyError(f"image_size {side} is no multiple of patch_size {patch}: expected whole patches.")
    check_frame_room(side, patch, TRANSFORMER["hidden_size"], TRANSFORMER["num_attention_heads"])
    return side, patch


def random_encoder(config: PreTrainedConfig, side: int) -> Encoder:
    """Returns a random encoder of this configuration and a processor that resizes frames to `side` x `side` pixels."""
    encoder = AutoModel.from_config(config)
    for key, parameter in encoder.named_parameters():  # the library draws positions far smaller than patch contents
        if "position_embedding" in key:
            torch.nn.init.normal_(parameter, std=1.0)
    return Encoder(encoder, square_processor(side))


def square_processor(side: int) -> ViTImageProcessorPil:
    """Returns an image processor that resizes frames to `side` x `side` pixels, from about -2 to 2."""
    return ViTImageProcessorPil(
        size={"height": side, "width": side}, image_mean=[0.5, 0.5, 0.5], image_std=[0.25, 0.25, 0.25]
    )
