"""EVA and a Q-Former as one encoder that gives the K query features: what MiniGPT-4 (arXiv:2304.10592) keeps frozen.

    pixels ── EVA ──► (B, 1 + P, Dv) ── Q-Former, K queries ──► (B, K, width)

Small and random by name; for `--policy minigpt4` a folder brings both pretrained: a BLIP-2 of the library, or a run of
the preset `blip2`, of which the projection behind its Q-Former is left out.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Blip2VisionConfig,
    Blip2VisionModel,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput

from manako.policies.adapters.qformer import QFormerAdapter, qformer_config
from manako.policies.encoders import eva
from manako.policies.encoders.encoder import Encoder, random_encoder, sides
from manako.policies.errors import PolicyError
from manako.policies.pretrained import check_complete, check_found, quietly, refusal

LIBRARY_TYPE, OWN_TYPE = "blip-2", "manako"  # model types of folders that hold both


class EvaQFormerConfig(PreTrainedConfig):
    """EVA + Q-Former.

    Args:
        vision_config: of EVA.
        qformer_config: of the Q-Former, which reads no text.
        num_query_tokens: K.
        reads_class_token: whether the Q-Former sees EVA's class token, as in BLIP-2; the adapter `qformer` does not.
    """

    model_type = "manako_eva_qformer"
    sub_configs_defaults = {"vision_config": Blip2VisionConfig, "qformer_config": Blip2QFormerConfig}

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    qformer_config: dict[str, Any] | PreTrainedConfig | None = None
    num_query_tokens: int = 32
    reads_class_token: bool = True

    @property
    def hidden_size(self) -> int:
        """Width of a query's features."""
        qformer: Any = self.qformer_config
        return int(qformer.hidden_size)


class EvaQFormerModel(PreTrainedModel):
    """Both; parts and weights are called as in the library's BLIP-2."""

    config: EvaQFormerConfig
    base_model_prefix = "eva_qformer"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: EvaQFormerConfig) -> None:
        super().__init__(config)
        self.vision_model = Blip2VisionModel._from_config(config.vision_config)
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, config.hidden_size))
        self.qformer = Blip2QFormerModel._from_config(config.qformer_config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, EvaQFormerModel):  # all alike they would stay alike
            init.normal_(module.query_tokens)

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutput:
        """Returns the queries' features (B, K, width) of pixels (B, 3, h, w)."""
        features = self.vision_model(pixel_values=pixel_values).last_hidden_state  # (B, 1 + P, Dv)
        if not self.config.reads_class_token:
            features = features[:, 1:]
        queries = self.query_tokens.expand(len(features), -1, -1)
        return BaseModelOutput(self.qformer(queries, encoder_hidden_states=features).last_hidden_state)


AutoConfig.register(EvaQFormerConfig.model_type, EvaQFormerConfig, exist_ok=True)
AutoModel.register(EvaQFormerConfig, EvaQFormerModel, exist_ok=True)


def build(frame_shape: tuple[int, int, int], image_size: int | None, patch_size: int | None) -> Encoder:
    """Returns the encoder for such frames; see `BuildEncoder`."""
    side, patch = sides(frame_shape, image_size, patch_size)
    vision = eva.configuration(side, patch)
    config = EvaQFormerConfig(
        vision_config=vision,
        qformer_config=qformer_config(vision.hidden_size, vision.hidden_size),
        num_query_tokens=QFormerAdapter.NUM_QUERIES,
    )
    return random_encoder(config, side)


def load(name: str, others: Iterable[str] = ()) -> Encoder:
    """Takes EVA, Q-Former and queries out of a folder or a Hub id.

    Args:
        name: of a BLIP-2 of the library, whatever head it has, or of a policy with `eva` and `qformer`.
        others: what else could have been named, for the error's sentence.

    Raises:
        PolicyError: neither is there, or weights are missing.
    """
    places = f"expected {', '.join([*others, 'a folder'])} or a Hub id of a BLIP-2"
    check_found(name, "BLIP-2", places)
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with quietly():
            config: Any = AutoConfig.from_pretrained(name, trust_remote_code=False)
            _check_kind(name, config, places)
            if config.model_type == LIBRARY_TYPE:
                own = EvaQFormerConfig(
                    vision_config=config.vision_config,
                    qformer_config=config.qformer_config,
                    num_query_tokens=config.num_query_tokens,
                )
                model, loading = EvaQFormerModel.from_pretrained(name, config=own, **options)
            else:
                whole, loading = AutoModel.from_pretrained(name, config=config, trust_remote_code=False, **options)
                model = _of_policy(whole)
            processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # whatever a model's code says to files that do not fit
        raise refusal(f"The EVA of {name!r}", error, f"No BLIP-2 at {name!r}: {places} ({{error}}).") from error
    check_complete(name, loading, model.state_dict())
    return Encoder(model.eval(), processor)


def _check_kind(name: str, config: Any, places: str) -> None:
    """Raises PolicyError where a configuration is of no model with EVA and a Q-Former that reads no text."""
    came = f"a {config.model_type}"
    if config.model_type == LIBRARY_TYPE:
        return
    if config.model_type == OWN_TYPE:
        if config.adapter == "qformer" and isinstance(config.vision_config, Blip2VisionConfig):
            return
        came = f"a policy of {config.vision_config.model_type} and {config.adapter}"
    raise PolicyError(
        f"{name!r} is {came}: {places}, of the library or a run of --policy blip2 (eva and qformer), whose EVA and "
        "Q-Former are taken."
    )


def _of_policy(whole: Any) -> EvaQFormerModel:
    """EVA and Q-Former of a `ManakoModel`, in one."""
    adapter = whole.adapter
    model = EvaQFormerModel(
        EvaQFormerConfig(
            vision_config=whole.vision_tower.config,
            qformer_config=adapter.qformer.config,
            num_query_tokens=adapter.queries.shape[1],
            reads_class_token=False,
        )
    )
    model.vision_model.load_state_dict(whole.vision_tower.state_dict())
    model.qformer.load_state_dict(adapter.qformer.state_dict())
    with torch.no_grad():
        model.query_tokens.copy_(adapter.queries)
    return model
