"""LLaVA (arXiv:2304.08485) and those built like it: encoder -> projector -> the language model's token stream.

LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, ViP-LLaVA, Pixtral, Mistral 3, Aya Vision, InternVL. LLaVA-NeXT and
LLaVA-OneVision also learn what ends a row of an image, a bare parameter of the adapter.
"""

from typing import Any

from manako.policies.architectures.any_vlm import find_placeholder
from manako.policies.architectures.model import Model, plain
from manako.policies.reading import SharedPrefix


def name_parts(vlm: Any, processor: Any) -> Model:
    """Names the parts; see `manako.policies.architectures.name_parts`."""
    base = plain(vlm)
    placeholder, placeholder_id = find_placeholder(processor, base)
    row_end = ("model.image_newline",) if "model.image_newline" in dict(base.named_parameters()) else ()
    return Model(
        vlm=vlm,
        processor=processor,
        encoder="model.vision_tower",
        adapter=("model.multi_modal_projector", *row_end),
        decoder="model.language_model",
        placeholder=placeholder,
        placeholder_id=placeholder_id,
        reading=SharedPrefix,
    )
