"""Learned queries that ask the features by cross-attention, as in BLIP-2; they may read the instruction first.

    K queries ─┐
               ├─ self-attention ─ queries: cross-attention to the features (B, P, Dv) ─┐ x 2
    text ──────┘  (instruct_qformer alone)                                              │
                                        K queries ◄─────────────────────────────────────┘─ linear ─► (B, K, D)

`qformer` is BLIP-2's (arXiv:2301.12597): what it asks does not depend on the prompt. `instruct_qformer` is
InstructBLIP's (arXiv:2305.06500): queries and text see each other, so the instruction decides what is asked of the
image. The layers are the library's `Blip2QFormerModel`. Other than in the papers the text is embedded by the language
model's own table, plus sinusoidal positions, so that there is no second tokenizer and no longest text.
"""

import math
from typing import ClassVar

import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from manako.policies.adapters.base import Adapter, Text

WIDEST = 768  # BLIP-2's; a smaller language model has a Q-Former of its own width
LAYERS = 2  # text sees by the second what queries saw in the first, as BLIP-2's matching and captions need it


class QFormerAdapter(Adapter):
    """A Q-Former of the features alone; K = `NUM_QUERIES`.

    Attributes:
        queries: (1, K, width).
        qformer: the library's model.
        proj: its width to the language model's.
    """

    NUM_QUERIES: ClassVar[int] = 16

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__(vision_width, text_width)
        width = min(text_width, WIDEST)
        self.qformer = Blip2QFormerModel(qformer_config(vision_width, width, self.wants_text))
        self.queries = nn.Parameter(torch.randn(1, self.NUM_QUERIES, width))
        self.proj = nn.Linear(width, text_width)

    def forward(self, features: torch.Tensor, text: Text | None = None) -> torch.Tensor:
        """Returns visual tokens (B, K, D) of features (B, P, Dv)."""
        queries = self.queries.expand(len(features), -1, -1)
        return self.proj(self.qformer(queries, encoder_hidden_states=features).last_hidden_state)


class InstructQFormerAdapter(QFormerAdapter):
    """A Q-Former whose queries read the prompt's text.

    Attributes:
        text_proj: the language model's embeddings, each scaled alike, to the Q-Former's width.
    """

    wants_text = True

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__(vision_width, text_width)
        self.text_proj = text_projection(text_width, self.queries.shape[-1])

    def forward(self, features: torch.Tensor, text: Text | None = None) -> torch.Tensor:
        """Returns visual tokens (B, K, D) of features (B, P, Dv) and text."""
        assert text is not None, "the model gives text to an adapter that wants some"
        queries = self.queries.expand(len(features), -1, -1)
        words = self.text_proj(text.embeddings) + places(text.mask, queries)  # (B, T, width)
        seen = torch.cat([text.mask.new_ones(queries.shape[:2]), text.mask], dim=1)  # (B, K + T)
        states = self.qformer(
            torch.cat([queries, words], dim=1),
            query_length=queries.shape[1],
            attention_mask=seen.long(),
            encoder_hidden_states=features,
        ).last_hidden_state
        return self.proj(states[:, : queries.shape[1]])


def qformer_config(vision_width: int, width: int, with_text: bool = False) -> Blip2QFormerConfig:
    """Returns that of a small Q-Former whose queries, of `width`, attend to features of `vision_width`."""
    return Blip2QFormerConfig(
        hidden_size=width,
        encoder_hidden_size=vision_width,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads_of(width),
        intermediate_size=2 * width,
        cross_attention_frequency=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=initializer_range(width),
        use_qformer_text_input=with_text,
    )


def heads_of(width: int) -> int:
    """Returns heads of attention: of 64 channels, in a small model of 16."""
    channels = 64 if width >= 256 else 16
    return width // math.gcd(width, channels)


def initializer_range(width: int) -> float:
    """Returns by which a layer keeps its input's size: at the library's 0.02 a small one lets go of frame and text."""
    return 1.2 / math.sqrt(width)


def text_projection(text_width: int, width: int) -> nn.Sequential:
    """Returns the way of the language model's embeddings, which may be of any size, to `width`."""
    return nn.Sequential(nn.LayerNorm(text_width), nn.Linear(text_width, width))


def places(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Returns positions of tokens, counted without padding: sin and cos of place / 10000^(2i / width).

    As in arXiv:1706.03762.

    Args:
        mask: (B, T) bool, True where a token is.
        like: (..., width), for width and precision.

    Returns:
        (B, T, width).
    """
    width = like.shape[-1]
    rates = torch.exp(torch.arange(0, width, 2, device=mask.device) * (-math.log(10_000.0) / width))  # (width / 2,)
    angles = (mask.cumsum(1) - 1)[..., None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(2)[..., :width].to(like.dtype)
