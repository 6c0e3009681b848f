"""Florence-2 (arXiv:2311.06242): DaViT -> projector -> BART, an encoder-decoder.

The processor writes the image's places in front of the text; the decoder begins as the library's `generate` does.
"""

from typing import Any

from manako.policies.architectures.model import Model, plain
from manako.policies.reading import EncoderDecoder


def name_parts(vlm: Any, processor: Any) -> Model:
    """Names the parts; see `manako.policies.architectures.name_parts`."""
    base = plain(vlm)
    text, generation = base.config.text_config, base.generation_config
    start = generation.decoder_start_token_id or text.decoder_start_token_id
    first = generation.forced_bos_token_id
    return Model(
        vlm=vlm,
        processor=processor,
        encoder="model.vision_tower",
        adapter=("model.multi_modal_projector",),
        decoder="model.language_model",
        placeholder=None,
        placeholder_id=base.config.image_token_id,
        reading=EncoderDecoder,
        answer_start=(start,) if first is None else (start, first),
    )
