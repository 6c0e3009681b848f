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
        change nothing that is learned.
the machine
        workers, threads: nothing is learned otherwise but for rounding (see `rollout_batch_size`).

Everything else makes another run. Light to import.
"""

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manako.experiments.common.command_line import CommandLine, UsageError, build, flat, read_settings
from manako.experiments.common.settings import OF_THE_MACHINE, PPOCommand, moved

RATES = ("learning_rate", "adapter_learning_rate", "lr_scheduler_type")
EVALUATION = ("eval_episodes", "eval_steps", "gif_episodes")
SAVING = ("save_every", "save_minutes", "keep_checkpoints")
CHANGEABLE = (*RATES, "total_steps", *EVALUATION, *SAVING, "torch_threads")
CHANGES = "changes.jsonl"
OF_THE_END = ("final", "evaluation.json", "episodes.json", "after.gif", "learning_curve.png")

Changes = dict[str, tuple[Any, Any]]  # name of a setting -> what it was, what it is now


def goes_on(line: CommandLine[PPOCommand], run_dir: Path) -> tuple[PPOCommand, Changes]:
    """Returns a run's settings with what came with `--resume`, and what of them is new.

    Raises:
        UsageError: a setting came that a run keeps from its start, or one that this run cannot take.
    """
    kept = sorted(line.given - {"resume", *OF_THE_MACHINE, *CHANGEABLE})
    command = build(PPOCommand, read_settings(PPOCommand, str(run_dir / "config.yaml")))
    if kept:
        raise UsageError(
            f"--resume goes on with the run's own settings, but --{kept[0]} came too: leave it out; only "
            f"{', '.join(CHANGEABLE)} and where it is computed may change."
        )
    workers = moved(command.workers, line.given, line.settings.workers)
    given = {name: value for name, value in _values(line.settings).items() if name in line.given & set(CHANGEABLE)}
    ppo = dataclasses.replace(command.ppo, **{name: value for name, value in given.items() if name in RATES})
    run = dataclasses.replace(command.run, **{name: value for name, value in given.items() if name not in RATES})
    new = dataclasses.replace(command, ppo=ppo, run=run, workers=workers)
    for settings in (command.ppo, new.ppo):
        if (settings.adapter_learning_rate in (None, settings.learning_rate)) != (
            command.ppo.adapter_learning_rate in (None, command.ppo.learning_rate)
        ):
            raise UsageError(
                f"--adapter_learning_rate is {new.ppo.adapter_learning_rate} beside --learning_rate "
                f"{new.ppo.learning_rate}, and the run had {command.ppo.adapter_learning_rate} beside "
                f"{command.ppo.learning_rate}: a resumed run keeps whether the adapter has a rate of its own."
            )
    before, after = _values(command), _values(new)
    return new, {name: (before[name], after[name]) for name in after if before[name] != after[name]}


def _values(command: PPOCommand) -> dict[str, Any]:
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


def in_words(changes: Changes, iteration: int) -> str:
    """Returns what is new, for the header."""
    said = [f"{name} {before} -> {now}" for name, (before, now) in changes.items()]
    return f"{', '.join(said)}, from iteration {iteration + 1} on"


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
