"""ViLBERT (arXiv:1908.02265): a stream of words and a stream of patches that read each other in co-attention layers.

    python experiments/run_ppo.py --policy vilbert --env manako/GoTo-v0

    system, instruction, <|mask|> ─ words + positions ─ self-attention x l ─┐                ┌─ at <|mask|> ─ MLM head
                                                              (B, L, D)     ├─ co-attention ─┤               (B, V)
    frame ─ vision encoder ─ adapter + box ──────────── self-attention x r ─┘      x c       └─ not read
                                                              (B, K, D)

The streams are the library's LXMERT, which has ViLBERT's shape: `LxmertModel`, and the MLM head of
`LxmertForPreTraining`; `visual_feats` are patches, and `visual_pos` their boxes in the grid. Left out: the detector
that finds regions, streams of unequal width and depth; of the pretraining (`masked_pretraining.py`) masked regions.
"""

from typing import Any

import torch
from transformers import AutoConfig, LxmertConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.models.lxmert.modeling_lxmert import LxmertPredictionHeadTransform

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

__all__ = ["VilbertConfig", "VilbertForMaskedLM", "VilbertModel", "build_vlm", "name_parts"]


class VilbertConfig(ManakoConfig):
    """Vision encoder + adapter + LXMERT."""

    model_type = "manako_vilbert"
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=AutoConfig, model_type="vit"),
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="lxmert"),
    }


class VilbertModel(MaskedModel):
    """Two streams without their MLM head."""

    config: VilbertConfig

    def __init__(self, config: VilbertConfig) -> None:
        super().__init__(config)
        self.language_model.encoder.visn_fc.visn_fc = torch.nn.Identity()  # which the adapter is

    def encode(self, input_ids: torch.Tensor, mask: torch.Tensor, visual: torch.Tensor, boxes: torch.Tensor) -> Any:
        """Returns the states (B, L, D) of the text's stream."""
        return self.language_model(
            input_ids=input_ids,
            attention_mask=mask,
            visual_feats=visual,
            visual_pos=boxes.expand(len(visual), -1, -1),
        ).language_output


class VilbertForMaskedLM(MaskedVLM):
    """Two streams with their MLM head."""

    config: VilbertConfig

    def __init__(self, config: VilbertConfig) -> None:
        super().__init__(config, VilbertModel(config), LxmertPredictionHeadTransform(config.text_config))


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
    return build_masked("vilbert", _make, *parts)


def _make(vision_config: PreTrainedConfig, adapter: str, tokenizer: Any) -> MaskedVLM:
    text_config = LxmertConfig(
        **SMALL,
        initializer_range=0.1,
        vocab_size=len(tokenizer),
        l_layers=1,
        r_layers=1,
        x_layers=2,
        visual_feat_dim=feature_width(vision_config),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return VilbertForMaskedLM(VilbertConfig(vision_config=vision_config, text_config=text_config, adapter=adapter))


make_known(VilbertConfig, VilbertModel, VilbertForMaskedLM)
