"""Where a policy's model comes from and what of it learns: the one settings class of this package, light to import."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from manako.policies.answers import KINDS
from manako.policies.answers.template import TEMPLATES
from manako.policies.answers.text import FORMAT as TEXT
from manako.policies.answers.text import TextAnswers
from manako.policies.architectures.presets import ENCODER_NAMES, PRESETS
from manako.settings import setting

if TYPE_CHECKING:
    ActionFormat = str
else:  # a line in the table is a choice of --action_format
    ActionFormat = Literal[("auto", *KINDS, TEXT)]
Dtype = Literal["float32", "bfloat16"]
TEXT_FIELDS = {  # of PolicySource -> of TextAnswers
    "answer_template": "template",
    "answer_tokens": "longest",
    "constrain_actions": "constrained",
    "thought_coef": "thought_coef",
    "illegal_action": "illegal_action",
    "illegal_penalty": "illegal_penalty",
    "temperature": "temperature",
}
BinSpacing = Literal["linear", "symlog"]
BINS = 11
SYSTEM = "Follow the instruction. Actions: {actions}."


@dataclass(frozen=True)
class PolicySource:
    """Where a policy's model comes from, and what of it learns."""

    policy: str = setting(
        "tiny", f"preset ({', '.join(PRESETS)}), model folder, run checkpoint or Hub id", is_path=True
    )
    vision_encoder: str | None = setting(
        None, f"replaces a preset's encoder: {', '.join(ENCODER_NAMES)}, folder or Hub id", is_path=True
    )
    adapter: str | None = setting(
        None,
        "replaces a preset's adapter: linear, mlp, mlp_zscore, qformer, resampler, and with the instruction before "
        "them instruct_qformer, instruct_resampler",
    )
    language_model: str | None = setting(
        None, "replaces a preset's language model: tiny-llama, smollm2, folder, Hub id", is_path=True
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
    action_format: ActionFormat = setting(
        "auto", "how actions are named: one of a closed set by one token or more, or text: think, then name one"
    )
    answer_template: str | None = setting(
        None,
        f"form of answers in text: {', '.join(TEMPLATES)}, or a text with {{action}}, and {{thought}} before it "
        f"(default {TextAnswers.template})",
    )
    answer_tokens: int | None = setting(None, f"most tokens of an answer in text (default {TextAnswers.longest})", ge=2)
    constrain_actions: bool | None = setting(
        None, "in an answer in text sample nothing but allowed actions behind the template's cue (default false)"
    )
    thought_coef: float | None = setting(
        None, "lambda of RL4VLM: one ratio a step, of lambda x thought + action; by default a ratio a token", ge=0
    )
    illegal_action: str | None = setting(
        None, "name of the action for answers in text that name none; by default the environment is not stepped then"
    )
    illegal_penalty: float | None = setting(
        None, f"taken off the reward for such an answer (default {TextAnswers.illegal_penalty})", ge=0
    )
    temperature: float | None = setting(
        None, "logits of answers in text are divided by it in rollouts and updates (default 1)", gt=0
    )
    frames: int = setting(
        1,
        "how many of the episode's last frames it is shown, each as an image of the prompt; black before the first",
        ge=1,
        le=16,
    )
    history: int = setting(0, "how many of the episode's last actions and rewards the prompt tells", ge=0, le=64)
    image_first: bool = setting(
        False, "the frame stands before the instruction, so that samples of one frame share its forward"
    )
    bins: int = setting(BINS, "bins of each entry of a continuous action, both bounds among them", ge=2, le=2**16)
    bin_spacing: BinSpacing = setting("linear", "symlog puts them closer together around the middle")
    system: str = setting(
        SYSTEM, "system text of the prompt; {actions} stands for the list of actions", only_in_file=True
    )
    seed: int = setting(0, "of random weights", ge=0, lt=2**31)

    def text_answers(self, template: str = TextAnswers.template) -> TextAnswers:
        """Returns the settings of answers in text.

        Args:
            template: by default.
        """
        given = {field: getattr(self, name) for name, field in TEXT_FIELDS.items()}
        return TextAnswers(**{"template": template, **{f: value for f, value in given.items() if value is not None}})
