"""Learned latents that gather the features by cross-attention, as in Flamingo; they may gather the instruction as well.

    K latents ─ cross-attention to [features, (text), latents] ─ feed-forward ─┐
    (B, K, D) ◄── norm ────────────────────────────────────────────────────────┘

The perceiver resampler of Flamingo (arXiv:2204.14198), by the library's `Idefics2PerceiverResampler`. Where a
Q-Former's queries attend to each other and to the image in turn, latents do both at once. `instruct_resampler` puts the
prompt's text beside the features.
"""

from typing import ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverResampler

from manako.policies.adapters.base import Adapter, Text
from manako.policies.adapters.qformer import heads_of, initializer_range, places, text_projection

LAYERS = 1  # from random weights two learn later


class Resampler(Idefics2PerceiverResampler):
    """The library's perceiver resampler; its latents are drawn, for all alike they would stay alike."""

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Resampler):
            init.normal_(module.latents)


class ResamplerAdapter(Adapter):
    """A resampler of the features alone; K = `NUM_LATENTS`.

    Attributes:
        proj: features to the language model's width, in which the resampler works.
        resampler: the library's model.
    """

    NUM_LATENTS: ClassVar[int] = 16

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__(vision_width, text_width)
        heads = heads_of(text_width)
        self.proj = nn.Linear(vision_width, text_width)
        self.resampler = Resampler(
            Idefics2PerceiverConfig(
                hidden_size=text_width,
                resampler_n_latents=self.NUM_LATENTS,
                resampler_depth=LAYERS,
                resampler_n_heads=heads,
                resampler_head_dim=text_width // heads,
                num_key_value_heads=heads,
                initializer_range=initializer_range(text_width),
            )
        )

    def forward(self, features: torch.Tensor, text: Text | None = None) -> torch.Tensor:
        """Returns visual tokens (B, K, D) of features (B, P, Dv)."""
        context = self.proj(features)  # (B, P, D)
        return self.resampler(context, context.new_ones(context.shape[:2], dtype=torch.long))


class InstructResamplerAdapter(ResamplerAdapter):
    """A resampler that reads the prompt's text.

    Attributes:
        text_proj: of the language model's embeddings, each scaled alike.
    """

    wants_text = True

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__(vision_width, text_width)
        self.text_proj = text_projection(text_width, text_width)

    def forward(self, features: torch.Tensor, text: Text | None = None) -> torch.Tensor:
        """Returns visual tokens (B, K, D) of features (B, P, Dv) and text."""
        assert text is not None, "the model gives text to an adapter that wants some"
        words = self.text_proj(text.embeddings) + places(text.mask, text.embeddings)  # (B, T, D)
        context = torch.cat([self.proj(features), words], dim=1)  # (B, P + T, D)
        seen = torch.cat([text.mask.new_ones(features.shape[:2]), text.mask], dim=1)
        return self.resampler(context, seen.long())
