"""Where a policy's model comes from and what of it learns: the one settings class of this package, light to import."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from manako.policies.answers import KINDS
from manako.policies.architectures.presets import ENCODER_NAMES, PRESETS
from manako.settings import setting

if TYPE_CHECKING:
    ActionFormat = str
else:  # a line in the table is a choice of --action_format
    ActionFormat = Literal[("auto", *KINDS)]
Dtype = Literal["float32", "bfloat16"]
BinSpacing = Literal["linear", "symlog"]
BINS = 11
SYSTEM = "Follow the instruction. Actions: {actions}."


@dataclass(frozen=True)
class PolicySource:
    """Where a policy's model comes from, and what of it learns."""

    policy: str = setting("tiny", f"preset ({', '.join(PRESETS)}), model folder, run checkpoint or Hub id")
    vision_encoder: str | None = setting(
        None,
        f"replaces a preset's encoder: {', '.join(ENCODER_NAMES)}, folder or Hub id",
    )
    adapter: str | None = setting(
        None,
        "replaces a preset's adapter: linear, mlp, mlp_zscore, qformer, resampler, and with the instruction before "
        "them instruct_qformer, instruct_resampler",
    )
    language_model: str | None = setting(
        None, "replaces a preset's language model: tiny-llama, smollm2, folder, Hub id"
    )
    image_size: int | None = setting(
        None, "side in pixels that a small random encoder or efficientnet_lite0 sees", ge=8
    )
    patch_size: int | None = setting(None, "side in pixels of its patches", ge=2)
    trainable: str = setting(
        "full",
        "what learns: full, adapter, lora (with the adapter), or parts among encoder, adapter, language_model, lora, "
        "value_head joined by +; auto: full where the language model began random, lora where it is pretrained",
    )
    lora_rank: int = setting(16, "rank of LoRA", ge=1)
    lora_alpha: int = setting(32, "LoRA is scaled by lora_alpha / lora_rank", only_in_file=True, ge=1)
    next_frame_coef: float = setting(
        0.0, "weight of the loss on the next frame's codes, for a policy of vision tokens", ge=0
    )
    dtype: Dtype = setting("float32", "of the weights")
    action_format: ActionFormat = setting("auto", "how actions are named")
    bins: int = setting(BINS, "bins of each entry of a continuous action, both bounds among them", ge=2)
    bin_spacing: BinSpacing = setting("linear", "symlog puts them closer together around the middle")
    system: str = setting(
        SYSTEM, "system text of the prompt; {actions} stands for the list of actions", only_in_file=True
    )
    seed: int = setting(0, "of random weights", ge=0, lt=2**31)
