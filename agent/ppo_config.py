"""Settings of PPO, on transformers' TrainingArguments."""

from dataclasses import dataclass, field

from trl.trainer.base_config import _BaseConfig

from manako.agent.errors import TrainingError


@dataclass
class PPOConfig(_BaseConfig):
    """Settings of `PPOTrainer`, beside all of transformers' TrainingArguments.

    Args:
        num_iterations: rollouts, each followed by an update.
        num_steps: env steps of each environment in a rollout, T.
        num_ppo_epochs: passes over a rollout's samples.
        minibatch_size: samples of one optimizer step.
        advantage: gae, which needs the value head, or grpo, rloo, gigpo, which compare the slots of a group.
        group_size: slots that play the same episodes, for these three.
        step_weight: of gigpo's step advantages.
        gamma: discount per env step.
        gae_lambda: lambda of GAE.
        clip_range: epsilon of the clipped surrogate.
        clip_range_vf: epsilon of the clipped value loss, in units of the return; None leaves it unclipped.
        vf_coef: weight of the value loss.
        ent_coef: weight of the entropy bonus.
        kl_coef: weight of KL(policy || reference); 0 needs no reference.
        adapter_learning_rate: initial learning rate of the adapter, where it is not `learning_rate`: a new adapter
            between two pretrained parts may learn faster than they.
        target_kl: an update stops once a minibatch's approx_kl exceeds 1.5 times this; None never stops.
    """

    num_iterations: int = 100
    num_steps: int = 16
    num_ppo_epochs: int = 4
    minibatch_size: int = 256
    advantage: str = "gae"
    group_size: int = 8
    step_weight: float = 1.0
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    clip_range_vf: float | None = 0.2
    vf_coef: float = 0.5
    ent_coef: float = 0.01
    kl_coef: float = 0.0
    target_kl: float | None = None
    adapter_learning_rate: float | None = None

    learning_rate: float = field(default=5e-4, metadata={"help": "Initial learning rate of AdamW."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Schedule of the learning rate."})
    adam_epsilon: float = field(default=1e-5, metadata={"help": "Epsilon of AdamW."})
    max_grad_norm: float = field(default=0.5, metadata={"help": "Gradients are clipped to this norm."})
    bf16: bool | None = field(default=False, metadata={"help": "bfloat16 autocast in rollouts and updates."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Keep off: the model is never in training mode."}
    )
    # A NaN is an error here, never the average of earlier losses.
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Keep off: NaN must be seen."})

    def __post_init__(self) -> None:
        self.num_train_epochs = self.num_iterations
        self.logging_strategy = "epoch"
        self.save_strategy = "no"  # CheckpointCallback decides
        self.remove_unused_columns = False
        self.disable_tqdm = True
        if self.minibatch_size % self.gradient_accumulation_steps:
            raise TrainingError(
                f"minibatch_size {self.minibatch_size} is no multiple of gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}: expected equal micro-batches."
            )
        self.per_device_train_batch_size = self.minibatch_size // self.gradient_accumulation_steps
        super().__post_init__()
