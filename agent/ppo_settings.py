"""Settings of PPO and of the group methods: light to import, so that the command line and `PPOConfig` share one class.

The defaults are those that suit any environment; what one environment wants stands in experiments/configs/.
"""

from dataclasses import dataclass
from typing import Literal

from manako.settings import setting

Advantage = Literal["gae", "grpo", "rloo", "gigpo"]
TokenCredit = Literal["step", "token", "bilevel"]
Schedule = Literal["linear", "cosine", "constant"]


@dataclass
class PPOSettings:
    """How a rollout becomes an update."""

    num_steps: int = setting(16, "env steps of each environment in a rollout, T", ge=1, le=2**20)
    num_ppo_epochs: int = setting(4, "passes over a rollout", ge=1)
    minibatch_size: int = setting(128, "samples of an optimizer step", ge=1)
    gradient_accumulation_steps: int = setting(1, "parts in which a minibatch is run", ge=1)
    learning_rate: float = setting(5e-4, "initial learning rate of AdamW", gt=0)
    adapter_learning_rate: float | None = setting(
        None, "initial learning rate of the adapter, where a new one may learn faster than the rest", gt=0
    )
    lr_scheduler_type: Schedule = setting("linear", "decay of the learning rate")
    adam_epsilon: float = setting(1e-5, "epsilon of AdamW", only_in_file=True, gt=0)
    max_grad_norm: float = setting(0.5, "gradients are clipped to this norm", only_in_file=True, gt=0)
    advantage: Advantage = setting(
        "gae", "gae uses the value head; grpo, rloo and gigpo compare episodes of the same seed"
    )
    group_size: int = setting(8, "episodes of the same seed, for grpo, rloo and gigpo", ge=2)
    step_weight: float = setting(1.0, "weight of gigpo's step advantages beside the episode's", only_in_file=True, ge=0)
    gamma: float = setting(0.99, "discount of an env step", ge=0, le=1)
    gae_lambda: float = setting(0.95, "lambda of GAE", ge=0, le=1)
    token_credit: TokenCredit = setting(
        "step",
        "advantage of the tokens of an answer in text, with gae: step (one for all, as VL-DAC), token (an episode is a "
        "row of tokens) or bilevel (of steps, then inside each answer, as VAGEN)",
    )
    scale_returns: bool = setting(
        True, "rewards are divided by a running deviation of the discounted return: their unit does not matter"
    )
    clip_range: float = setting(0.2, "epsilon of the clipped surrogate", gt=0)
    clip_range_vf: float | None = setting(
        None,
        "epsilon of the clipped value loss, in units of the (scaled) return; null leaves it unclipped",
        only_in_file=True,
        gt=0,
    )
    vf_coef: float = setting(0.1, "weight of the value loss", only_in_file=True, ge=0)
    ent_coef: float = setting(0.01, "weight of the entropy bonus", ge=0)
    ent_coef_end: float | None = setting(
        None,
        "what --ent_coef has become in the last rollout, by the same factor from each to the next: to explore first",
        gt=0,
    )
    kl_coef: float = setting(0.0, "weight of KL(policy || start); needs --trainable lora", ge=0)
    target_kl: float | None = setting(None, "an update stops beyond 1.5 times this KL", gt=0)
    bf16: bool = setting(False, "bfloat16 autocast in rollouts and updates")
