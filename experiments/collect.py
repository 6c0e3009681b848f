"""Records trajectories: a scripted expert's, a policy's, a random player's or a person's, as a Hugging Face dataset.

    python experiments/collect.py --env manako/GoTo-v0 --episodes 500 --output data/goto
    python experiments/collect.py --env manako/GoTo-v0 --error_rate 0.3 --episodes 500 --output data/wrong
    python experiments/collect.py --player policy --policy runs/.../final --episodes 500 --output data/own

    python experiments/collect.py --player recorded --recording play.jsonl --output data/human
    python experiments/collect.py --player remote --remote_model gpt-4o-mini --episodes 50 --output data/gpt

The episodes are those of seeds that are fixed beforehand, whatever --num_envs is, and each is played to its end. None
of the seeds is a held-out episode's. With --group_size G, every G episodes have the same seed, for preferences between
them. A recording (by experiments/play.py, by hand, or a folder that this runner wrote; agent/data/recordings.py
says how it is written) names its own seeds (odd ones are pointed out, since held-out episodes have such), and each of
its episodes becomes one of the dataset, in the same order.
"""

import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.experiments.common.stopping import answer_signals  # noqa: E402

if __name__ == "__main__":
    answer_signals()  # while the rest is imported

import gymnasium as gym  # noqa: E402

from manako.agent.data.recordings import Recording, read_recordings  # noqa: E402
from manako.experiments.common.command_line import (  # noqa: E402
    UsageError,
    read_command_line,
    run_main,
    show,
    show_loading,
)
from manako.experiments.common.environments import ignored_seeds_of, knows_expert, make_vector_env  # noqa: E402
from manako.experiments.common.remote import asking, check_flags  # noqa: E402
from manako.experiments.common.run_folder import writing  # noqa: E402
from manako.experiments.common.settings import CollectCommand, check_workers  # noqa: E402
from manako.policies.remote.settings import REMOTE  # noqa: E402


def main() -> int:
    """Makes one recording; returns the exit code."""
    started = time.perf_counter()
    command = read_line()
    with writing("--output", command.run.output):
        return record(command, started)


def record(command: CollectCommand, started: float) -> int:
    """Makes the recording of these settings, whose output is held; returns the exit code."""
    show("recording", f"{command.run.player} on {command.environment.env}, to {command.run.output}")
    with contextlib.closing(make_vector_env(command.environment, 1, command.run.seed, held_out=True)) as env:
        recordings = read_again(
            command, env.action_names, env.action_space
        )  # a fault in them shows before torch is loaded
        has_expert = knows_expert(env, needed=command.run.player == "expert")
        show("episodes", env.limit_from)
        unseeded = ignored_seeds_of(env, needed_for=_needs_seeds(command))
    if unseeded is not None:
        show("seeds", unseeded)
    with asking(command.remote if command.run.player == REMOTE else None):
        show_loading()
        from manako.experiments.common.collecting import collect  # torch and all

        return collect(command, recordings, has_expert, unseeded, started)


def read_line(arguments: Sequence[str] | None = None) -> CollectCommand:
    """Returns the settings of these words, by default of this program's command line.

    Raises:
        UsageError: no output, or settings of another player.
    """
    line = read_command_line(CollectCommand, "Records trajectories as a Hugging Face dataset.", arguments)
    command, run = line.settings, line.settings.run
    check_flags(CollectCommand, line.given, "player", run.player)
    if not run.output:
        raise UsageError("--output is missing: give the folder of the new dataset.")
    if Path(run.output).exists():
        raise UsageError(f"{run.output!r} exists and is not overwritten: give another --output.")
    if run.error_rate and run.player != "expert":
        raise UsageError(f"--error_rate is the expert's, and --player is {run.player}: leave it out.")
    if run.player == "recorded":
        _check_recorded(command)
    elif run.recording is not None:
        raise UsageError(f"--recording is for --player recorded, and --player is {run.player}: leave one out.")
    check_workers(command.workers, command.environment.num_envs)
    return command


def _check_recorded(command: CollectCommand) -> None:
    """Checks what holds between the settings of recorded play."""
    run, backend = command.run, command.workers.rollout_backend
    if run.recording is None:
        raise UsageError("--recording is missing: give the file that --player recorded plays again.")
    for name, is_given in (("episodes", run.episodes is not None), ("group_size", run.group_size > 1)):
        if is_given:
            raise UsageError(f"--{name} is for other players, a recording is played as it is: leave it out.")
    if backend != "local":
        raise UsageError(
            f"--player recorded plays in this process, and --rollout_backend is {backend}: expected local."
        )


def _needs_seeds(command: CollectCommand) -> str | None:
    """What cannot be done where the environment ignores its seeds, and what to do instead."""
    run = command.run
    if run.player == "recorded":
        return "so what was recorded cannot be played again: record with another player"
    if run.group_size > 1:
        return f"so no --group_size {run.group_size} of them can begin alike: leave it out"
    return None


def read_again(
    command: CollectCommand, action_names: tuple[str, ...], action_space: gym.Space | None = None
) -> list[Recording]:
    """Returns the episodes to play again, none for the other players; odd seeds are pointed out."""
    played, recording = command.environment, command.run.recording
    if recording is None:
        return []
    recordings = read_recordings(recording, played.env, action_names, played.made_with, action_space)
    odd = sum(recording.seed % 2 for recording in recordings)
    if odd:
        print(
            f"warning: {odd:,} of {len(recordings):,} recorded seeds are odd, as those of held-out episodes are: do "
            "not train on what a policy is evaluated on.",
            file=sys.stderr,
        )
    return recordings


if __name__ == "__main__":
    run_main(main)
