"""What the parts of the Flamingo-like model are called, and how it is read."""

from typing import Any

from manako.policies.architectures.composed.processing import IMAGE_TOKEN
from manako.policies.architectures.model import Model, plain
from manako.policies.reading import SharedPrefix


def name_parts(vlm: Any, processor: Any) -> Model:
    """Names the parts of a `FlamingoForConditionalGeneration`; see `manako.policies.architectures.name_parts`."""
    return Model(
        vlm=vlm,
        processor=processor,
        encoder="model.vision_tower",
        adapter=("model.adapter", "model.resampler", "model.gated_layers"),
        decoder="model.language_model",
        placeholder=IMAGE_TOKEN,
        placeholder_id=plain(vlm).config.image_token_id,
        reading=SharedPrefix,
        image_counts=False,  # closed gates
        one_image=True,  # a token sees the last one before it
    )
