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
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from transformers import TrainerCallback

from manako.agent.checkpoint import finalize_folder
from manako.agent.errors import NotFiniteError
from manako.agent.ppo_trainer import PPOTrainer
from manako.agent.rescue import LastIterations
from manako.bounded import BadText, json_object

METRICS_FILE, CHECKPOINTS = "metrics.jsonl", "checkpoints"
VALIDATION = "validation/"  # what the numbers of an evaluation while a run trains are called in its row
SAVING_SHARE = 0.05  # of a run's time, at most, goes into checkpoints by the clock


class MetricsCallback(TrainerCallback):
    """Appends each iteration to metrics.jsonl and to TensorBoard; a value that is not finite is written as null.

    An evaluation while it trains is a row of its own, behind that of its iteration.

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
        self.append({key: finite(value) for key, value in logs.items() if key != "epoch"})

    def append(self, row: dict[str, Any]) -> None:
        """Appends a row; to TensorBoard those of its values that are numbers."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for key, value in row.items():
            if isinstance(value, int | float) and key not in ("iteration", "env_steps"):
                self.board.add_scalar(key, value, row["env_steps"])
        self.board.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the TensorBoard file."""
        self.board.close()


def finite(value: Any) -> Any:
    """Returns a value, None in place of a number that is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(run_dir: Path, numbers: Sequence[str] = ("iteration", "env_steps")) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl; a last line cut short by a crash is left out, and so is a damaged one.

    Args:
        run_dir: the run folder.
        numbers: what each row has to have, as whole numbers; of fine-tuning it is `step`.
    """
    path, rows = run_dir / METRICS_FILE, []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(BadText):
            row = json_object(line)
            if all(type(row.get(name)) is int for name in numbers):
                rows.append(row)
    return rows


def is_validation(row: dict[str, Any]) -> bool:
    """Says whether a row is of an evaluation, and not of an iteration or step."""
    return any(key.startswith(VALIDATION) for key in row)


def cut_metrics(run_dir: Path, iteration: int) -> None:
    """Drops the rows past `iteration`: a resumed run writes them again. Says where some before it are lost."""
    rows = [row for row in read_metrics(run_dir) if row.get("iteration", iteration + 1) <= iteration]
    lost = sorted({*range(1, iteration + 1)} - {row["iteration"] for row in rows if not is_validation(row)})
    if lost:
        print(
            f"warning: {METRICS_FILE} has lost the rows of {len(lost)} iterations, such as {lost[0]}: the learning "
            "curve will lack them; the run itself goes on whole",
            flush=True,
        )
    rewrite_metrics(run_dir, rows)


def rewrite_metrics(run_dir: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes metrics.jsonl anew, in one piece."""
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
    """Renames the checkpoints past `iteration`, which were found damaged or broken, so that they are written again.

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


class Clock:
    """Says when the next checkpoint is due by the clock.

    Args:
        minutes: between two of them; more where writing one takes long, so that `SAVING_SHARE` is the most it costs.
    """

    def __init__(self, minutes: float) -> None:
        self.seconds, self._last = 60 * minutes, time.monotonic()

    def due(self) -> bool:
        """Says whether it is time."""
        return time.monotonic() - self._last >= self.seconds

    def saved(self, began: float) -> None:
        """Hears of a checkpoint that has just been written, and when (`time.monotonic()`) that began."""
        self._last = time.monotonic()
        self.seconds = max(self.seconds, (self._last - began) / SAVING_SHARE)


class Checkpoints(TrainerCallback):
    """Seals what the Trainer writes, keeps the newest, and answers Ctrl-C and SIGTERM while it trains.

    A first signal ends the training after a checkpoint, a second one at once.

    Args:
        trainer: the trainer.
        run_dir: the run folder.
        keep: how many are kept.
        minutes: between checkpoints by the clock.

    Attributes:
        interrupted: whether a signal came.
        also: says of a number whether a checkpoint is written there in any case.
    """

    until = "step"  # what a first signal waits for the end of

    def __init__(self, trainer: Any, run_dir: Path, keep: int, minutes: float) -> None:
        self.trainer, self.run_dir, self.keep = trainer, run_dir, keep
        self.interrupted = False
        self.also: Callable[[int], bool] = lambda number: False
        self.clock, self._began = Clock(minutes), 0.0
        self._handlers: dict[int, Any] = {}

    def number(self) -> int:
        """Returns the number of the checkpoint that would be written now."""
        return int(self.trainer.state.global_step)

    @property
    def last(self) -> Path | None:
        """The newest checkpoint, None before there is one."""
        return next(iter(checkpoints(self.run_dir)[::-1]), None)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes over the signals."""
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

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Seals what the Trainer wrote and moves it to its place; drops the oldest."""
        finalize_folder(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.path())
        for old in checkpoints(self.run_dir)[: -self.keep]:
            shutil.rmtree(old)
        self.clock.saved(self._began)

    def write(self) -> None:
        """Writes one now, outside of the Trainer's loop."""
        self._began = time.monotonic()
        self.trainer._save_checkpoint(self.trainer.model, None)  # as the loop does
        self.on_save(self.trainer.args, self.trainer.state, self.trainer.control)

    def interrupted_whole(self, error: BaseException) -> bool:
        """Says whether a first signal ended the training, whose last state is then on disk."""
        return self.interrupted and isinstance(error, KeyboardInterrupt) and self.path().exists()

    def path(self) -> Path:
        """Where the checkpoint of now is, or would be."""
        return self.run_dir / CHECKPOINTS / f"checkpoint-{self.number()}"

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        # not print: a handler may run in the middle of one
        os.write(2, f"stopping at the end of this {self.until}; a second signal stops at once\n".encode())


class CheckpointCallback(Checkpoints):
    """Checkpoints of PPO: every `every` iterations, by the clock, at the end, and after a signal.

    Args:
        trainer: the trainer.
        run_dir: the run folder.
        every: iterations between checkpoints.
        keep: how many are kept, the newest ones.
        minutes: between checkpoints, if iterations take longer.
    """

    until = "iteration"

    def __init__(
        self, trainer: PPOTrainer, run_dir: Path, every: int, keep: int = 2, minutes: float = math.inf
    ) -> None:
        super().__init__(trainer, run_dir, keep, minutes)
        self.every, self.last_iterations = every, LastIterations(trainer)
        trainer.add_callback(self.last_iterations)

    def number(self) -> int:
        """Returns the iteration."""
        return int(self.trainer.iteration)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decides whether this iteration is saved."""
        last = self.trainer.iteration >= args.num_iterations
        self._began = time.monotonic()
        if self.trainer.failure is not None:
            control.should_save = self.trainer.iteration > 0 and not self.path().exists()
            return
        by_number = last or self.trainer.iteration % self.every == 0 or self.also(self.trainer.iteration)
        control.should_save = self.interrupted or by_number or self.clock.due()
        control.should_training_stop = control.should_training_stop or self.interrupted

    def keep_last(self, error: BaseException) -> None:
        """Writes a checkpoint of the last good iteration after `error` ended the training in the middle of one.

        Where the numbers broke, later checkpoints, which hold what broke them, are set aside. Nothing is written where
        the newest checkpoint is of that iteration already, or nothing was learned.
        """
        broken, trainer = isinstance(error, NotFiniteError), self.trainer
        if not self.last_iterations.bring_back(broken):
            if broken and not trainer._updates:  # what this start began from is what broke
                set_aside(self.run_dir, trainer.iteration - 1)
            return
        if broken:
            set_aside(self.run_dir, trainer.iteration)
        if self.last is None or _iteration(self.last) < trainer.iteration:
            self.write()
