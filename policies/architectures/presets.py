"""Ready-made policies' models by name; each part of them can be replaced.

`tiny` has under a million random parameters and learns from scratch on a CPU. `smollm2` is a small pretrained language
model behind a small random encoder.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """An architecture of this folder and its three parts by name.

    Attributes:
        vision_encoder: see `manako.policies.encoders`.
        adapter: see `manako.policies.adapters`.
        language_model: see `manako.policies.language_models`.
        architecture: a module or package of this folder with `build_vlm`.
    """

    vision_encoder: str
    adapter: str
    language_model: str
    architecture: str = "composed.build"


PRESETS: dict[str, Preset] = {
    "tiny": Preset(vision_encoder="vit", adapter="mlp", language_model="tiny-llama"),
    "smollm2": Preset(vision_encoder="vit", adapter="mlp_zscore", language_model="smollm2"),
    "flamingo": Preset(vision_encoder="vit", adapter="mlp", language_model="tiny-llama", architecture="flamingo.build"),
}
