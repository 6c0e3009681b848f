"""Ready-made policies' models by name; each part of them can be replaced.

`tiny` has under a million random parameters and learns from scratch on a CPU. `smollm2` is a small pretrained language
model behind a small random encoder.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """The three parts of a composed VLM by name."""

    vision_encoder: str
    adapter: str
    language_model: str


PRESETS: dict[str, Preset] = {
    "tiny": Preset(vision_encoder="vit", adapter="mlp", language_model="tiny-llama"),
    "smollm2": Preset(vision_encoder="vit", adapter="mlp_zscore", language_model="smollm2"),
}
