"""The same task paid in other units: success in training with and without `scale_returns`, a curve a unit.

    python experiments/benchmarks/reward_scale.py --chart docs/reward_scale.png
    python experiments/benchmarks/reward_scale.py --seeds 1 --total_steps 4096

Every reward is multiplied by 0.01, 1 or 100; environment, policy, seeds and all other settings are the same, those of
run_ppo.py without flags. Success does not depend on the unit, since the environment says it.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.experiments.benchmarks.settings import RewardScaleCommand, RewardScaleSettings  # noqa: E402
from manako.experiments.common.command_line import check_new_file, parse, run_main, show  # noqa: E402


def main() -> int:
    """Runs one comparison; returns the exit code."""
    given = read_line()
    show("comparison", f"{given.env}, {given.seeds} seeds, rewards times 0.01, 1 and 100")
    from manako.experiments.benchmarks.paying import compare, draw, print_comparison  # torch and all

    runs = compare(given)
    print_comparison(runs, given.total_steps)
    if given.chart:
        draw(runs, Path(given.chart), given.env)
    if given.output:
        Path(given.output).write_text(json.dumps(runs, indent=2), encoding="utf-8")
    return 0


def read_line(arguments: Sequence[str] | None = None) -> RewardScaleSettings:
    """Returns the settings of these words, by default of this program's command line."""
    about = "Learning from rewards in several units, with and without scale_returns."
    given = parse(RewardScaleCommand, about, arguments).benchmark
    check_new_file(given.output, "--output")
    return given


if __name__ == "__main__":
    run_main(main)
