"""Vision encoder -> adapter -> language model as one Hugging Face model, known to transformers' Auto classes."""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from manako.policies.architectures.composed.configuration import ManakoConfig
from manako.policies.architectures.composed.modeling import ManakoForConditionalGeneration, ManakoModel
from manako.policies.architectures.composed.processing import IMAGE_TOKEN, ManakoProcessor
from manako.policies.architectures.model import Model, plain
from manako.policies.reading import SharedPrefix

AutoConfig.register(ManakoConfig.model_type, ManakoConfig, exist_ok=True)
AutoModel.register(ManakoConfig, ManakoModel, exist_ok=True)
AutoModelForImageTextToText.register(ManakoConfig, ManakoForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(ManakoConfig, ManakoForConditionalGeneration, exist_ok=True)  # TRL's DPO asks for it
AutoProcessor.register(ManakoConfig, ManakoProcessor, exist_ok=True)

__all__ = ["ManakoConfig", "ManakoForConditionalGeneration", "ManakoModel", "ManakoProcessor", "name_parts"]


def name_parts(vlm: Any, processor: Any) -> Model:
    """Names the parts of a `ManakoForConditionalGeneration`; see `manako.policies.architectures.name_parts`."""
    return Model(
        vlm=vlm,
        processor=processor,
        encoder="model.vision_tower",
        adapter=("model.adapter",),
        decoder="model.language_model",
        placeholder=IMAGE_TOKEN,
        placeholder_id=plain(vlm).config.image_token_id,
        reading=SharedPrefix,
    )
