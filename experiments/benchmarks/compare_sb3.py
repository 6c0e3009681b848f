"""Env steps and seconds to 95 % success on held-out episodes: our policy beside Stable-Baselines3's PPO with a CNN.

    python experiments/benchmarks/compare_sb3.py
    python experiments/benchmarks/compare_sb3.py --seeds 1 --output comparison.json

Both play the same training episodes with the same PPO settings (experiments/configs/goto.yaml), evaluated greedily on
the same held-out seeds every few updates; the time of evaluations and of building is left out. The CNN is given the
named colour as a one-hot, ours reads the instruction. The learning rate of each decays over its own budget of steps.
Needs stable-baselines3 (extra: compare).
"""

import dataclasses
import importlib.util
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

from manako.experiments.benchmarks.settings import CompareCommand, CompareSettings  # noqa: E402
from manako.experiments.common.command_line import UsageError, check_new_file, parse, run_main, show  # noqa: E402


def main() -> int:
    """Runs one comparison; returns the exit code."""
    given = read_line()
    if importlib.util.find_spec("stable_baselines3") is None:
        raise UsageError('The comparison needs stable-baselines3, which is not installed: pip install -e ".[compare]"')
    show("comparison", f"{given.env}, {given.seeds} seeds")
    from manako.experiments.benchmarks.sb3_ppo import compare  # torch and all

    load = os.getloadavg()
    runs = compare(given)
    if given.output:
        about = {"settings": dataclasses.asdict(given), "load_average": [load, os.getloadavg()]}
        Path(given.output).write_text(json.dumps({**about, "runs": runs}, indent=2), encoding="utf-8")
    return 0


def read_line(arguments: Sequence[str] | None = None) -> CompareSettings:
    """Returns the settings of these words, by default of this program's command line."""
    about = "Steps and seconds to a success rate: ours and Stable-Baselines3."
    given = parse(CompareCommand, about, arguments).comparison
    check_new_file(given.output, "--output")
    return given


if __name__ == "__main__":
    run_main(main)
