"""Measures how fast a policy writes its answers, beside the library's `generate` for one environment after the other.

    python experiments/benchmarks/writing.py --threads 1
    python experiments/benchmarks/writing.py --threads 1 --policy smollm2 --repeats 3

In turns, by the same model and weights, which writes answers of the same length in both ways: all environments in one
batch that goes on from one beginning of all prompts; and per environment the library's processor and `generate`, which
samples and returns its scores, as RL4VLM (https://github.com/RL4VLM/RL4VLM) acts.
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

from manako.experiments.benchmarks.settings import WritingCommand, WritingSettings  # noqa: E402
from manako.experiments.common.command_line import check_new_file, parse, run_main, show  # noqa: E402


def main() -> int:
    """Runs one benchmark; returns the exit code."""
    given = read_line()
    show("benchmark", f"{given.policy} on {given.env}, {given.num_envs} envs, answers of {given.answer_tokens} tokens")
    from manako.experiments.benchmarks.writing_measuring import measure  # torch and all

    results = measure(given)
    if given.output:
        Path(given.output).write_text(json.dumps(results, indent=2), encoding="utf-8")
    return 0


def read_line(arguments: Sequence[str] | None = None) -> WritingSettings:
    """Returns the settings of these words, by default of this program's command line."""
    about = "Measures answers in text: a batch that goes on from shared prompts, and generate per environment."
    given = parse(WritingCommand, about, arguments).benchmark
    check_new_file(given.output, "--output")
    return given


if __name__ == "__main__":
    run_main(main)
