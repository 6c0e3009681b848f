"""What `uniter.py` and `vilbert.py` share: an encoder-only model that answers where its prompt ends with [MASK].

    prompt ... <|assistant|> <|mask|>  ─ words, positions ─┐
    frame ─ vision encoder ─ adapter ──────────────────────┴─ bidirectional encoder ─► the state at <|mask|>
                                                              ─ the MLM head's layer ─► its rows ─► logits (B, L, V)

The image is a stream of its own, not a part of the text. Every place sees every other, so nothing of a prompt can be
kept for the next one, and the model says one token: it can neither `generate` nor spell an answer of several tokens.

Masked words and image-text matching are learned by `run_sft.py --stage align`, see `masked_pretraining.py`. Left out:
the detector whose regions both papers read (the frame's patches stand for them), and tasks about regions.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
)
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput
from transformers.processing_utils import ProcessorMixin

from manako.policies.architectures.composed.build import check_adapter, copy_weights, count_image_tokens
from manako.policies.architectures.composed.configuration import ManakoConfig
from manako.policies.architectures.composed.modeling import ManakoModel, ManakoPreTrainedModel
from manako.policies.architectures.masked_pretraining import MaskedPretraining
from manako.policies.architectures.model import Model
from manako.policies.encoders import build_encoder
from manako.policies.errors import PolicyError
from manako.policies.language_models.tiny_llama import tiny_tokenizer
from manako.policies.reading import WholePrompt

MASK_TOKEN = "<|mask|>"
TEMPLATE = (
    "{%- for message in messages -%}{{ '<|' + message['role'] + '|>' }}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>" + MASK_TOKEN + "' }}{%- endif -%}"
)
SMALL = {  # of the small random models
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "tie_word_embeddings": False,
}
# The library draws embeddings so small that the state at the mask hardly depends on words and places. The same holds
# of layers: each row says its initializer_range. UNITER learns by PPO alone where exchanging the frame, or the
# instruction, changes that state by half of its size (.25), and not by a tenth (.15). ViLBERT does not learn so at any,
# and clones an expert best from small layers: of GoTo's moves 97 % right at .1 after 500 steps, 93 at .2, 73 at .35.
WORD_STD, PLACE_STD = 1.0, 0.5
HEAD_SCALE = 0.1  # the first policy is nearly uniform, so that PPO explores


class MaskedProcessor(ProcessorMixin):
    """Image processor and tokenizer side by side: no token of the text stands for an image.

    Args:
        image_processor: any of transformers' image processors that return `pixel_values` (B, 3, h, w).
        tokenizer: of the text, with a mask token.
        chat_template: Jinja template that ends a prompt with the mask token.
    """

    def __init__(
        self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


class MaskedModel(ManakoModel):
    """Encoder, adapter and the library's bidirectional model, called `language_model`, without its MLM head.

    Where the library projects the features of regions to its width, the adapter does.
    """

    gives_text = False

    _supports_flash_attn = False
    _supports_sdpa = False
    _supports_attention_backend = False
    supports_gradient_checkpointing = False

    def __init__(self, config: ManakoConfig) -> None:
        super().__init__(config)
        self.language_model.pooler = nn.Identity()  # matching has a head of its own, see masked_pretraining.py

    @abstractmethod
    def encode(self, input_ids: torch.Tensor, mask: torch.Tensor, visual: torch.Tensor, boxes: torch.Tensor) -> Any:
        """Returns the states (B, L, D) of the text.

        Args:
            input_ids: (B, L).
            mask: (B, L), 1 where text is.
            visual: visual tokens (B, K, D).
            boxes: where in the frame each of them is, (K, 4).
        """

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
    ) -> BaseModelOutput:
        """Returns last hidden states (B, L, D) of token ids (B, L) and pixels (B, 3, h, w); nothing is ever cached."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return BaseModelOutput(last_hidden_state=self.encode(input_ids, mask, *self.see(pixel_values)))

    def see(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns visual tokens (B, K, D) of pixels (B, 3, h, w), and where in the frame each of them is, (K, 4)."""
        visual = self.get_image_features(pixel_values)
        return visual, grid_boxes(visual.shape[1], pixel_values.shape[-2], pixel_values.shape[-1]).to(visual)


class MaskedVLM(ManakoPreTrainedModel):
    """A `MaskedModel` with its MLM head.

    Args:
        config: both parts' and the adapter's.
        model: of this configuration.
        transform: the MLM head's layer before its rows.
    """

    _supports_flash_attn = False
    _supports_sdpa = False
    _supports_attention_backend = False
    supports_gradient_checkpointing = False

    def __init__(self, config: ManakoConfig, model: MaskedModel, transform: nn.Module) -> None:
        super().__init__(config)
        text_config: Any = config.text_config
        self.model = model
        self.transform = transform
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embeddings."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embeddings."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Returns the rows of the MLM head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replaces the rows of the MLM head."""
        self.lm_head = value

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        use_cache: bool | None = None,
    ) -> MaskedLMOutput:
        """Returns logits (B, L, V) of what stands at each place of the text, given all others and the frame."""
        hidden = self.model(input_ids, pixel_values, attention_mask).last_hidden_state  # (B, L, D)
        return MaskedLMOutput(logits=self.read_words(hidden))

    def read_words(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns logits (..., V) of states (..., D)."""
        return self.lm_head(self.transform(hidden))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Is what a masked reading cannot do.

        Raises:
            PolicyError: always.
        """
        raise PolicyError(
            f"{type(self).__name__} cannot generate: it says one token, at {MASK_TOKEN}; expected a causal model for "
            "longer answers, such as the preset tiny."
        )


def grid_boxes(count: int, height: int, width: int) -> torch.Tensor:
    """Returns boxes (K, 4) of left, top, right and bottom in [0, 1].

    Args:
        count: of visual tokens, K; row by row of a grid of squares, or else each of them is of the whole frame.
        height: of the pixels.
        width: of the pixels.
    """
    rows = max(1, round((count * height / width) ** 0.5))
    columns = count // rows
    if rows * columns != count:
        return torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat(count, 1)
    places = torch.arange(count)
    left, top = places % columns / columns, places // columns / rows
    return torch.stack([left, top, left + 1 / columns, top + 1 / rows], -1)


def name_parts(vlm: Any, processor: Any) -> Model:
    """Names the parts; see `manako.policies.architectures.name_parts`."""
    return Model(
        vlm=vlm,
        processor=processor,
        encoder="model.vision_tower",
        adapter=("model.adapter",),
        decoder="model.language_model.encoder",  # where LoRA goes; it encodes
        placeholder=None,
        placeholder_id=None,
        reading=WholePrompt,
        one_token_answers=True,
        pretraining={"align": MaskedPretraining},
    )


def make_known(config: type[ManakoConfig], model: type[MaskedModel], vlm: type[MaskedVLM]) -> None:
    """Makes a row known to transformers' Auto classes."""
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModel.register(config, model, exist_ok=True)
    AutoModelForImageTextToText.register(config, vlm, exist_ok=True)
    AutoProcessor.register(config, MaskedProcessor, exist_ok=True)


def build_masked(
    name: str,
    make: Callable[[PreTrainedConfig, str, Any], MaskedVLM],
    vision_encoder: str,
    adapter: str,
    language_model: str | None,
    frame_shape: tuple[int, int, int],
    image_size: int | None,
    patch_size: int | None,
    seed: int,
) -> tuple[MaskedVLM, MaskedProcessor]:
    """Builds a small random model of a row.

    Args:
        name: of its preset.
        make: the encoder's configuration, the adapter's name and the tokenizer to the row's model.
        vision_encoder: see `manako.policies.architectures.composed.build.build_vlm`, as for all that follow.
        adapter: a key of `manako.policies.adapters.ADAPTERS`.
        language_model: None, for it has none.
        frame_shape: (H, W, 3).
        image_size: see `manako.policies.encoders.build_encoder`.
        patch_size: see `manako.policies.encoders.build_encoder`.
        seed: of the random weights.

    Returns:
        The model in evaluation mode and its processor.

    Raises:
        PolicyError: a language model, an unknown name, parts or sizes that do not fit.
    """
    if language_model is not None:
        raise PolicyError(
            f"--language_model {language_model!r} came, but {name} has no language model of its own to replace: its "
            "text is read by the model that reads the frame, leave it out."
        )
    check_adapter(adapter, MaskedModel)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
        encoder, image_processor = build_encoder(vision_encoder, frame_shape, image_size, patch_size)
        vlm = make(encoder.config, adapter, tokenizer)
        _draw(vlm)
    copy_weights(encoder, vlm.model.vision_tower)
    vlm.eval()
    model: Any = vlm  # whose frames are counted as those of a composed one
    vlm.config.num_image_tokens = count_image_tokens(vision_encoder, model, image_processor, frame_shape)
    return vlm, MaskedProcessor(image_processor, tokenizer, chat_template=TEMPLATE)


@torch.no_grad()
def _draw(vlm: MaskedVLM) -> None:
    """Draws embeddings large enough that the state at the mask depends on the text, and a small head."""
    for name, table in vlm.model.language_model.embeddings.named_children():
        if isinstance(table, nn.Embedding):
            nn.init.normal_(table.weight, std=WORD_STD if name == "word_embeddings" else PLACE_STD)
            if table.padding_idx is not None:
                table.weight[table.padding_idx].zero_()
    vlm.lm_head.weight.mul_(HEAD_SCALE)
