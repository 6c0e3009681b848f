"""What a policy of vision tokens imagines: the next frame of held-out episodes, beside the one that came.

    python experiments/imagine.py --policy runs/.../final --gif imagined.gif
    python experiments/imagine.py --policy runs/.../final --player expert --episodes 200 --output imagined.json

From each frame and the action taken on it the policy says the next frame, one code after another, greedily; the share
of frames with every code right stands beside that of copying the frame before. Then it imagines whole episodes from
their first frame and actions alone, by what it imagined before. A run's folder brings its environment along. Who acts
need not be the policy: chance, by default, sees more of what can happen. An existing file is never overwritten.
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

from manako.experiments.common.command_line import CommandLine, run_main, show  # noqa: E402
from manako.experiments.common.played_policy import read_played, with_the_runs  # noqa: E402
from manako.experiments.common.run_folder import writing  # noqa: E402
from manako.experiments.common.settings import ImagineCommand  # noqa: E402


def main() -> int:
    """Imagines once; returns the exit code."""
    line = read_line()
    command = with_the_runs(line)
    show("imagining", f"{line.settings.policy.policy} on {command.environment.env}, {command.run.player} acts")
    with writing("--output or --gif", command.run.output, command.run.gif):
        from manako.experiments.common.imagining import run_imagination  # torch and all

        return run_imagination(command, line.settings.policy.policy)


def read_line(arguments: Sequence[str] | None = None) -> CommandLine[ImagineCommand]:
    """Returns the settings of these words, by default of this program's command line.

    Raises:
        UsageError: no policy, or files of results that exist.
    """
    description = "Imagines the frames of held-out episodes, beside real ones."
    return read_played(ImagineCommand, description, "the run folder of a policy of vision tokens", arguments)


if __name__ == "__main__":
    run_main(main)
