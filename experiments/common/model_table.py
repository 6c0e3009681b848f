"""The Markdown table of check_model.py: a row a model, between two marker comments. No torch here."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from manako.experiments.common.command_line import UsageError

COMMAND = "python experiments/check_model.py FOLDER ... --table FILE"
BEGIN, END = f"<!-- written by {COMMAND} -->", "<!-- end of the table -->"


class Row(NamedTuple):
    """What holds for a model, each in a word or two."""

    family: str
    acts: str
    learns: str = "no"
    adapter: str = "no"
    lora: str = "no"
    shared_prefix: str = "no"
    needs: str = "nothing"


HEADINGS = Row("family", "acts", "learns", "adapter", "LoRA", "shared prefix", "needs")


def table_text(rows: Sequence[Row]) -> str:
    """Returns the table in Markdown, its markers around it."""
    lines = [HEADINGS, Row(*["---"] * len(HEADINGS)), *rows]
    return "\n".join([BEGIN, *(f"| {' | '.join(line)} |" for line in lines), END]) + "\n"


def check_table_file(file: str | None) -> None:
    """Checks where a table goes: into a new file, or between the markers of one.

    Raises:
        UsageError: the file exists without markers, or its folder does not exist.
    """
    if file is None:
        return
    path = Path(file)
    if path.exists() and not (path.is_file() and {BEGIN, END} <= {*path.read_text(encoding="utf-8").splitlines()}):
        raise UsageError(
            f"--table {file!r} exists and holds no lines {BEGIN!r} and {END!r} for a table to stand between: give a "
            "new file, or write them there."
        )
    if not path.resolve().parent.is_dir():
        raise UsageError(f"The folder of --table {file!r} does not exist: make it or give another file.")


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Writes the table into a new file, or between the markers of one that `check_table_file` has seen."""
    text = path.read_text(encoding="utf-8") if path.exists() else f"{BEGIN}\n{END}\n"
    before, rest = text.split(BEGIN, 1)
    after = rest.split(f"{END}\n", 1)[1]
    path.write_text(before + table_text(rows) + after, encoding="utf-8")
