"""Trains a VLM policy with PPO on the rendered frames of an environment.

    python experiments/run_ppo.py                          GoTo, as experiments/configs/goto.yaml says
    python experiments/run_ppo.py --config experiments/configs/frozen_lake.yaml --seed 1
    python experiments/run_ppo.py --env my_module:MyEnv-v0 --policy smollm2 --trainable lora
    python experiments/run_ppo.py --resume runs/...

In order: environments, policy, before.gif, training, evaluation beside a random policy and two controls, after.gif. All
of it lands in a run folder (see the README); an existing one is never overwritten. Ctrl-C or SIGTERM saves a checkpoint
at the end of the iteration and prints the command that goes on from it, as does whatever else ends it. What may change
then, such as --learning_rate and --total_steps, is in experiments/common/resuming.py.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Threads that wait for work sleep instead of spinning: else a second process on the machine slows both tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.experiments.common.stopping import answer_signals  # noqa: E402

if __name__ == "__main__":
    answer_signals()  # while the rest is imported

from manako.experiments.common.command_line import (  # noqa: E402
    CommandLine,
    read_command_line,
    run_main,
    show,
    show_loading,
)
from manako.experiments.common.resuming import starting  # noqa: E402
from manako.experiments.common.settings import GOTO, PPOCommand, check_together  # noqa: E402
from manako.experiments.common.what_learns import with_trainable  # noqa: E402


def main() -> int:
    """Runs one run, new or resumed; returns the exit code."""
    started = time.perf_counter()
    line = read_line()
    # What can be refused is refused before anything is written, and before the heavy imports where it can be.
    with starting(line) as start:
        show("run", start.in_words())
        if line.file is not None:
            names = {str(GOTO): str(GOTO.relative_to(ROOT))}  # as the README calls it, wherever this is started
            show("settings", names.get(line.file, "given as text" if line.file.startswith("{") else line.file))
        command = with_trainable(start.command)
        check_together(command)
        show_loading("nothing was begun, give the same command again")
        from manako.experiments.common.ppo_training import train  # torch and all

        return train(dataclasses.replace(start, command=command), started)


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


if __name__ == "__main__":
    run_main(main)
