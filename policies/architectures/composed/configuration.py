"""Configuration of the composed vision-language model: three parts, one field each.

`vision_config` and `text_config` are the configurations of any encoder that `AutoModel` loads and any language model
that `AutoModelForCausalLM` loads; `adapter` names the module between them (see `manako.policies.adapters`).
"""

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class ManakoConfig(PreTrainedConfig):
    """Vision encoder + adapter + language model.

    Args:
        vision_config: configuration of the vision encoder, or its `to_dict()` with a `model_type`.
        text_config: configuration of the language model, or its `to_dict()` with a `model_type`.
        adapter: name of the adapter, a key of `manako.policies.adapters.ADAPTERS`.
        image_token_id: id of the placeholder token that visual tokens replace.
        num_image_tokens: visual tokens of one image, K.
    """

    model_type = "manako"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama"),
    }
    auto_map: ClassVar[dict[str, str]] = {}  # TRL's DPO trainer reads it when it copies the model as its reference

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    text_config: dict[str, Any] | PreTrainedConfig | None = None
    adapter: str = "mlp"
    image_token_id: int = 0
    num_image_tokens: int = 1
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        text_config: Any = self.text_config
        self.tie_word_embeddings = bool(self.tie_word_embeddings or text_config.tie_word_embeddings)
