"""A small random EVA (arXiv:2211.07636) as BLIP-2 and MiniGPT-4 have it: EVA-CLIP's ViT, `Blip2VisionModel`."""

from transformers import AutoModel, Blip2VisionConfig, Blip2VisionModel

from manako.policies.encoders.encoder import INITIALIZER_RANGE, TRANSFORMER, Encoder, random_encoder, sides

AutoModel.register(Blip2VisionConfig, Blip2VisionModel, exist_ok=True)  # it is in no auto map of the library


def configuration(side: int, patch: int) -> Blip2VisionConfig:
    """Returns that of a small one, for images of `side` pixels in patches of `patch`."""
    return Blip2VisionConfig(**TRANSFORMER, image_size=side, patch_size=patch, initializer_range=INITIALIZER_RANGE)


def build(frame_shape: tuple[int, int, int], image_size: int | None, patch_size: int | None) -> Encoder:
    """Returns the encoder for such frames; see `BuildEncoder`."""
    side, patch = sides(frame_shape, image_size, patch_size)
    return random_encoder(configuration(side, patch), side)
