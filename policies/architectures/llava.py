"""LLaVA (arXiv:2304.08485) and those built like it: encoder -> projector -> the language model's token stream.

    frame ── CLIP's ViT ──► features (B, P, Dv) ── two matrices, GELU between ──► (B, P, D) ── language model

As small random parts, the composed model with the encoder `clip_vit` and LLaVA-1.5's (arXiv:2310.03744) adapter `mlp`,
and its two stages: the projector learns on captions while the rest stays, then projector and language model learn to
follow instructions.

    python experiments/run_sft.py --policy llava --stage align --output_dir runs/align
    python experiments/run_sft.py --policy runs/align/final --dataset data/goto --trainable adapter+language_model

`--vision_encoder` and `--language_model` put pretrained parts there. Left out of the preset: LLaVA's choice of the last
but one layer's features (it takes the last one's), and images of many tiles.

Models of the library (this file's `name_parts`): LLaVA-1.5, LLaVA-NeXT, LLaVA-OneVision, ViP-LLaVA, Pixtral, Mistral 3,
Aya Vision, InternVL. LLaVA-NeXT and LLaVA-OneVision also learn what ends a row of an image, a bare parameter of the
adapter.
"""

from typing import Any

from manako.policies.architectures.any_vlm import find_placeholder
from manako.policies.architectures.model import Model, plain
from manako.policies.reading import SharedPrefix


def name_parts(vlm: Any, processor: Any) -> Model:
    """Names the parts; see `manako.policies.architectures.name_parts`."""
    base = plain(vlm)
    placeholder, placeholder_id = find_placeholder(processor, base)
    row_end = ("model.image_newline",) if "model.image_newline" in dict(base.named_parameters()) else ()
    return Model(
        vlm=vlm,
        processor=processor,
        encoder="model.vision_tower",
        adapter=("model.multi_modal_projector", *row_end),
        decoder="model.language_model",
        placeholder=placeholder,
        placeholder_id=placeholder_id,
        reading=SharedPrefix,
    )
