"""What the parts of the model of vision tokens are called, and how it is read: as the composed one, by codes."""

from typing import Any

from manako.policies.architectures.composed import parts as composed
from manako.policies.architectures.model import Model
from manako.policies.architectures.vision_tokens.pretraining import Reconstruction


def name_parts(vlm: Any, processor: Any) -> Model:
    """Names the parts of a `VisionTokensForConditionalGeneration`; see `manako.policies.architectures.name_parts`."""
    return composed.name_parts(vlm, processor)._replace(
        pretraining={"represent": Reconstruction}, encoder_learns_alone=True, predicts_frames=True
    )
