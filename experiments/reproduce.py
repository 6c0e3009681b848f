"""Runs a row of the README or of docs/results.md again, and says whether its figure lies in the stated interval.

    python experiments/reproduce.py goto
    python experiments/reproduce.py goto number_line --seed 1

experiments/results.yaml holds the rows: their command or ladder, the figures that are stated for each seed, and how
many configurations were tried before the one that stands there. A run that was stopped is gone on with by the same
command, and one that is finished is only read. Exit code 0 where every figure lies in its interval, 1 where one does
not.
"""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.experiments.common.stopping import answer_signals  # noqa: E402

if __name__ == "__main__":
    answer_signals()  # while the rest is imported

from manako.experiments.common import stopping  # noqa: E402
from manako.experiments.common.command_line import (  # noqa: E402
    UsageError,
    nearest,
    parse,
    read_json,
    read_yaml,
    run_main,
    section,
)
from manako.experiments.common.run_folder import write_text  # noqa: E402
from manako.experiments.run_ladder import call  # noqa: E402
from manako.settings import setting  # noqa: E402

ROWS = Path(__file__).resolve().parent / "results.yaml"


@dataclass(frozen=True)
class ReproduceSettings:
    """What is run again."""

    rows: tuple[str, ...] = setting((), "rows of experiments/results.yaml")
    seed: int | None = setting(None, "one of the seeds that figures are stated for; by default the first", ge=0)
    output_dir: str = setting("runs/reproduced", "folder of the runs, each in one of its own", is_path=True)


@dataclass(frozen=True)
class ReproduceCommand:
    """Settings of reproduce.py."""

    reproduce: ReproduceSettings = section(ReproduceSettings, "reproduce")


def main() -> int:
    """Runs the rows one after another; returns the exit code."""
    given = read_line()
    rows = read_yaml(ROWS)
    chosen = [(name, _row(rows, name), _seed(rows, name, given.seed)) for name in given.rows]
    inside = [reproduce(name, row, seed, Path(given.output_dir)) for name, row, seed in chosen]
    return 0 if all(inside) else 1


def read_line(arguments: Sequence[str] | None = None) -> ReproduceSettings:
    """Returns the settings of these words, by default of this program's command line."""
    about = "Runs rows of the results again; exit code 0 where every figure lies in its stated interval."
    return parse(ReproduceCommand, about, arguments, positional="rows").reproduce


def reproduce(name: str, row: Mapping[str, Any], seed: int, folder: Path) -> bool:
    """Runs a row, or goes on with it, or reads it where it is finished; says what came out.

    Args:
        name: the row's.
        row: its fields.
        seed: with which.
        folder: where runs lie.

    Returns:
        Whether every figure lies in its interval.
    """
    place = folder / f"{name}-seed{seed}"
    words = command(row, seed, place)
    print(f"{name}: {row['what']}, seed {seed}, some {row['minutes']} min\n  python {shlex.join(words)}", flush=True)
    if not (place / results_file(row)).is_file():
        code = call([str(ROOT / words[0]), *words[1:]])
        if code == stopping.STOPPED:
            raise KeyboardInterrupt
        if code:
            raise UsageError(f"The row {name!r} ended with exit code {code}: repair what it says above.")
    return compare(name, row, seed, read_json(place / results_file(row)))


def command(row: Mapping[str, Any], seed: int, place: Path) -> list[str]:
    """Returns the words after `python` that run a row, or go on with it; a ladder's file is written with its seed."""
    if "ladder" not in row:
        if (place / "config.yaml").is_file():
            return [row["run"], "--resume", str(place)]
        return [row["run"], *map(str, row.get("flags", [])), "--seed", str(seed), "--output_dir", str(place)]
    evaluated = ["--eval_episodes", str(row["episodes"])]
    if (place / "ladder.yaml").is_file():
        return ["experiments/run_ladder.py", "--resume", str(place), *evaluated]
    ladder = read_yaml(ROOT / row["ladder"])
    ladder["common"].setdefault("run", {})["seed"] = seed
    file = place.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, yaml.safe_dump(ladder, sort_keys=False, allow_unicode=True))
    return ["experiments/run_ladder.py", "--ladder", str(file), "--output_dir", str(place), *evaluated]


def results_file(row: Mapping[str, Any]) -> str:
    """Returns the file in a run's folder that holds its figures."""
    return "report.json" if "ladder" in row else "evaluation.json"


def compare(name: str, row: Mapping[str, Any], seed: int, found: Mapping[str, Any]) -> bool:
    """Prints each figure beside what is stated; returns whether all lie in their intervals."""
    measure, all_inside = row.get("measure", "success"), True
    for figure, (stated, low, high) in row["figures"][seed].items():
        value = figure_of(found, figure, measure)
        inside = low <= round(value, 1) <= high
        all_inside &= inside
        unit = " %" if measure == "success" else ""
        print(
            f"{name}, seed {seed}, {figure}: {measure} {value:.1f}{unit}, stated {stated}{unit} ({low} to {high}): "
            + ("inside" if inside else "OUTSIDE the interval")
        )
    tried = row.get("tried")
    print(f"  configurations tried before the one stated: {'not counted' if tried is None else tried}", flush=True)
    return all_inside


def figure_of(found: Mapping[str, Any], figure: str, measure: str) -> float:
    """Returns a figure of a run, in percent where it is a success.

    Args:
        found: what the run's file holds.
        figure: a row of evaluation.json; or a step of a ladder, and after a dot one of its further evaluations.
        measure: `success` or `return`.

    Raises:
        UsageError: it is not there.
    """
    step, _, evaluation = figure.partition(".")
    if "steps" in found:
        summary = next((each for each in found["steps"] if each["step"] == step), None)
    else:
        summary = found.get(step)
    if summary is not None and evaluation:
        summary = summary["evaluations"].get(evaluation)
    if summary is None:
        raise UsageError(f"The run has no figure {figure!r}: expected one that experiments/results.yaml names.")
    return 100 * float(summary["success"]) if measure == "success" else float(summary["return_mean"])


def _row(rows: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    if name not in rows:
        near = nearest(name, list(rows))
        hint = f"did you mean {near}? " if near else ""
        raise UsageError(f"There is no row {name!r}: {hint}expected one of {', '.join(rows)}.")
    row: Mapping[str, Any] = rows[name]
    return row


def _seed(rows: Mapping[str, Any], name: str, seed: int | None) -> int:
    stated: list[int] = list(_row(rows, name)["figures"])
    if seed is None:
        return stated[0]
    if seed not in stated:
        raise UsageError(
            f"--seed is {seed}: expected one that {name} states a figure for, {', '.join(map(str, stated))}."
        )
    return seed


if __name__ == "__main__":
    run_main(main)
