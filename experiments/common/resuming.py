"""What `--resume` may change of a run, and where that is written down.

A run that goes on without a change goes on bit for bit. What may change, and what that means:

learning_rate, adapter_learning_rate, lr_scheduler_type
        hold from the next update on, at the place in the schedule where the run is. The run is then no longer the one
        that its settings, given from the start, would make; its changes.jsonl says from where on.
total_steps
        prolongs a run, or ends it sooner, also one that is finished: its final/ and evaluation.json are kept under
        another name. With `constant` the longer run is, bit for bit, the one that had been so long from the start. A
        schedule that decays is that of the new length from here on: the learning rate jumps to where it would be, and
        the first part was learned with the shorter one's.
evaluation, figures, checkpoints
        change nothing that is learned. With another eval_every the best policy so far stays the one to beat; how many
        validation episodes there are stays as it was, since it was chosen by them.
the machine
        workers, threads: nothing is learned otherwise but for rounding (see `rollout_batch_size`).

Everything else makes another run. Light to import.
"""

import contextlib
import dataclasses
import functools
import json
import shlex
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from manako.agent.checkpoint import BEST, OF_A_RUN, OF_A_TUNING, latest_checkpoint, write_folder
from manako.experiments.common.command_line import (
    CommandLine,
    UsageError,
    build,
    checked_sections,
    flat,
    known_settings,
)
from manako.experiments.common.named_modules import check_named
from manako.experiments.common.run_folder import (
    check_job_folder,
    going_on,
    making,
    new_run_dir,
    read_run_settings,
    write_config,
)
from manako.experiments.common.settings import OF_THE_MACHINE, DPOCommand, PPOCommand, SFTCommand, moved

Command = TypeVar("Command", PPOCommand, SFTCommand, DPOCommand)

RATES = ("learning_rate", "adapter_learning_rate", "lr_scheduler_type")
EVALUATION = ("eval_episodes", "eval_steps", "eval_every", "gif_episodes")
SAVING = ("save_every", "save_minutes", "keep_checkpoints")
CHANGEABLE = (*RATES, "total_steps", *EVALUATION, *SAVING, "torch_threads")
CHANGES = "changes.jsonl"
OF_THE_END = ("final", "evaluation.json", "episodes.json", "after.gif", "learning_curve.png")

Changes = dict[str, tuple[Any, Any]]  # name of a setting -> what it was, what it is now


@dataclasses.dataclass(frozen=True)
class Start(Generic[Command]):
    """How a run begins, or goes on.

    Args:
        command: the settings now.
        run_dir: the run folder.
        checkpoint: where it goes on from; None from its start.
        changes: what is new of the settings of a run that goes on; None for a new run.
    """

    command: Command
    run_dir: Path
    checkpoint: Path | None = None
    changes: Changes | None = None

    @property
    def done(self) -> int:
        """Iterations or steps so far."""
        return int(self.checkpoint.name.split("-")[1]) if self.checkpoint else 0

    def in_words(self, beginning: str = "its start") -> str:
        """Returns the folder, and where a run that goes on does so from."""
        goes_on = "" if self.changes is None else f", from {self.checkpoint.name if self.checkpoint else beginning}"
        return f"{self.run_dir}{goes_on}"


@contextlib.contextmanager
def starting(line: CommandLine[Command]) -> Iterator[Start[Command]]:
    """Finds how the run of a command line starts, and holds its folder against every other process for a block.

    Raises:
        UsageError: a new run's folder exists; none to go on with, a finished one, damaged checkpoints alone, or flags
            that a run keeps from its start.
        InUseError: another process holds the folder.
    """
    if line.settings.run.resume is None:
        run_dir = new_run_dir(line.settings)
        with making(run_dir):
            yield Start(line.settings, run_dir)
        return
    run_dir = run_to_resume(line)
    with going_on(run_dir):
        if not isinstance(line.settings, PPOCommand):
            check_unfinished(run_dir)
        start = begin_again(line, run_dir)
        if isinstance(start.command, PPOCommand):
            samples = start.command.environment.num_envs * start.command.ppo.num_steps
            check_length(start.changes or {}, run_dir, start.done, samples)
        yield start


def goes_on(line: CommandLine[Command], run_dir: Path) -> tuple[Command, Changes]:
    """Returns a run's settings with what came with `--resume`, and what of them is new.

    Raises:
        UsageError: a setting came that a run keeps from its start, or one that this run cannot take.
    """
    kind, given = type(line.settings), line.given
    may: list[str] = [name for name in CHANGEABLE if name in known_settings(kind)]
    kept = sorted(given - {"resume", "env", *OF_THE_MACHINE, *may})
    if kept:
        raise UsageError(
            f"--resume goes on with the run's own settings, but --{kept[0]} came too: leave it out; only "
            f"{', '.join(may)} and where it is computed may change."
        )
    command = _settings_of(kind, run_dir)
    if "env" in given and line.settings.environment.env != command.environment.env:
        raise UsageError(
            f"--env {line.settings.environment.env} came, and the run in {str(run_dir)!r} is of "
            f"{command.environment.env}: leave it out, or start a new run."
        )
    check_named(command.environment.env, f"The run {str(run_dir)!r}")
    parts: dict[str, Any] = {}
    for part in dataclasses.fields(kind):
        own, new = getattr(command, part.name), getattr(line.settings, part.name)
        names = {field.name for field in dataclasses.fields(own)} & given & set(may)
        parts[part.name] = dataclasses.replace(own, **{name: getattr(new, name) for name in names})
    if isinstance(command, PPOCommand) and isinstance(line.settings, PPOCommand):
        parts["workers"] = moved(command.workers, given, line.settings.workers)
    changed = dataclasses.replace(command, **parts)
    before, after = _values(command), _values(changed)
    if _own_rate(before) != _own_rate(after):
        raise UsageError(
            f"--adapter_learning_rate is {after['adapter_learning_rate']} beside --learning_rate "
            f"{after['learning_rate']}, and the run had {before['adapter_learning_rate']} beside "
            f"{before['learning_rate']}: a resumed run keeps whether the adapter has a rate of its own."
        )
    return changed, {name: (before[name], after[name]) for name in after if before[name] != after[name]}


