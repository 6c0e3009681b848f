"""GIT (arXiv:2205.14100): CLIP -> projection -> a BERT-like decoder whose sequence begins with the visual tokens.

The model puts the visual tokens in front itself. A prompt begins with [CLS] and has no [SEP] at its end, for an answer
goes on from it (as the library's own example for visual questions does).
"""

from typing import Any

from manako.policies.architectures.model import Model
from manako.policies.architectures.templates import give_template, plain_template
from manako.policies.reading import WholePrompt


def name_parts(vlm: Any, processor: Any) -> Model:
    """Names the parts; see `manako.policies.architectures.name_parts`."""
    tokenizer = processor.tokenizer
    give_template(processor, plain_template(None, tokenizer.sep_token, first=tokenizer.cls_token))
    return Model(
        vlm=vlm,
        processor=processor,
        encoder="git.image_encoder",
        adapter=("git.visual_projection",),
        decoder="git.encoder",
        placeholder=None,
        placeholder_id=None,
        reading=WholePrompt,
    )
