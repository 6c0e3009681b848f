"""An architecture's own losses on frames and captions, inside transformers' Trainer.

What is learned the policy says (`Policy.pretraining`); here are batches, the adapter's own learning rate, a metrics
file with every loss by name, and a stop at a loss that is not finite.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from manako.agent.tuning.parameter_groups import GroupsOfPolicy
from manako.agent.tuning.saving import SavesPolicy
from manako.agent.tuning.trainers import StepMetricsCallback
from manako.policies.interface import Policy


class PretrainingTrainer(SavesPolicy, GroupsOfPolicy, Trainer):
    """Minimises the sum of a pretraining's losses.

    Args:
        policy: whose model learns where it requires gradients.
        pretraining: of `Policy.pretraining`.
        args: of the Trainer.
        frames: (H, W, 3) uint8 each.
        captions: what is on them.
        run_dir: for metrics.jsonl.
        adapter_learning_rate: of the adapter, if another.

    Attributes:
        rows: of metrics.jsonl.
    """

    def __init__(
        self,
        policy: Policy,
        pretraining: Any,
        args: TrainingArguments,
        frames: Sequence[np.ndarray],
        captions: Sequence[str],
        run_dir: Path,
        adapter_learning_rate: float | None = None,
    ) -> None:
        self.policy, self.adapter_learning_rate = policy, adapter_learning_rate
        self.rows: list[dict[str, Any]] = []
        self._parts: dict[str, float] = {}
        args.remove_unused_columns = False
        data: Any = list(zip(frames, captions, strict=True))
        super().__init__(pretraining, args, data_collator=list, train_dataset=data)
        self.remove_callback(PrinterCallback)
        self.add_callback(StepMetricsCallback(run_dir, self.rows))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Returns the sum of the losses over a batch of frames and captions."""
        images, captions = zip(*inputs, strict=True)
        with self.accelerator.autocast():
            losses = model.losses(np.stack(images), captions)
        self._parts = {name: loss.item() for name, loss in losses.items()}
        loss = torch.stack(list(losses.values())).sum()
        return (loss, losses) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the single losses to what is logged of a step."""
        super().log({**logs, **self._parts} if "loss" in logs else logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trains, and leaves the model in evaluation mode."""
        try:
            return super().train(*args, **kwargs)
        except BaseException as error:
            self.keep_last(error)
            raise
        finally:
            self.policy.eval()
            shutil.rmtree(self.args.output_dir, ignore_errors=True)
