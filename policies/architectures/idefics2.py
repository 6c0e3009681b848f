"""Idefics2 (arXiv:2405.02246), Idefics3 (arXiv:2408.12637) and SmolVLM (arXiv:2504.05299): SigLIP -> connector -> LLM.

Idefics2's connector is a perceiver resampler; the others shuffle pixels into channels and project.
"""

from typing import Any

from manako.policies.architectures.any_vlm import find_placeholder
from manako.policies.architectures.model import Model, plain
from manako.policies.reading import SharedPrefix


def name_parts(vlm: Any, processor: Any) -> Model:
    """Names the parts; see `manako.policies.architectures.name_parts`."""
    placeholder, placeholder_id = find_placeholder(processor, plain(vlm))
    return Model(
        vlm=vlm,
        processor=processor,
        encoder="model.vision_model",
        adapter=("model.connector",),
        decoder="model.text_model",
        placeholder=placeholder,
        placeholder_id=placeholder_id,
        reading=SharedPrefix,
    )
