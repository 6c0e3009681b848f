"""BLIP-2 as transformers has it (arXiv:2301.12597): ViT -> Q-Former and projection -> a decoder-only language model.

Its processor writes the query tokens' placeholders in front of the text itself, so the prompt's text holds none, and
nothing stands before the image that samples could share. The query tokens are a bare parameter: they learn with the
adapter, but stay as loaded beside LoRA, whose files hold whole modules only.
"""

from typing import Any

from torch import Tensor

from manako.policies.architectures.model import Model, plain
from manako.policies.errors import PolicyError
from manako.policies.reading import WholePrompt


def name_parts(vlm: Any, processor: Any) -> Model:
    """Names the parts of a `Blip2ForConditionalGeneration`; see `manako.policies.architectures.name_parts`.

    Raises:
        PolicyError: its language model is an encoder-decoder (the FLAN-T5 ones).
    """
    config = plain(vlm).config
    if not config.use_decoder_only_language_model:
        raise PolicyError(
            f"This BLIP-2 answers by a {config.text_config.model_type}, an encoder-decoder: expected one with a "
            "decoder-only language model, such as blip2-opt-2.7b."
        )
    return Model(
        vlm=vlm,
        processor=processor,
        encoder="vision_model",
        adapter=("query_tokens", "qformer", "language_projection"),
        decoder="language_model",
        placeholder=str(processor.image_token),  # an AddedToken
        placeholder_id=config.image_token_id,
        reading=WholePrompt,
        render=render,
        last_hidden=last_hidden,
    )


def render(system: str, instruction: str) -> str:
    """Returns the prompt's text; the processor writes the image's placeholders before it."""
    return f"{system}\n{instruction}\nAnswer:"


def last_hidden(outputs: Any) -> Tensor:
    """Returns the language model's last hidden states (B, L, D)."""
    return outputs.language_model_outputs.hidden_states[-1]
