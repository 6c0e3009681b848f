"""Kosmos-2 (arXiv:2306.14824): CLIP -> latent queries -> image embeddings in the token stream of one decoder.

The processor writes the image's places in front of the text, `image_embeds_position_mask` says where they are.
"""

from typing import Any

from manako.policies.architectures.model import Model
from manako.policies.reading import WholePrompt


def name_parts(vlm: Any, processor: Any) -> Model:
    """Names the parts; see `manako.policies.architectures.name_parts`."""
    return Model(
        vlm=vlm,
        processor=processor,
        encoder="vision_model",
        adapter=("image_to_text_projection",),
        decoder="text_model",
        placeholder=None,
        placeholder_id=None,
        reading=WholePrompt,
    )
