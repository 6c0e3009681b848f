"""Trains a VLM policy with PPO on the rendered frames of an environment.

    python experiments/run_ppo.py                          GoTo, as experiments/configs/goto.yaml says
    python experiments/run_ppo.py --config experiments/configs/frozen_lake.yaml --seed 1
    python experiments/run_ppo.py --env my_module:MyEnv-v0 --policy smollm2 --trainable lora
    python experiments/run_ppo.py --resume runs/...

In order: environments, policy, before.gif, training, evaluation beside a random policy and two controls, after.gif. All
of it lands in a run folder (see the README); an existing one is never overwritten. Ctrl-C or SIGTERM saves a checkpoint
at the end of the iteration and prints the command that goes on from it.
"""

import contextlib
import dataclasses
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

# Threads that wait for work sleep instead of spinning: else a second process on the machine slows both tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.agent.checkpoint import OF_A_RUN, latest_checkpoint  # noqa: E402
from manako.experiments.common.command_line import (  # noqa: E402
    CommandLine,
    UsageError,
    build,
    checked_sections,
    read_command_line,
    run_main,
    show,
    show_loading,
)
from manako.experiments.common.named_modules import check_named  # noqa: E402
from manako.experiments.common.run_folder import (  # noqa: E402
    check_job_folder,
    going_on,
    making,
    new_run_dir,
    read_run_settings,
)
from manako.experiments.common.settings import GOTO, OF_THE_MACHINE, PPOCommand, check_together, moved  # noqa: E402
from manako.experiments.common.what_learns import with_trainable  # noqa: E402


def main() -> int:
    """Runs one run, new or resumed; returns the exit code."""
    started = time.perf_counter()
    line = read_line()
    # What can be refused is refused before anything is written, and before the heavy imports where it can be.
    with contextlib.ExitStack() as stack:
        if line.settings.run.resume:
            stack.enter_context(going_on(run_to_resume(line)))
            command, run_dir, checkpoint = resumed(line)
        else:
            command, run_dir, checkpoint = line.settings, new_run_dir(line.settings), None
            stack.enter_context(making(run_dir))
        return run(line, command, run_dir, checkpoint, started)


def run(
    line: CommandLine[PPOCommand], command: PPOCommand, run_dir: Path, checkpoint: Path | None, started: float
) -> int:
    """Runs what `main` has found, in a folder that it holds; returns the exit code."""
    show("run", f"{run_dir}" + (f", from {checkpoint.name}" if checkpoint else ""))
    if line.file is not None:
        names = {str(GOTO): str(GOTO.relative_to(ROOT))}  # as the README calls it, wherever this is started
        show("settings", names.get(line.file, "given as text" if line.file.startswith("{") else line.file))
    command = with_trainable(command)
    check_together(command)
    show_loading()
    from manako.experiments.common.ppo_training import train  # torch and all

    return train(command, run_dir, checkpoint, started)


def read_line(arguments: Sequence[str] | None = None) -> CommandLine[PPOCommand]:
    """Returns the settings of these words, by default of this program's command line.

    Without --env, --config and --resume they are GoTo's.
    """
    return read_command_line(
        PPOCommand,
        "Trains a VLM policy with PPO on the frames of an environment. Without --env, --config and --resume it is "
        "given\nexperiments/configs/goto.yaml; the defaults below are those for any environment.",
        arguments,
        file_without=(GOTO, ("env", "resume")),
    )


def run_to_resume(line: CommandLine[PPOCommand]) -> Path:
    """Returns the folder of the run to go on with.

    Raises:
        UsageError: no run there.
    """
    run_dir = Path(str(line.settings.run.resume))
    check_job_folder(str(run_dir), "--resume")
    if not (run_dir / "config.yaml").is_file():
        raise UsageError(f"--resume {str(run_dir)!r} is no run: expected a folder with config.yaml and checkpoints.")
    return run_dir


def resumed(line: CommandLine[PPOCommand]) -> tuple[PPOCommand, Path, Path]:
    """Returns the settings of the run to go on with, its folder and its last whole checkpoint.

    Raises:
        UsageError: no run there, a finished one, no whole checkpoint, or other flags beside --resume.
    """
    run_dir = run_to_resume(line)
    changed = sorted(line.given - {"resume", "env", *OF_THE_MACHINE})
    if changed:
        raise UsageError(f"--resume goes on with the run's own settings, but --{changed[0]} came too: leave it out.")
    if (run_dir / "evaluation.json").exists():
        raise UsageError(
            f"The run in {str(run_dir)!r} is finished: start a new one, with --policy {run_dir}/final if you like."
        )
    file = run_dir / "config.yaml"
    command = build(PPOCommand, checked_sections(PPOCommand, read_run_settings(file), str(file)))
    if "env" in line.given and line.settings.environment.env != command.environment.env:
        raise UsageError(
            f"--env {line.settings.environment.env} came, and the run in {str(run_dir)!r} is of "
            f"{command.environment.env}: leave it out, or start a new run."
        )
    check_named(command.environment.env, f"The run {str(run_dir)!r}")
    command = dataclasses.replace(command, workers=moved(command.workers, line.given, line.settings.workers))
    with warnings.catch_warnings(record=True) as faults:
        warnings.simplefilter("always")
        checkpoint = latest_checkpoint(run_dir, OF_A_RUN)
    found = "; ".join(str(fault.message).removeprefix("Passed over: ").split(";")[0] for fault in faults)
    if checkpoint is None:
        raise UsageError(
            f"{run_dir} holds no whole checkpoint ({found or 'none was written'}): start a new run without --resume."
        )
    if found:
        print(f"warning: {found}; going on from {checkpoint.name}", file=sys.stderr)
    return command, run_dir, checkpoint


if __name__ == "__main__":
    run_main(main)
