"""A small random vision tower of a CLIP."""

from transformers import CLIPVisionConfig

from manako.policies.encoders.encoder import INITIALIZER_RANGE, TRANSFORMER, Encoder, random_encoder, sides


def build(frame_shape: tuple[int, int, int], image_size: int | None, patch_size: int | None) -> Encoder:
    """Returns the encoder for such frames; see `BuildEncoder`."""
    side, patch = sides(frame_shape, image_size, patch_size)
    config = CLIPVisionConfig(**TRANSFORMER, image_size=side, patch_size=patch, initializer_range=INITIALIZER_RANGE)
    return random_encoder(config, side)
