"""BLIP-2 (arXiv:2301.12597): a Q-Former's learned queries ask a frozen encoder, and the language model reads them.

    frame ── EVA ──► features (B, P, Dv) ──┐ cross-attention
                                           ▼
    K queries ─ self-attention ─► queries ─► queries ── linear ──► (B, K, D) ── language model

As small random parts, the composed model with the encoder `eva` and the adapter `qformer`:

    python experiments/run_ppo.py --policy blip2
    python experiments/run_sft.py --policy blip2 --dataset data/goto --trainable full --loss actions

With `--vision_encoder FOLDER` it has the EVA of a BLIP-2, with `--language_model smollm2` a pretrained language model.
The paper's two stages come before acting: first the Q-Former learns of frames and captions by contrast, matching and
words (qformer_pretraining.py), then with the projection to say captions by the language model, which stays as it is:

    python experiments/run_sft.py --policy blip2 --stage represent --env manako/GoTo-v0 --output_dir runs/represent
    python experiments/run_sft.py --policy runs/represent --stage align --env manako/GoTo-v0 --output_dir runs/align
    python experiments/run_sft.py --policy runs/align --dataset data/goto --trainable full --loss actions

The preset's Q-Former sees the patches without the class token, as every adapter here does.

A model of the library (this file's `name_parts`, and InstructBLIP's, see instructblip.py) has a decoder (OPT, Vicuna)
or an encoder-decoder (FLAN-T5):

    python experiments/check_model.py Salesforce/blip2-opt-2.7b

The processors write the query tokens' placeholders in front of the text themselves, so the prompt's text holds none,
and nothing stands before the image that samples could share. The query tokens are a bare parameter: they learn with the
adapter, but stay as loaded beside LoRA, whose files hold whole modules only.
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
