"""Evaluates a policy on held-out seeds, beside a random policy and two controls.

    python experiments/evaluate.py --policy runs/.../final
    python experiments/evaluate.py --policy tiny --env FrozenLake-v1 --env_kwargs '{"is_slippery": false}'
    python experiments/evaluate.py --policy remote --remote_model gpt-4o-mini

A run's folder, or a checkpoint in it, brings its environment and settings along. Prints the table of run_ppo.py and,
with --output, writes it as JSON; --gif draws episodes. An existing file is never overwritten.
"""

import os
import sys
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

from manako.experiments.common.command_line import CommandLine, run_main, show, show_loading  # noqa: E402
from manako.experiments.common.played_policy import read_played, with_the_runs  # noqa: E402
from manako.experiments.common.remote import asking, check_flags  # noqa: E402
from manako.experiments.common.run_folder import writing  # noqa: E402
from manako.experiments.common.settings import EvaluateCommand  # noqa: E402
from manako.policies.remote.settings import REMOTE  # noqa: E402


def main() -> int:
    """Runs one evaluation; returns the exit code."""
    line = read_line()
    command = with_the_runs(line)
    show("evaluating", f"{line.settings.policy.policy} on {command.environment.env}")
    held = writing("--output or --gif", command.run.output, command.run.gif)
    with held, asking(command.remote if command.policy.policy == REMOTE else None):
        show_loading()
        from manako.experiments.common.evaluating import run_evaluation  # torch and all

        return run_evaluation(command, line.settings.policy.policy)


def read_line(arguments: Sequence[str] | None = None) -> CommandLine[EvaluateCommand]:
    """Returns the settings of these words, by default of this program's command line.

    Raises:
        UsageError: no policy, files of results that exist, or settings of a server that is not asked.
    """
    expected = "a run folder, a checkpoint, a model folder, a Hub id, a preset, or remote"
    line = read_played(EvaluateCommand, "Evaluates a policy on held-out seeds, with controls.", expected, arguments)
    check_flags(EvaluateCommand, line.given, "policy", line.settings.policy.policy)
    return line


if __name__ == "__main__":
    run_main(main)
