"""Checkpoints of SFT, DPO, KTO and pretraining: by the clock, after a signal, and when something else ends a training.

A checkpoint is the policy as `Policy.save` writes it, beside the Trainer's optimizer, schedule, random numbers and
place in the data. What goes on from one goes on bit for bit. Where the loss is no number none is written: the step
before it is what broke it, and the one by the clock is older.
"""

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from manako.agent.checkpoint import filled
from manako.agent.errors import NotFiniteError
from manako.agent.report.callbacks import Checkpoints, is_validation, read_metrics, rewrite_metrics
from manako.policies.interface import Policy


class StepCheckpoints(Checkpoints):
    """Checkpoints of a trainer whose steps are optimizer steps."""

    _whole, _step = False, 0
    rows_before = 0  # of metrics.jsonl, of earlier rounds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decides whether this step is saved."""
        self._whole, self._step = True, state.global_step
        last = state.global_step >= state.max_steps
        if self.interrupted or self.clock.due() or last or self.also(state.global_step):
            self._began, control.should_save = time.monotonic(), True
        control.should_training_stop = control.should_training_stop or self.interrupted

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here to the step's end the weights belong to no step."""
        self._whole = False

    def keep_last(self, error: BaseException) -> None:
        """Writes the last step where `error` came between two, and is not what that step has done."""
        if self._whole and not isinstance(error, NotFiniteError) and self._step and not self.path().exists():
            self.write()


class SavesPolicy:
    """What the trainers of a policy share that can be gone on with; stands before the Trainer among the bases."""

    policy: Policy
    rows: list[dict[str, Any]]
    state: Any
    args: Any

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the policy."""
        folder = Path(str(output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.policy.save(folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        trainer: Any = super()
        step = self.state.global_step
        with filled(Path(self.args.output_dir) / f"checkpoint-{step}", f"The checkpoint of step {step}"):
            trainer._save_checkpoint(model, trial)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.policy.load_weights(Path(resume_from_checkpoint))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Writes none beside a checkpoint."""

    def fit(self, saver: StepCheckpoints, checkpoint: Path | None, *others: TrainerCallback) -> None:
        """Trains, from a checkpoint or from the start; whatever ends it, what was learned is kept.

        Args:
            saver: of the checkpoints.
            checkpoint: where it goes on from.
            others: called after the saver.

        Raises:
            KeyboardInterrupt: a signal came.
        """
        trainer: Any = self
        step = 0 if checkpoint is None else int(checkpoint.name.split("-")[1])
        kept = cut_steps(saver.run_dir, step, saver.rows_before)
        self.rows += [row for row in kept if not is_validation(row)]
        for callback in (saver, *others):
            trainer.add_callback(callback)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        saver.restore_signals()
        if saver.interrupted:
            raise KeyboardInterrupt

    def keep_last(self, error: BaseException) -> None:
        """Lets the saver keep the last step; called before the trainer puts its folder away."""
        trainer: Any = self
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, StepCheckpoints):
                callback.restore_signals()
                if not callback.interrupted_whole(error):
                    callback.keep_last(error)


def cut_steps(run_dir: Path, step: int, before: int = 0) -> list[dict[str, Any]]:
    """Drops the rows of metrics.jsonl past `step`, which a resumed training writes again; returns those that stay.

    Args:
        run_dir: the run folder.
        step: of the checkpoint.
        before: rows of earlier rounds, which stay.
    """
    rows = read_metrics(run_dir, ("step",))
    kept = rows[:before] + [row for row in rows[before:] if row["step"] <= step]
    rewrite_metrics(run_dir, kept)
    return kept[before:]
