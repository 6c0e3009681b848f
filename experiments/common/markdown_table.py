"""A Markdown table that a command writes, in a new file or between its markers in one. No torch here."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from manako.experiments.common.command_line import UsageError

END = "<!-- end of the table -->"


class MarkdownTable(NamedTuple):
    """Where a command's table stands.

    Attributes:
        command: in the marker above the table.
        headings: of its columns.
    """

    command: str
    headings: Sequence[str]

    @property
    def begin(self) -> str:
        """The line above it."""
        return f"<!-- written by {self.command} -->"

    def text(self, rows: Sequence[Sequence[str]]) -> str:
        """Returns the table, its markers around it."""
        lines = [self.headings, ["---"] * len(self.headings), *rows]
        return "\n".join([self.begin, *(f"| {' | '.join(line)} |" for line in lines), END]) + "\n"

    def check(self, file: str | None) -> None:
        """Checks where it goes.

        Raises:
            UsageError: the file exists without markers, or its folder does not exist.
        """
        if file is None:
            return
        path = Path(file)
        markers = {self.begin, END}
        if path.exists() and not (path.is_file() and markers <= {*path.read_text(encoding="utf-8").splitlines()}):
            raise UsageError(
                f"--table {file!r} exists and holds no lines {self.begin!r} and {END!r} for a table to stand between: "
                "give a new file, or write them there."
            )
        if not path.resolve().parent.is_dir():
            raise UsageError(f"The folder of --table {file!r} does not exist: make it or give another file.")

    def write(self, path: Path, rows: Sequence[Sequence[str]]) -> None:
        """Writes it into a new file, or between the markers of one that `check` has seen."""
        text = path.read_text(encoding="utf-8") if path.exists() else f"{self.begin}\n{END}\n"
        before, rest = text.split(self.begin, 1)
        after = rest.split(f"{END}\n", 1)[1]
        path.write_text(before + self.text(rows) + after, encoding="utf-8")
