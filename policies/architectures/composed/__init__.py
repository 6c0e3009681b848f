"""Vision encoder -> adapter -> language model as one Hugging Face model, known to transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from manako.policies.architectures.composed.configuration import ManakoConfig
from manako.policies.architectures.composed.modeling import ManakoForConditionalGeneration, ManakoModel
from manako.policies.architectures.composed.processing import ManakoProcessor

AutoConfig.register(ManakoConfig.model_type, ManakoConfig, exist_ok=True)
AutoModel.register(ManakoConfig, ManakoModel, exist_ok=True)
AutoModelForImageTextToText.register(ManakoConfig, ManakoForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(ManakoConfig, ManakoForConditionalGeneration, exist_ok=True)  # TRL's DPO asks for it
AutoProcessor.register(ManakoConfig, ManakoProcessor, exist_ok=True)

__all__ = ["ManakoConfig", "ManakoForConditionalGeneration", "ManakoModel", "ManakoProcessor"]
