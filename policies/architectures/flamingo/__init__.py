"""Flamingo (arXiv:2204.14198): the image enters between the layers of a language model, by gates that start closed.

    frame ── encoder ── adapter ── perceiver resampler ──►  K visual tokens an image
                                                                 │ keys, values
                                           ┌─────────────────────┴─┐
    "... <image> ..." ── embeddings ──► gated layer ─► layer ─► gated layer ─► layer ─► ... ─► LM head

    gated layer:  h = h + tanh(gate) · cross-attention(h, the last image before this token)
                  h = h + tanh(gate') · feed-forward(h)

The gates start at 0, so that a new model's answers are the language model's own, to the last bit. A prompt holds one
`<image>` an image, which stays a token of the text; a token sees the last image before it, and no token before the
first `<image>` sees any. The decoder is any that has one list of layers, and it knows nothing of the gated ones: they
stand outside and act on what enters its layers.

    python experiments/run_ppo.py --policy flamingo

Closed gates let no gradient through: at the first step only they learn, from the second one everything does.

Left out: video (frames have no time embedding), the paper's training on pages with many images, gradient
checkpointing. Otherwise than in the paper, the feed-forward half of a gated layer leaves tokens without an image alone,
too, so that a text without an image is always answered as the language model alone would.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from manako.policies.architectures.composed.processing import ManakoProcessor
from manako.policies.architectures.flamingo.configuration import FlamingoConfig
from manako.policies.architectures.flamingo.modeling import FlamingoForConditionalGeneration, FlamingoModel

AutoConfig.register(FlamingoConfig.model_type, FlamingoConfig, exist_ok=True)
AutoModel.register(FlamingoConfig, FlamingoModel, exist_ok=True)
AutoModelForImageTextToText.register(FlamingoConfig, FlamingoForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(FlamingoConfig, FlamingoForConditionalGeneration, exist_ok=True)  # TRL's DPO asks for it
AutoProcessor.register(FlamingoConfig, ManakoProcessor, exist_ok=True)

__all__ = ["FlamingoConfig", "FlamingoForConditionalGeneration", "FlamingoModel"]
