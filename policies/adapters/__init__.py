"""Adapters: visual features (B, P, Dv) -> visual tokens (B, K, D), the translation into the language model's space.

To add one: a file with a subclass of `Adapter` and a line in `ADAPTERS`; `--adapter NAME` then selects it.
"""

from manako.policies.adapters.base import Adapter, Text
from manako.policies.adapters.linear import LinearAdapter
from manako.policies.adapters.mlp import MLPAdapter
from manako.policies.adapters.mlp_zscore import ZScoreMLPAdapter
from manako.policies.adapters.qformer import InstructQFormerAdapter, QFormerAdapter
from manako.policies.adapters.resampler import InstructResamplerAdapter, ResamplerAdapter
from manako.policies.errors import PolicyError

__all__ = ["ADAPTERS", "Adapter", "Text", "build_adapter"]

ADAPTERS: dict[str, type[Adapter]] = {
    "linear": LinearAdapter,
    "mlp": MLPAdapter,
    "mlp_zscore": ZScoreMLPAdapter,
    "qformer": QFormerAdapter,
    "instruct_qformer": InstructQFormerAdapter,
    "resampler": ResamplerAdapter,
    "instruct_resampler": InstructResamplerAdapter,
}


def build_adapter(name: str, vision_width: int, text_width: int) -> Adapter:
    """Returns a new adapter of that name; raises PolicyError on an unknown name."""
    if name not in ADAPTERS:
        raise PolicyError(f"Unknown adapter {name!r}: expected one of {', '.join(sorted(ADAPTERS))}.")
    return ADAPTERS[name](vision_width, text_width)
