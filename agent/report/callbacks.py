"""What a run leaves behind while it goes on: metrics and checkpoints.

The Trainer writes a checkpoint into a staging folder; once it is complete it is sealed with a manifest and renamed into
run/checkpoints/checkpoint-<iteration>, so that a checkpoint is either whole or not there.
"""

import contextlib
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

from manako.agent.checkpoint import finalize_folder
from manako.agent.ppo_trainer import PPOTrainer
from manako.bounded import BadText, json_object

METRICS_FILE, CHECKPOINTS = "metrics.jsonl", "checkpoints"


class MetricsCallback(TrainerCallback):
    """Appends each iteration to metrics.jsonl and to TensorBoard; a value that is not finite is written as null.

    TensorBoard forgets what an earlier start wrote past the last row of metrics.jsonl (see `cut_metrics`).

    Args:
        run_dir: the run folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / METRICS_FILE
        rows = read_metrics(run_dir)
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=rows[-1]["env_steps"] + 1 if rows else None)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Appends one iteration's metrics."""
        if not logs or "iteration" not in logs:
            return
        row = {key: _finite(value) for key, value in logs.items() if key != "epoch"}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for key, value in row.items():
            if value is not None and key not in ("iteration", "env_steps"):
                self.board.add_scalar(key, value, row["env_steps"])
        self.board.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the TensorBoard file."""
        self.board.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl; a last line cut short by a crash is left out, and so is a damaged one."""
    path, rows = run_dir / METRICS_FILE, []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(BadText):
            row = json_object(line)
            if all(type(row.get(name)) is int for name in ("iteration", "env_steps")):
                rows.append(row)
    return rows


def cut_metrics(run_dir: Path, iteration: int) -> None:
    """Drops the rows past `iteration`: a resumed run writes them again. Says where some before it are lost."""
    rows = [row for row in read_metrics(run_dir) if row.get("iteration", iteration + 1) <= iteration]
    lost = sorted({*range(1, iteration + 1)} - {row["iteration"] for row in rows})
    if lost:
        print(
            f"warning: {METRICS_FILE} has lost the rows of {len(lost)} iterations, such as {lost[0]}: the learning "
            "curve will lack them; the run itself goes on whole",
            flush=True,
        )
    temporary = run_dir / (METRICS_FILE + ".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(run_dir / METRICS_FILE)


def checkpoints(run_dir: Path) -> list[Path]:
    """Returns the checkpoints of a run, whole or not, in the order of their iterations."""
    found = [
        path for path in (run_dir / CHECKPOINTS).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)
    ]
    return sorted(found, key=_iteration)


def set_aside(run_dir: Path, iteration: int) -> list[Path]:
    """Renames the checkpoints past `iteration`, which were found damaged, so that a resumed run can write them again.

    Returns:
        Their new places, damaged-checkpoint-<iteration>.
    """
    moved = []
    for path in checkpoints(run_dir):
        if _iteration(path) > iteration:
            place = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(place, ignore_errors=True)
            moved.append(path.rename(place))
    return moved


def _iteration(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


class CheckpointCallback(TrainerCallback):
    """Checkpoints every `every` iterations, at the end, and after Ctrl-C or SIGTERM.

    A signal ends the run at the end of its iteration, a second one at once, with what the last checkpoint holds.

    Args:
        trainer: the trainer.
        run_dir: the run folder.
        every: iterations between checkpoints.
        keep: how many are kept, the newest ones.

    Attributes:
        interrupted: whether a signal came.
    """

    def __init__(self, trainer: PPOTrainer, run_dir: Path, every: int, keep: int = 2) -> None:
        self.trainer, self.run_dir, self.every, self.keep = trainer, run_dir, every, keep
        self.interrupted = False
        self._handlers: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes over the signals: from here on one is answered at the end of the iteration."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._interrupt)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Gives the signals back."""
        self.restore_signals()

    def restore_signals(self) -> None:
        """Gives the signals back; may be called twice."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers.clear()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decides whether this iteration is saved."""
        last = self.trainer.iteration >= args.num_iterations
        if self.trainer.failure is not None:
            control.should_save = self.trainer.iteration > 0 and not self._path().exists()
            return
        control.should_save = self.interrupted or last or self.trainer.iteration % self.every == 0
        control.should_training_stop = control.should_training_stop or self.interrupted

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seals what the Trainer wrote and moves it to its place; drops the oldest."""
        finalize_folder(Path(args.output_dir) / f"checkpoint-{state.global_step}", self._path())
        for old in checkpoints(self.run_dir)[: -self.keep]:
            shutil.rmtree(old)

    def _path(self) -> Path:
        """Where the checkpoint of this iteration is."""
        return self.run_dir / CHECKPOINTS / f"checkpoint-{self.trainer.iteration}"

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        # not print: a handler may run in the middle of one
        os.write(2, b"stopping at the end of this iteration; a second signal stops at once\n")
