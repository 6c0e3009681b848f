"""Texts of others in a Markdown file: nothing in them is read as Markdown, HTML or the end of what they stand in."""

import re
import unicodedata
from collections.abc import Sequence

from manako.plain import printable

LONGEST = 80  # characters of a code span
UNSEEN = ("Cf", "Co", "Zl", "Zp")  # Unicode's categories of what is not seen, or turns the direction of writing


def code(text: str) -> str:
    """Returns a text as a code span of one line; a long one is cut."""
    plain = " ".join(_seen(text).split())
    if len(plain) > LONGEST:
        plain = plain[:LONGEST] + "..."
    fence = "`" * (1 + _longest_run(plain))
    space = " " if not plain or "`" in (plain[0], plain[-1]) else ""
    return f"{fence}{space}{plain}{space}{fence}"


def fenced(text: str, language: str = "") -> str:
    """Returns a text as a code block that nothing in it ends."""
    fence = "`" * max(3, 1 + _longest_run(text))
    return f"{fence}{language}\n{_seen(text).rstrip()}\n{fence}"


def bullets(lines: Sequence[str]) -> str:
    """Returns lines of Markdown as a list."""
    return "\n".join(f"- {line}" for line in lines)


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns cells of Markdown as a table."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (headings, ["---"] * len(headings), *rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _seen(text: str) -> str:
    """Returns a text with the characters written out that are not seen, or are obeyed."""
    shown = "".join(char if unicodedata.category(char) not in UNSEEN else f"\\u{ord(char):04x}" for char in text)
    return printable(shown)


def _longest_run(text: str) -> int:
    """Of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)
