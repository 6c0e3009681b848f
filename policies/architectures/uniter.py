"""UNITER (arXiv:1909.11740): words and patches in one stream of bidirectional layers; the answer stands for [MASK].

    python experiments/run_ppo.py --policy uniter --env manako/GoTo-v0

    system, instruction, <|mask|> ─ words + positions + type ─┐  (B, L, D)
                                                              ├─ LayerNorm ─ self-attention x n ─ (B, L + K, D)
    frame ─ vision encoder ─ adapter + type ──────────────────┘  (B, K, D)      at <|mask|> ─ MLM head ─ (B, V)

The stream is the library's VisualBERT, which has UNITER's shape: `VisualBertModel`, and the MLM head of
`VisualBertForPreTraining`. Where a patch is, the vision encoder's own positions say. Left out: the detector's regions
and their boxes; of the pretraining (`masked_pretraining.py`) masked regions and the alignment of words and regions.
"""

from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, VisualBertConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.visual_bert.modeling_visual_bert import VisualBertPredictionHeadTransform

from manako.policies.architectures.composed.configuration import ManakoConfig
from manako.policies.architectures.composed.modeling import feature_width
from manako.policies.architectures.masked import (
    SMALL,
    MaskedModel,
    MaskedProcessor,
    MaskedVLM,
    build_masked,
    make_known,
    name_parts,
)

__all__ = ["UniterConfig", "UniterForMaskedLM", "UniterModel", "build_vlm", "name_parts"]


class UniterConfig(ManakoConfig):
    """Vision encoder + adapter + VisualBERT."""

    model_type = "manako_uniter"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="visual_bert"),
    }


class UniterModel(MaskedModel):
    """One stream without its MLM head."""

    config: UniterConfig

    def __init__(self, config: UniterConfig) -> None:
        super().__init__(config)
        self.language_model.embeddings.visual_projection = torch.nn.Identity()  # which the adapter is

    def encode(self, input_ids: torch.Tensor, mask: torch.Tensor, visual: torch.Tensor, boxes: torch.Tensor) -> Any:
        """Returns the states (B, L, D) of the text, which stands before the patches."""
        return self.language_model(
            input_ids=input_ids,
            attention_mask=mask,
            visual_embeds=visual,
            visual_attention_mask=mask.new_ones(visual.shape[:2]),
        ).last_hidden_state[:, : input_ids.shape[1]]


class UniterForMaskedLM(MaskedVLM):
    """One stream with its MLM head."""

    config: UniterConfig

    def __init__(self, config: UniterConfig) -> None:
        super().__init__(config, UniterModel(config), VisualBertPredictionHeadTransform(config.text_config))


def build_vlm(
    vision_encoder: str,
    adapter: str,
    language_model: str | None,
    frame_shape: tuple[int, int, int],
    image_size: int | None = None,
    patch_size: int | None = None,
    seed: int = 0,
) -> tuple[MaskedVLM, MaskedProcessor]:
    """Builds a small random one; see `build_masked`."""
    parts = (vision_encoder, adapter, language_model, frame_shape, image_size, patch_size, seed)
    return build_masked("uniter", _make, *parts)


def _make(vision_config: PreTrainedConfig, adapter: str, tokenizer: Any) -> MaskedVLM:
    text_config = VisualBertConfig(
        **SMALL,
        initializer_range=0.25,
        vocab_size=len(tokenizer),
        num_hidden_layers=2,
        visual_embedding_dim=feature_width(vision_config),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return UniterForMaskedLM(UniterConfig(vision_config=vision_config, text_config=text_config, adapter=adapter))


make_known(UniterConfig, UniterModel, UniterForMaskedLM)
