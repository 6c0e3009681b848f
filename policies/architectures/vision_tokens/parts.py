"""What the parts of the model of vision tokens are called, and how it is read."""

from typing import Any

from torch import Tensor

from manako.policies.architectures.composed.processing import IMAGE_TOKEN
from manako.policies.architectures.model import Model, plain
from manako.policies.architectures.vision_tokens.pretraining import Reconstruction
from manako.policies.reading import SharedPrefix


def name_parts(vlm: Any, processor: Any) -> Model:
    """Names the parts of a `VisionTokensForConditionalGeneration`; see `manako.policies.architectures.name_parts`."""
    return Model(
        vlm=vlm,
        processor=processor,
        encoder="model.vision_tower",
        adapter=("model.adapter",),
        decoder="model.language_model",
        placeholder=IMAGE_TOKEN,
        placeholder_id=plain(vlm).config.image_token_id,
        reading=SharedPrefix,
        image_counts=False,
        see=see,
        pretraining={"represent": Reconstruction},
        encoder_learns_alone=True,
        predicts_frames=True,
    )


def see(vlm: Any, pixels: Tensor) -> Tensor:
    """Returns the codes (B, P, 1) of pixels (B, 3, h, w)."""
    return vlm.model.get_vision_features(pixels)
