"""Mllama, Llama 3.2 Vision (arXiv:2407.21783): the image enters by cross-attention layers between the decoder's own.

`cross_attention_mask` says which tokens see which tiles. Keys and values of the image are not of the token stream, so
whole prompts are read. The cross-attention layers lie inside the decoder: they learn with the language model, or by
LoRA.
"""

from typing import Any

from manako.policies.architectures.model import Model, plain
from manako.policies.reading import WholePrompt


def name_parts(vlm: Any, processor: Any) -> Model:
    """Names the parts; see `manako.policies.architectures.name_parts`."""
    placeholder = str(processor.image_token)
    return Model(
        vlm=vlm,
        processor=processor,
        encoder="model.vision_model",
        adapter=("model.multi_modal_projector",),
        decoder="model.language_model",
        placeholder=placeholder,
        placeholder_id=plain(vlm).config.image_token_index,
        reading=WholePrompt,
    )
