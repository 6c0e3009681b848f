"""BLIP-2 (arXiv:2301.12597) and InstructBLIP (arXiv:2305.06500): ViT -> Q-Former and projection -> a language model.

InstructBLIP's Q-Former also reads the instruction (`qformer_input_ids`). The language model is a decoder (OPT, Vicuna)
or an encoder-decoder (FLAN-T5). The processors write the query tokens' placeholders in front of the text themselves, so
the prompt's text holds none, and nothing stands before the image that samples could share. The query tokens are a bare
parameter: they learn with the adapter, but stay as loaded beside LoRA, whose files hold whole modules only.
"""

from typing import Any

from manako.policies.architectures.model import Model, plain
from manako.policies.reading import EncoderDecoder, WholePrompt


def name_parts(vlm: Any, processor: Any) -> Model:
    """Names the parts; see `manako.policies.architectures.name_parts`."""
    config = plain(vlm).config
    answers_alone = not config.use_decoder_only_language_model
    return Model(
        vlm=vlm,
        processor=processor,
        encoder="vision_model",
        adapter=("query_tokens", "qformer", "language_projection"),
        decoder="language_model",
        placeholder=None,
        placeholder_id=config.image_token_id,
        reading=EncoderDecoder if answers_alone else WholePrompt,
        answer_start=(config.text_config.decoder_start_token_id,) if answers_alone else (),
    )
