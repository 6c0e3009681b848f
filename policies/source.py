"""Where a policy's model comes from and what of it learns: the one settings class of this package, light to import."""

from dataclasses import dataclass

ActionFormat = str  # "auto" or a key of `manako.policies.answers.KINDS`
SYSTEM = "Follow the instruction. Actions: {actions}."


@dataclass(frozen=True)
class PolicySource:
    """Where a policy's model comes from, and what of it learns.

    Args:
        policy: a preset's name, a folder (of this module or of any VLM), or a Hub id.
        vision_encoder: replaces the preset's encoder.
        adapter: replaces the preset's adapter.
        language_model: replaces the preset's language model.
        image_size: see `manako.policies.encoders.build_encoder`.
        patch_size: see `manako.policies.encoders.build_encoder`.
        trainable: see `manako.policies.trainable`.
        lora_rank: rank of the LoRA matrices.
        lora_alpha: their scale is lora_alpha / lora_rank.
        dtype: of the weights, `float32` or `bfloat16`.
        action_format: see `manako.policies.answers.closed_set`.
        system: the prompt's system text.
        seed: of random weights.
    """

    policy: str = "tiny"
    vision_encoder: str | None = None
    adapter: str | None = None
    language_model: str | None = None
    image_size: int | None = None
    patch_size: int | None = None
    trainable: str = "full"
    lora_rank: int = 16
    lora_alpha: int = 32
    dtype: str = "float32"
    action_format: ActionFormat = "auto"
    system: str = SYSTEM
    seed: int = 0
