"""Ready-made policies' models by name; each part of them can be replaced.

`tiny` has under a million random parameters and learns from scratch on a CPU. `smollm2` is a small pretrained language
model behind a small random encoder. `uniter` and `vilbert` are small random encoder-only models that answer at a mask.
`kosmos2` is a small random Kosmos-2, which can answer with a place.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """An architecture of this folder and its parts by name.

    Attributes:
        vision_encoder: see `manako.policies.encoders`; None where the architecture has its own, as for the others.
        adapter: see `manako.policies.adapters`.
        language_model: see `manako.policies.language_models`; None where the architecture has none of its own.
        architecture: a module or package of this folder with `build_vlm`.
    """

    vision_encoder: str | None
    adapter: str | None
    language_model: str | None
    architecture: str = "composed.build"


PRESETS: dict[str, Preset] = {
    "tiny": Preset(vision_encoder="vit", adapter="mlp", language_model="tiny-llama"),
    "smollm2": Preset(vision_encoder="vit", adapter="mlp_zscore", language_model="smollm2"),
    "uniter": Preset(vision_encoder="vit", adapter="linear", language_model=None, architecture="uniter"),
    "vilbert": Preset(vision_encoder="vit", adapter="linear", language_model=None, architecture="vilbert"),
    "flamingo": Preset(vision_encoder="vit", adapter="mlp", language_model="tiny-llama", architecture="flamingo.build"),
    "kosmos2": Preset(vision_encoder=None, adapter=None, language_model=None, architecture="kosmos2"),
}
