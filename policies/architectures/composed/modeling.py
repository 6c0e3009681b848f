"""The composed VLM: vision encoder -> adapter -> causal language model, in the shape that Hugging Face tools expect.

Frames become patches in `vision_tower`, visual tokens in `adapter`, and take the place of the image placeholders among
the text embeddings; `language_model` decides. `generate`, PEFT, TRL's trainers and `save_pretrained` work on it
unchanged. An adapter that wants text is given the prompt's before its images, for each of them. Left out on purpose:
video.
"""

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModel, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from manako.policies.adapters import Adapter, Text, build_adapter
from manako.policies.architectures.composed.configuration import ManakoConfig
from manako.policies.architectures.composed.processing import ADAPTER_TEXT
from manako.policies.errors import PolicyError


def feature_width(vision_config: PreTrainedConfig) -> int:
    """Returns the encoder's width Dv: `hidden_size`, or the last of `hidden_sizes` (ConvNeXt, Swin)."""
    width = getattr(vision_config, "hidden_size", None) or (getattr(vision_config, "hidden_sizes", None) or [None])[-1]
    if not isinstance(width, int):
        raise PolicyError(
            f"The vision encoder {vision_config.model_type!r} names neither hidden_size nor hidden_sizes in its "
            "configuration: expected an encoder whose AutoModel returns hidden states."
        )
    return width


class ManakoPreTrainedModel(PreTrainedModel):
    """What both classes below share with transformers."""

    config: ManakoConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True


class ManakoModel(ManakoPreTrainedModel):
    """Encoder, adapter and language model without its LM head."""

    gives_text: ClassVar[bool] = True  # to an adapter that wants some

    def __init__(self, config: ManakoConfig) -> None:
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.adapter = self.make_adapter(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def make_adapter(self, config: Any) -> Adapter:
        """Returns a new adapter of the configuration's name."""
        return build_adapter(config.adapter, feature_width(config.vision_config), config.text_config.hidden_size)

    def get_input_embeddings(self) -> nn.Module:
        """Returns the language model's token embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's token embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        """Returns the language model."""
        return self.language_model

    def get_vision_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Returns a feature vector a patch (B, P, Dv) of pixels (B, 3, h, w), without class and register tokens."""
        hidden = self.vision_tower(pixel_values=pixel_values.to(self.dtype)).last_hidden_state
        if hidden.ndim == 4:  # (B, Dv, rows, columns), e.g. ConvNeXt
            return hidden.flatten(2).transpose(1, 2)  # (B, P, Dv)
        patch = getattr(self.config.vision_config, "patch_size", None)
        if isinstance(patch, int):
            patches = (pixel_values.shape[-2] // patch) * (pixel_values.shape[-1] // patch)
            if patches < hidden.shape[1]:  # tokens in front of the patches: class token, registers
                return hidden[:, hidden.shape[1] - patches :]
        return hidden

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        text_input_ids: torch.Tensor | None = None,
        text_attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Returns visual tokens (B, K, D) of pixels (B, 3, h, w), and of text where the adapter wants some."""
        text = self.text_for_adapter(text_input_ids, text_attention_mask)
        return self._adapt(self.get_vision_features(pixel_values), text)

    def _adapt(self, features: Any, text: Text | None) -> torch.Tensor:
        """Visual tokens (B, K, D) of features (B, P, Dv); an adapter that reads no text need not take any."""
        if text is None:
            return self.adapter(features)
        each = len(features) // len(text.mask)  # images of a prompt, which all read its text
        return self.adapter(features, Text(*(part.repeat_interleave(each, 0) for part in text)) if each > 1 else text)

    def text_for_adapter(
        self, text_input_ids: torch.Tensor | None, text_attention_mask: torch.Tensor | None
    ) -> Text | None:
        """Returns what the adapter reads of token ids (B, T) and their mask (B, T); None where it wants no text.

        Raises:
            ValueError: it wants some, and none came.
        """
        if not self.adapter.wants_text:
            return None
        if text_input_ids is None:
            raise ValueError(
                f"No text_input_ids came, but the adapter {self.config.adapter!r} reads the prompt's text: expected "
                "what the model's processor makes, all of it."
            )
        mask = torch.ones_like(text_input_ids) if text_attention_mask is None else text_attention_mask
        return Text(self.get_input_embeddings()(text_input_ids), mask.bool())

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        image_features: torch.Tensor | None = None,
        text_input_ids: torch.LongTensor | None = None,
        text_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Returns last hidden states (B, L, D) of token ids (B, L) with K placeholders an image, and pixels.

        In place of pixels it takes what `get_vision_features` made of them, `image_features` (B, P, Dv). An adapter
        that wants text reads `text_input_ids` (B, T).
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # (B, L, D)
        if pixel_values is not None or image_features is not None:
            if input_ids is None:
                raise ValueError("pixel_values need input_ids: their placeholders say where the image stands.")
            if pixel_values is not None:
                image_features = self.get_vision_features(pixel_values)  # (images, P, Dv)
            text = self.text_for_adapter(text_input_ids, text_attention_mask)
            visual = self._adapt(image_features, text)  # (images, K, D)
            is_image = input_ids == self.config.image_token_id  # (B, L)
            if int(is_image.sum()) != visual.shape[0] * visual.shape[1]:
                raise ValueError(
                    f"Image features and image tokens do not match, tokens: {int(is_image.sum())}, "
                    f"features: {visual.shape[0] * visual.shape[1]}"
                )
            inputs_embeds = inputs_embeds.masked_scatter(is_image.unsqueeze(-1), visual.to(inputs_embeds.dtype))
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            **kwargs,
        )


class ManakoForConditionalGeneration(ManakoPreTrainedModel, GenerationMixin):
    """The composed VLM with its LM head: `generate`, PEFT and TRL's trainers use it like any other VLM."""

    kind: ClassVar[type[ManakoModel]] = ManakoModel  # without the head
    visual_tokens_are_in_the_text: ClassVar[bool] = True  # a placeholder each; False: one placeholder an image

    def __init__(self, config: ManakoConfig) -> None:
        super().__init__(config)
        text_config: Any = config.text_config
        self.model = self.kind(config)
        self.lm_head = nn.Linear(text_config.hidden_size, text_config.vocab_size, bias=False)
        embeddings = self.get_input_embeddings()  # embed_tokens in a Llama, wte in a GPT-2
        name = next(name for name, module in self.named_modules() if module is embeddings)
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"}
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Returns the language model's token embeddings."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's token embeddings."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Returns the LM head."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Replaces the LM head."""
        self.lm_head = value

    def get_decoder(self) -> nn.Module:
        """Returns the language model."""
        return self.model.language_model

    def prepare_inputs_for_generation(self, *args: Any, is_first_iteration: bool = False, **kwargs: Any) -> Any:
        """Gives features and the adapter's text to the first step alone, as the library does with pixels."""
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in ("image_features", *ADAPTER_TEXT):
                kwargs.pop(name, None)
        return super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_features: torch.Tensor | None = None,
        text_input_ids: torch.LongTensor | None = None,
        text_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Returns logits (B, L or `logits_to_keep`, V) of token ids (B, L) and pixels; the loss too, with labels.

        `image_features` may stand for the pixels, and `text_input_ids` are the adapter's, see `ManakoModel.forward`.
        """
        text = zip(ADAPTER_TEXT, (text_input_ids, text_attention_mask), strict=True) if self.model.gives_text else ()
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            image_features=image_features,
            **dict(text),
            **kwargs,
        )
        hidden = outputs.last_hidden_state  # (B, L, D)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
