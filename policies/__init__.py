"""Policies decide: vision encoder -> adapter -> language model -> probabilities of actions.

Importing this package registers the composed model with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from .actions import ActionCodec
from .adapters import ADAPTERS, Adapter
from .configuration import ManakoConfig
from .errors import PolicyError
from .modeling import ManakoForConditionalGeneration, ManakoModel
from .policy import PolicyInputs, PolicyOutput, PolicySpec, VLMPolicy
from .presets import PRESETS, build_vlm
from .processing import ManakoProcessor
from .saving import PolicySource, load_policy, save_policy
from .training import parameter_table

AutoConfig.register(ManakoConfig.model_type, ManakoConfig, exist_ok=True)
AutoModel.register(ManakoConfig, ManakoModel, exist_ok=True)
AutoModelForImageTextToText.register(ManakoConfig, ManakoForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(ManakoConfig, ManakoForConditionalGeneration, exist_ok=True)  # TRL's DPO asks for it
AutoProcessor.register(ManakoConfig, ManakoProcessor, exist_ok=True)

__all__ = [
    "ADAPTERS",
    "PRESETS",
    "ActionCodec",
    "Adapter",
    "ManakoConfig",
    "ManakoForConditionalGeneration",
    "ManakoModel",
    "ManakoProcessor",
    "PolicyError",
    "PolicyInputs",
    "PolicyOutput",
    "PolicySource",
    "PolicySpec",
    "VLMPolicy",
    "build_vlm",
    "load_policy",
    "parameter_table",
    "save_policy",
]
