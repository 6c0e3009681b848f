"""One file or folder an architecture: what its parts are called and how it is read.

To add a row: a file with `name_parts(vlm, processor) -> Model` and a line in `ROWS`. A model without a row is read by
`any_vlm`, which guesses the names.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manako.policies.architectures.model import Model

OWN = {  # model types -> modules or packages of this folder that make classes of ours known to transformers
    "kosmos-2": "kosmos2",  # its processor; the model is the library's
    "manako": "composed",
    "manako_flamingo": "flamingo",
    "manako_vision_tokens": "vision_tokens",
    "manako_uniter": "uniter",
    "manako_vilbert": "vilbert",
}
ROWS = {  # a configuration's model_type -> module of this folder
    "manako": "composed.parts",
    "manako_flamingo": "flamingo.parts",
    "manako_vision_tokens": "vision_tokens.parts",
    "manako_uniter": "uniter",
    "manako_vilbert": "vilbert",
    "blip-2": "blip2",
    "instructblip": "instructblip",
    "kosmos-2": "kosmos2",
    "idefics": "idefics",
    "idefics2": "idefics2",
    "idefics3": "idefics2",
    "smolvlm": "idefics2",
    "git": "git",
    "florence2": "florence2",
    "gemma3": "gemma",
    "paligemma": "gemma",
    "mllama": "mllama",
    "llava": "llava",
    "llava_next": "llava",
    "llava_onevision": "llava",
    "vipllava": "llava",
    "mistral3": "llava",
    "aya_vision": "llava",
    "internvl": "llava",
    "qwen2_vl": "qwen_vl",
    "qwen2_5_vl": "qwen_vl",
    "qwen3_vl": "qwen_vl",
    "qwen3_5": "qwen_vl",
    "glm4v": "qwen_vl",
}


def name_parts(vlm: Any, processor: Any) -> "Model":
    """Names the parts of a vision-language model by its architecture's row.

    Args:
        vlm: a model that `AutoModelForImageTextToText` loads, or a PEFT model around one.
        processor: its processor.

    Returns:
        Both, and what stands where in the model. A processor without a chat template is given a plain one.

    Raises:
        PolicyError: a model whose prompts have no place for an image, or that the row does not read.
    """
    from manako.policies.architectures.templates import give_template, plain_template

    row = ROWS.get(vlm.config.model_type, "any_vlm")  # PEFT hands on the configuration of the model inside
    model: Model = import_module(f"manako.policies.architectures.{row}").name_parts(vlm, processor)
    give_template(processor, plain_template(model.placeholder, processor.tokenizer.eos_token))
    return model
