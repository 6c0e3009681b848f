"""docs/reliability.md: each test that it names exists, and CI runs it."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = [line.split("|")[1:-1] for line in TABLE.splitlines() if re.match(r"\| (?!fault \|)", line)]
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", TABLE)))


def marks(nodes: list[ast.expr]) -> set[str]:
    """The marks among decorators, or in what `pytestmark` is set to."""
    return set(re.findall(r"pytest\.mark\.(\w+)", " ".join(ast.unparse(node) for node in nodes)))


def functions_of(file: Path) -> dict[str, set[str]]:
    """Names of a file's tests, with their marks; those of single cases are not among them."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    of_all = marks([node.value for node in body if isinstance(node, ast.Assign) and "pytestmark" in ast.unparse(node)])
    return {
        node.name: of_all | marks([each for each in node.decorator_list if "parametrize" not in ast.unparse(each)])
        for node in body
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize("file", sorted({file for file, _ in NAMED}))
def test_each_test_of_the_table_exists_and_ci_runs_it(file):
    known = functions_of(ROOT / "tests" / file)
    for name in (name for each, name in NAMED if each == file):
        assert name in known, f"{file} has no {name}"
        assert "slow" not in known[name] or "fault" in known[name], f"{name} is slow and needs the mark fault, too"


def test_each_row_has_a_test_or_says_that_it_has_none():
    assert len(ROWS) > 35
    for row in ROWS:
        tests = row[2]
        assert tests.strip() == "open" or re.search(r"`[\w/]+\.py::\w+`", tests), row[0]
        assert "::" not in re.sub(r"`[\w/]+\.py::\w+`", "", tests), f"a name that no test has: {tests}"
