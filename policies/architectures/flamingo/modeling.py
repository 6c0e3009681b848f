"""A resampler and tanh-gated cross-attention layers around any decoder; see the package for the figure.

Legend: B prompts, L tokens, M images a prompt at most, K visual tokens an image, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig

from manako.policies.adapters.resampler import Resampler
from manako.policies.architectures.composed.modeling import ManakoForConditionalGeneration, ManakoModel
from manako.policies.architectures.flamingo.configuration import FlamingoConfig
from manako.policies.errors import PolicyError

KEPT = "flamingo_images"  # where a cache of keys and values keeps its prompts' images


class Images(NamedTuple):
    """The images of a batch of prompts, and which of them each token sees."""

    visual: Tensor  # (B, M, K, D)
    seen: Tensor  # (B, L) number of the image that a token sees, from 1; 0: none before it

    @property
    def mask(self) -> Tensor:
        """Which keys each token sees (B, 1, L, M · K); all of them where it sees no image, for softmax's sake."""
        _, count, tokens, _ = self.visual.shape
        numbers = torch.arange(1, count + 1, device=self.seen.device).repeat_interleave(tokens)  # (M · K,)
        return ((self.seen[..., None] == numbers) | (self.seen[..., None] == 0))[:, None]


class GatedLayer(nn.Module):
    """Cross-attention to the images and a feed-forward half, each behind a gate that starts closed.

    Args:
        width: of the language model, D.
        heads: of the attention.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )
        self.feed_forward_gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor, images: Images) -> Tensor:
        """Returns hidden states (B, L, D) that have seen their images; the others come back as they are."""
        sees = (images.seen > 0)[..., None]  # (B, L, 1)
        visual = images.visual.flatten(1, 2)  # (B, M · K, D)
        query = self._split(self.query(self.norm(hidden)))  # (B, heads, L, D / heads)
        key, value = (self._split(part) for part in self.key_value(visual).chunk(2, dim=-1))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=images.mask)
        attended = self.out(attended.transpose(1, 2).flatten(2))  # (B, L, D)
        hidden = hidden + self.gate.tanh() * attended * sees
        return hidden + self.feed_forward_gate.tanh() * self.feed_forward(hidden) * sees

    def _split(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def layers_of(decoder: nn.Module, count: int) -> nn.ModuleList:
    """Returns a decoder's list of layers.

    Args:
        decoder: a base model of transformers.
        count: how many layers its configuration names.

    Raises:
        PolicyError: it has no such list, or several.
    """
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    inner = {part for found in lists for layer in found for part in layer.modules()}
    outermost = [found for found in lists if found not in inner]
    if len(outermost) != 1:
        raise PolicyError(
            f"{type(decoder).__name__} has {len(outermost)} lists of {count} layers: expected a decoder with one, such "
            "as Llama, Qwen2 or GPT-2, for the gated layers stand between them; choose another language model."
        )
    return outermost[0]


class FlamingoModel(ManakoModel):
    """Encoder, adapter, resampler, gated layers and language model without its LM head."""

    config: FlamingoConfig
    gives_text = False
    supports_gradient_checkpointing = False  # a layer that runs again in the backward pass would miss its gated one

    def __init__(self, config: FlamingoConfig) -> None:
        super().__init__(config)
        text: Any = config.text_config
        width, heads = text.hidden_size, text.num_attention_heads
        resampler = Idefics2PerceiverConfig(
            hidden_size=width,
            resampler_n_latents=config.num_latents,
            resampler_depth=config.resampler_depth,
            resampler_n_heads=heads,
            resampler_head_dim=width // heads,
            num_key_value_heads=heads,
            initializer_range=text.initializer_range,
        )
        self.resampler = Resampler(resampler)
        self._gated_places = config.gated_places(len(self._layers))
        self.gated_layers = nn.ModuleList(GatedLayer(width, heads) for _ in self._gated_places)
        self.post_init()

    def get_image_features(self, pixel_values: Tensor) -> Tensor:  # type: ignore[override]
        """Returns visual tokens (B, K, D) of pixels (B, 3, h, w)."""
        features = super().get_image_features(pixel_values)  # (B, P, D)
        return self.resampler(features, torch.ones(features.shape[:2], dtype=torch.long, device=features.device))

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        image_features: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Returns last hidden states (B, L, D) of token ids (B, L) with one placeholder an image, and pixels.

        Pixels (images, 3, h, w) come in the order of their placeholders, prompt after prompt. What a cache has seen of
        images stays with it: behind it, none of them comes again.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if image_features is not None:
            raise ValueError("image_features came: expected pixel_values, this model takes no stored features.")
        images = self._images(input_ids, inputs_embeds, pixel_values, getattr(past_key_values, KEPT, None))
        with self._between_layers(images):
            outputs = self.language_model(
                input_ids=input_ids,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                **kwargs,
            )
        if images is not None and outputs.past_key_values is not None:
            setattr(outputs.past_key_values, KEPT, images._replace(seen=images.seen[:, -1:]))
        return outputs

    def _images(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, pixel_values: Tensor | None, kept: Images | None
    ) -> Images | None:
        """The images of these prompts, those of their cache first; None where there are none."""
        if input_ids is None:
            if pixel_values is not None:
                raise ValueError("pixel_values need input_ids: their placeholders say where the image stands.")
            assert inputs_embeds is not None
            return None if kept is None else kept._replace(seen=kept.seen.expand(-1, inputs_embeds.shape[1]))
        is_image = input_ids == self.config.image_token_id  # (B, L)
        if pixel_values is None:
            return None if kept is None else kept._replace(seen=kept.seen.expand(-1, input_ids.shape[1]))
        if int(is_image.sum()) != len(pixel_values):
            raise ValueError(
                f"Images and image tokens do not match, tokens: {int(is_image.sum())}, images: {len(pixel_values)}"
            )
        found = self.get_image_features(pixel_values)  # (images, K, D)
        counts = is_image.sum(1)  # (B,)
        seen = is_image.cumsum(1)  # (B, L)
        filled = torch.arange(int(counts.max()), device=counts.device) < counts[:, None]  # (B, M)
        visual = found.new_zeros(*filled.shape, *found.shape[1:])  # (B, M, K, D)
        visual = visual.masked_scatter(filled[..., None, None], found)
        if kept is None:
            return Images(visual, seen)
        before = kept.visual.shape[1]  # a prompt without a new image goes on with the one that it saw
        return Images(torch.cat([kept.visual, visual], dim=1), torch.where(seen > 0, seen + before, kept.seen))

    @contextmanager
    def _between_layers(self, images: Images | None) -> Iterator[None]:
        """Inside the block, gated layers act on what enters the decoder's layers."""
        hooks = [
            self._layers[place].register_forward_pre_hook(partial(_through, gated, images), with_kwargs=True)
            for place, gated in zip(self._gated_places, self.gated_layers, strict=True)
            if images is not None
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @property
    def _layers(self) -> nn.ModuleList:
        text: Any = self.config.text_config
        return layers_of(self.language_model, text.num_hidden_layers)


def _through(gated: nn.Module, images: Images, layer: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """What a decoder's layer is given: the hidden states first, or by name."""
    if args:
        return (gated(args[0], images), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": gated(kwargs["hidden_states"], images)}


class FlamingoForConditionalGeneration(ManakoForConditionalGeneration):
    """The model with the language model's head."""

    config: FlamingoConfig
    supports_gradient_checkpointing = False
    kind = FlamingoModel
    visual_tokens_are_in_the_text = False
