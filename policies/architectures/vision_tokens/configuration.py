"""Configurations of the frame tokenizer and of the model that reads its codes."""

import math

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from manako.policies.architectures.composed.configuration import ManakoConfig


class FrameTokenizerConfig(PreTrainedConfig):
    """A frame tokenizer.

    Args:
        image_size: side in pixels of the square that it sees.
        patch_size: side of the patches, of which each becomes a code.
        hidden_size: width of its layers; with 64, some seeds put two kinds of patches into one code.
        levels: values that each dimension of a code may have; their product is how many codes there are.
    """

    model_type = "manako_frame_tokenizer"

    image_size: int = 40
    patch_size: int = 8
    hidden_size: int = 256
    levels: tuple[int, ...] | list[int] = (8, 5, 5)

    @property
    def num_codes(self) -> int:
        """How many codes there are, C."""
        return math.prod(self.levels)

    @property
    def num_patches(self) -> int:
        """Codes of a frame, P."""
        return (self.image_size // self.patch_size) ** 2


class VisionTokensConfig(ManakoConfig):
    """Frame tokenizer + table of codes + language model."""

    model_type = "manako_vision_tokens"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type=FrameTokenizerConfig.model_type),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }

    adapter: str = "codes"
