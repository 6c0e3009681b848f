"""Ready-made policies' models by name; each part of them can be replaced.

`tiny` has under a million random parameters and learns from scratch on a CPU. `smollm2` is a small pretrained language
model behind a small random encoder. `uniter` and `vilbert` are small random encoder-only models that answer at a mask.
The others are small random models of a published shape; the file of that name in this folder says which.
`kosmos2` is a small random Kosmos-2, which can answer with a place.
"""

from dataclasses import dataclass

# the keys of `manako.policies.encoders.ENCODERS`, which needs torch; a test holds the two together
ENCODER_NAMES = ("vit", "clip_vit", "eva", "eva_qformer", "convnext", "efficientnet_lite0")


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
    "blip2": Preset(vision_encoder="eva", adapter="qformer", language_model="tiny-llama"),
    "instructblip": Preset(vision_encoder="eva", adapter="instruct_qformer", language_model="tiny-llama"),
    "minigpt4": Preset(
        vision_encoder="eva_qformer", adapter="linear", language_model="tiny-llama", architecture="minigpt4"
    ),
    "llava": Preset(vision_encoder="clip_vit", adapter="mlp", language_model="tiny-llama"),
    "flamingo": Preset(vision_encoder="vit", adapter="mlp", language_model="tiny-llama", architecture="flamingo.build"),
    "vision_tokens": Preset(
        vision_encoder="fsq", adapter="codes", language_model="tiny-llama", architecture="vision_tokens.build"
    ),
    "kosmos2": Preset(vision_encoder=None, adapter=None, language_model=None, architecture="kosmos2"),
}
