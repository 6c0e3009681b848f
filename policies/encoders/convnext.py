"""A small random ConvNeXt, a feature vector for each square of `patch_size` pixels like the transformers'."""

from transformers import ConvNextConfig

from manako.policies.encoders.encoder import INITIALIZER_RANGE, Encoder, random_encoder, sides


def build(frame_shape: tuple[int, int, int], image_size: int | None, patch_size: int | None) -> Encoder:
    """Returns the encoder for such frames; see `BuildEncoder`."""
    side, patch = sides(frame_shape, image_size, patch_size)
    halvings = 1 if patch < 16 else 2  # the stem takes patch / 2**halvings pixels, each later stage halves
    widths = [64] * (halvings + 1)
    config = ConvNextConfig(
        num_stages=len(widths),
        hidden_sizes=widths,
        depths=[1] * len(widths),
        patch_size=patch >> halvings,
        image_size=side,
        initializer_range=INITIALIZER_RANGE,
        layer_scale_init_value=1.0,
    )
    return random_encoder(config, side)
