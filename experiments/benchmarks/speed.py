"""Measures speed and memory side by side in one run: rollouts, updates, trainer, preprocessing, share of the GEMM rate.

    python experiments/benchmarks/speed.py --policy tiny
    python experiments/benchmarks/speed.py --policy smollm2 --output smollm2.json

Everything is measured in turns (ours, the other, ours, the other, ...) and compared within a turn; tables and the JSON
file give the median and the range over the turns. What stands beside ours is in acting.py and updating.py, how FLOPs
are counted in flops.py. Peak memory is that of a fresh process for each variant (memory.py), started before torch is
imported here. Numbers are of the machine and of the moment: the JSON file holds the load average before and after.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would print when it starts and stops
ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.experiments.benchmarks.memory import peak_memory  # noqa: E402
from manako.experiments.benchmarks.settings import SpeedCommand, SpeedSettings  # noqa: E402
from manako.experiments.benchmarks.workload import make_workload  # noqa: E402
from manako.experiments.common.command_line import check_new_file, parse, run_main, show  # noqa: E402


def main() -> int:
    """Runs one benchmark; returns the exit code."""
    given = read_line()
    workload = make_workload(given)
    load = os.getloadavg()
    show("benchmark", f"{workload.policy} on {workload.env}, {workload.num_envs} environments; peak memory first")
    memory = peak_memory(workload)
    from manako.experiments.benchmarks.speed_report import measure  # torch and all

    results = measure(workload, memory, load)
    if given.output:
        Path(given.output).write_text(json.dumps(results, indent=2), encoding="utf-8")
    return 0


def read_line(arguments: Sequence[str] | None = None) -> SpeedSettings:
    """Returns the settings of these words, by default of this program's command line."""
    given = parse(SpeedCommand, "Measures speed and memory side by side in one run.", arguments).speed
    check_new_file(given.output, "--output")
    return given


if __name__ == "__main__":
    run_main(main)