def _settings_of(kind: type[Command], run_dir: Path) -> Command:
    file = run_dir / "config.yaml"
    return build(kind, checked_sections(kind, read_run_settings(file), str(file)))


def _own_rate(values: Mapping[str, Any]) -> bool:
    """Whether the adapter has a learning rate of its own."""
    return values["adapter_learning_rate"] not in (None, values["learning_rate"])


def run_to_resume(line: CommandLine[Command]) -> Path:
    """Returns the folder of the run that `--resume` names.

    Raises:
        UsageError: no run there.
    """
    run_dir = Path(str(line.settings.run.resume))
    check_job_folder(str(run_dir), "--resume")
    if not (run_dir / "config.yaml").is_file():
        raise UsageError(f"--resume {str(run_dir)!r} is no run: expected a folder with config.yaml and checkpoints.")
    return run_dir


def begin_again(line: CommandLine[Command], run_dir: Path) -> Start[Command]:
    """Returns how the run in a folder goes on: its settings, its last whole checkpoint, and what is new.

    A run that was stopped before its first checkpoint has none, and begins again.

    Raises:
        UsageError: damaged checkpoints alone, or flags that a run keeps from its start.
    """
    command, changes = goes_on(line, run_dir)
    needed = OF_A_RUN if isinstance(command, PPOCommand) else OF_A_TUNING
    with warnings.catch_warnings(record=True) as faults:
        warnings.simplefilter("always")
        checkpoint = latest_checkpoint(run_dir, needed)
    found = "; ".join(str(fault.message).removeprefix("Passed over: ").split(";")[0] for fault in faults)
    if checkpoint is None and found:
        raise UsageError(f"{run_dir} holds no whole checkpoint ({found}): start a new run without --resume.")
    if checkpoint is not None and found:
        print(f"warning: {found}; going on from {checkpoint.name}", file=sys.stderr)
    return Start(command, run_dir, checkpoint, changes)


def check_unfinished(run_dir: Path) -> None:
    """Raises where a run has ended.

    Raises:
        UsageError: it has.
    """
    if (run_dir / "report.json").exists():
        raise UsageError(
            f"The run in {str(run_dir)!r} is finished: start a new one, with --policy {run_dir}/final if you like."
        )


def _values(command: Any) -> dict[str, Any]:
    parts = {part.name: vars(getattr(command, part.name)) for part in dataclasses.fields(command)}
    return {name: value for name, value in flat(parts).items() if name not in ("resume", "output_dir")}


def check_length(changes: Changes, run_dir: Path, iteration: int, samples: int) -> None:
    """Checks the length of a run that goes on.

    Raises:
        UsageError: it is finished and not to be longer, or has done more than it is to do.
    """
    steps = changes.get("total_steps", (None, None))[1]
    if (run_dir / "evaluation.json").exists() and (steps is None or steps <= iteration * samples):
        raise UsageError(
            f"The run in {str(run_dir)!r} is finished, after {iteration * samples:,} steps: prolong it with a larger "
            f"--total_steps, or start a new one, with --policy {run_dir}/final if you like."
        )
    if steps is not None and steps <= (iteration - 1) * samples:
        raise UsageError(
            f"--total_steps is {steps:,}, and the run has done {iteration * samples:,}: expected more, or leave it out."
        )


def in_words(changes: Changes, done: int, what: str = "iteration") -> str:
    """Returns what is new, for the header."""
    said = [f"{name} {before} -> {now}" for name, (before, now) in changes.items()]
    return f"{', '.join(said)}, from {what} {done + 1} on"


def write_down(run_dir: Path, changes: Mapping[str, tuple[Any, Any]], iteration: int) -> None:
    """Adds a line to changes.jsonl."""
    row = {
        "iteration": iteration,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "changes": {name: list(pair) for name, pair in changes.items()},
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
    }
    with (run_dir / CHANGES).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def keep_the_end(run_dir: Path, env_steps: int) -> None:
    """Renames what a finished run ended with, so that the longer one can end with its own: final-32000 and so on."""
    for name in OF_THE_END:
        path = run_dir / name
        if path.exists():
            path.rename(path.with_name(f"{path.stem}-{env_steps}{path.suffix}"))
    best, copy = run_dir / BEST, run_dir / f"{BEST}-{env_steps}"
    if best.is_dir() and not copy.exists():  # it stays the one to beat
        write_folder(copy, functools.partial(_copy, best))


def _copy(folder: Path, to: Path) -> None:
    shutil.copytree(folder, to, dirs_exist_ok=True)


def keep_changes(command: PPOCommand | SFTCommand | DPOCommand, run_dir: Path, changes: Changes, done: int) -> None:
    """Writes down what is new of a run that goes on; of the machine's settings config.yaml keeps the run's own.

    Args:
        command: the settings now.
        run_dir: the run folder.
        changes: what is new.
        done: iterations or steps so far.
    """
    if not changes:
        return
    write_down(run_dir, changes, done)
    if isinstance(command, PPOCommand):
        command = dataclasses.replace(command, workers=_settings_of(PPOCommand, run_dir).workers)
    write_config(run_dir, command)
