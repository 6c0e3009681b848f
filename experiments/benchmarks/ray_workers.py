"""What rollout workers bring and cost on this machine, side by side in one run, and what that means for many of them.

    python experiments/benchmarks/ray_workers.py
    python experiments/benchmarks/ray_workers.py --env FrozenLake-v1 --env_kwargs '{"is_slippery": false}'
    python experiments/benchmarks/ray_workers.py --policy smollm2 --trainable lora --num_envs 8 --num_steps 2

Measured in turns: a rollout by one worker and by two (each on one core), a local rollout on one core, the same through
ray-env, an update. Then the terms of `throughput` are printed (env step, forward, transfer, update) and its table for 1
to 1,000 workers, which docs/scaling.md discusses.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.experiments.benchmarks.settings import RayBenchmarkCommand, RayBenchmarkSettings  # noqa: E402
from manako.experiments.benchmarks.throughput import print_throughput  # noqa: E402
from manako.experiments.common.command_line import UsageError, check_new_file, parse, run_main, show  # noqa: E402


def main() -> int:
    """Runs one benchmark; returns the exit code."""
    given = read_line()
    show("benchmark", f"{given.policy} on {given.env}, {given.num_envs} environments, {given.repeats} turns")
    from manako.experiments.benchmarks.ray_measuring import measure  # torch, ray and all

    load = os.getloadavg()
    seconds, terms, torch_version = measure(given)
    print_throughput(given, seconds, terms, load)
    if given.output:
        results: dict[str, Any] = {"settings": vars(given), "seconds": seconds, "terms": vars(terms)}
        results |= {"load_average": [load, os.getloadavg()], "torch": torch_version}
        Path(given.output).write_text(json.dumps(results, indent=2), encoding="utf-8")
    return 0


def read_line(arguments: Sequence[str] | None = None) -> RayBenchmarkSettings:
    """Returns the settings of these words, by default of this program's command line.

    Raises:
        UsageError: an odd number of environments, or a file of results that exists.
    """
    given = parse(RayBenchmarkCommand, "Measures rollout workers against one process.", arguments).benchmark
    if given.num_envs % 2:
        raise UsageError(f"--num_envs is {given.num_envs}: expected an even number, for one worker and for two.")
    check_new_file(given.output, "--output")
    return given


if __name__ == "__main__":
    run_main(main)
