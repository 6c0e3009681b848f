"""Settings of PPO, on transformers' TrainingArguments."""

from dataclasses import dataclass, field

from trl.trainer.base_config import _BaseConfig

from manako.agent.errors import TrainingError
from manako.agent.ppo_settings import PPOSettings


@dataclass
class PPOConfig(PPOSettings, _BaseConfig):
    """Settings of `PPOTrainer`: those of `PPOSettings`, beside all of transformers' TrainingArguments.

    Args:
        num_iterations: rollouts, each followed by an update.
    """

    num_iterations: int = 100
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
        if self.ent_coef_end is not None and not self.ent_coef:
            raise TrainingError(
                f"ent_coef_end is {self.ent_coef_end} and ent_coef 0: expected an ent_coef above 0 to come from."
            )
        self.per_device_train_batch_size = self.minibatch_size // self.gradient_accumulation_steps
        super().__post_init__()
