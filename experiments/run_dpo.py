"""Preference optimisation with TRL's DPO or KTO trainer, on pairs made of trajectories; round after round if wanted.

    python experiments/run_dpo.py --policy runs/.../final --dataset data/goto --pairs expert
    python experiments/run_dpo.py --policy runs/.../final --rounds 3 --pairs return --method kto
    python experiments/run_dpo.py --policy runs/.../final --pairs remote --remote_model gpt-4o-mini
    python experiments/run_dpo.py --resume runs/...

A round: trajectories (the dataset in the first one if given, else the policy's own, sampled), pairs, training against
the policy as it was, evaluation. See agent/tuning/preferences.py for how pairs are made.
"""

import dataclasses
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

from manako.experiments.common.command_line import (  # noqa: E402
    CommandLine,
    read_command_line,
    run_main,
    show,
    show_loading,
)
from manako.experiments.common.remote import asking, check_flags  # noqa: E402
from manako.experiments.common.resuming import starting  # noqa: E402
from manako.experiments.common.settings import DPOCommand  # noqa: E402
from manako.experiments.common.what_learns import with_trainable  # noqa: E402
from manako.policies.remote.settings import REMOTE  # noqa: E402


def main() -> int:
    """Runs all rounds; returns the exit code."""
    started = time.perf_counter()
    line = read_line()
    remote = line.settings.remote if line.settings.dpo.pairs == REMOTE else None
    with starting(line) as start, asking(remote):
        show("run", start.in_words("the start of its round"))
        command = with_trainable(start.command)
        show_loading()
        from manako.experiments.common.dpo_training import train  # torch and all

        return train(dataclasses.replace(start, command=command), started)


def read_line(arguments: Sequence[str] | None = None) -> CommandLine[DPOCommand]:
    """Returns the settings of these words, by default of this program's command line.

    Raises:
        UsageError: settings of a server that is not asked.
    """
    line = read_command_line(DPOCommand, "Preference optimisation with TRL on pairs made of trajectories.", arguments)
    check_flags(DPOCommand, line.given, "pairs", line.settings.dpo.pairs)
    return line


if __name__ == "__main__":
    run_main(main)
