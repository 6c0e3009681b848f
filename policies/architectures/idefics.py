"""IDEFICS, the open form of Flamingo (arXiv:2204.14198): perceiver resampler, tanh-gated cross-attention, LLaMA.

`image_attention_mask` says which tokens see which image; the processor puts the image's place in front of the text.
Whole prompts are read, for the image is not in the token stream. The adapter is the resampler and the gated layers.
"""

from typing import Any

from manako.policies.architectures.model import Model, plain
from manako.policies.reading import WholePrompt


def name_parts(vlm: Any, processor: Any) -> Model:
    """Names the parts; see `manako.policies.architectures.name_parts`."""
    modules = dict(plain(vlm).named_modules())
    tokenizer = processor.tokenizer
    return Model(
        vlm=vlm,
        processor=processor,
        encoder="model.vision_model",
        adapter=tuple(
            name for name in ("model.perceiver_resampler", "model.gated_cross_attn_layers") if name in modules
        ),
        decoder="model.layers",
        placeholder=None,
        placeholder_id=tokenizer.convert_tokens_to_ids("<image>"),
        reading=WholePrompt,
        nests_images=False,  # nested ones come behind the text
    )
