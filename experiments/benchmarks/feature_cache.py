"""Measures what it saves to store a frozen encoder's features instead of computing them again in every update.

    python experiments/benchmarks/feature_cache.py
    python experiments/benchmarks/feature_cache.py --vision_encoder efficientnet_lite0 --minibatch_size 32

Updates and rollouts with the features stored and without, in turns, by the same policy: tables and the JSON file give
the median and the range over the turns.
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

from manako.experiments.benchmarks.settings import FeatureCacheCommand, FeatureCacheSettings  # noqa: E402
from manako.experiments.common.command_line import check_new_file, parse, run_main, show  # noqa: E402


def main() -> int:
    """Runs one benchmark; returns the exit code."""
    given = read_line()
    encoder = given.vision_encoder or f"the encoder of {given.policy}"
    show("benchmark", f"{encoder} on {given.env}, trainable: {given.trainable}")
    from manako.experiments.benchmarks.feature_measuring import measure  # torch and all

    results = measure(given)
    if given.output:
        Path(given.output).write_text(json.dumps(results, indent=2), encoding="utf-8")
    return 0


def read_line(arguments: Sequence[str] | None = None) -> FeatureCacheSettings:
    """Returns the settings of these words, by default of this program's command line."""
    about = "Measures updates and rollouts with a frozen encoder's features stored and without."
    given = parse(FeatureCacheCommand, about, arguments).benchmark
    check_new_file(given.output, "--output")
    return given


if __name__ == "__main__":
    run_main(main)
