"""Gemma 3 (arXiv:2503.19786) and PaliGemma (arXiv:2407.07726): SigLIP -> projector -> Gemma.

Image tokens see each other both ways, which `token_type_ids` say. In PaliGemma the whole prompt does, and an answer's
tokens are of another type; its processor puts the image in front of the text and a line's end behind it.
"""

from typing import Any

from manako.policies.architectures.model import Model, plain
from manako.policies.architectures.templates import give_template, plain_template
from manako.policies.reading import SharedPrefix, WholePrompt


def name_parts(vlm: Any, processor: Any) -> Model:
    """Names the parts; see `manako.policies.architectures.name_parts`."""
    config = plain(vlm).config
    is_pali = config.model_type == "paligemma"
    placeholder = str(processor.image_token if is_pali else processor.boi_token)
    if is_pali:
        give_template(processor, plain_template("", processor.tokenizer.eos_token, first=placeholder, lead=""))
    return Model(
        vlm=vlm,
        processor=processor,
        encoder="model.vision_tower",
        adapter=("model.multi_modal_projector",),
        decoder="model.language_model",
        placeholder=placeholder,
        placeholder_id=config.image_token_id,
        reading=WholePrompt if is_pali else SharedPrefix,
        by_place=() if is_pali else ("token_type_ids",),
        answer_inputs={"token_type_ids": 1} if is_pali else {},
    )
