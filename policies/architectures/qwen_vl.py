"""Qwen2-VL (arXiv:2409.12191), Qwen2.5-VL (arXiv:2502.13923) and Qwen3-VL: ViT with mergers -> the token stream.

Positions have three axes (time, height, width). The library keeps what it found of them from one call to the next;
here they are computed of each prompt (`get_rope_index`) wherever a prompt is read in two parts.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from manako.policies.architectures.any_vlm import find_placeholder
from manako.policies.architectures.model import Model, plain
from manako.policies.architectures.templates import give_template, plain_template
from manako.policies.reading import SharedPrefix


def name_parts(vlm: Any, processor: Any) -> Model:
    """Names the parts; see `manako.policies.architectures.name_parts`."""
    base = plain(vlm)
    placeholder, placeholder_id = find_placeholder(processor, base)
    around = f"<|vision_start|>{placeholder}<|vision_end|>"
    give_template(processor, plain_template(around, processor.tokenizer.eos_token))
    modules = dict(base.named_modules())
    mergers = ("model.visual.merger", "model.visual.deepstack_merger_list")
    return Model(
        vlm=vlm,
        processor=processor,
        encoder="model.visual",
        adapter=tuple(name for name in mergers if name in modules),
        decoder="model.language_model",
        placeholder=placeholder,
        placeholder_id=placeholder_id,
        reading=SharedPrefix,
        positions=positions,
    )


def positions(vlm: Any, given: Mapping[str, Tensor]) -> Tensor:
    """Returns the positions (3, B, L) of the tokens of whole prompts."""
    of_axes: Tensor = vlm.model.get_rope_index(
        given["input_ids"],
        mm_token_type_ids=given["mm_token_type_ids"],
        image_grid_thw=given["image_grid_thw"],
        attention_mask=given["attention_mask"],
    )[0]
    return of_axes.to(torch.int64)
