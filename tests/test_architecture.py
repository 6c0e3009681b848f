"""The arrows between the packages, read from their imports, and the completeness of constraints.txt.

    experiments -> agent -> policies        experiments -> policies, envs

The sources are parsed, not imported: an import inside a function counts as much as one at the top of a file.
"""

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PACKAGES = ("agent", "envs", "policies", "experiments")
FORBIDDEN = {
    "envs": {"torch", "transformers", "peft", "trl", "ray", "agent", "policies", "experiments"},
    "policies": {"agent", "envs", "experiments"},
    "agent": {"experiments"},
    "experiments": set(),
}
RAY_FOLDER = "agent/workers"


class Import(NamedTuple):
    line: int
    package: str  # the first part of the dotted name
    in_function: bool


def imports_of(source: str, package: str) -> list[Import]:
    """Every import statement in `source`, `manako.agent.x` as `agent`; a relative one counts as of `package`."""
    found = []

    def first(name: str) -> str:
        return name.removeprefix("manako.").split(".")[0]

    def visit(node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(node.lineno, first(alias.name), in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module == "manako":
                found.extend(Import(node.lineno, alias.name, in_function) for alias in node.names)
            else:
                name = package if node.level else first(str(node.module))
                found.append(Import(node.lineno, name, in_function))
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), in_function=False)
    return found


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_the_import_reader_sees_every_form():
    source = "import torch.nn as nn\nfrom trl import X\nfrom . import y\ndef f():\n    import ray\n"
    source += "from manako import envs\nfrom manako.policies.x import y\n"
    assert imports_of(source, "agent") == [
        Import(1, "torch", False),
        Import(2, "trl", False),
        Import(3, "agent", False),
        Import(5, "ray", True),
        Import(6, "envs", False),
        Import(7, "policies", False),
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows(package):
    assert sources(package), f"{package}/ has no Python file"
    wrong = [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.package}"
        for path in sources(package)
        for found in imports_of(path.read_text(), package)
        if found.package in FORBIDDEN[package]
    ]
    assert not wrong, "\n".join(wrong)


def test_ray_is_imported_lazily_and_in_one_folder():
    wrong = [
        f"{path.relative_to(ROOT)}:{found.line} imports ray" + ("" if found.in_function else " outside a function")
        for package in PACKAGES
        for path in sources(package)
        for found in imports_of(path.read_text(), package)
        if found.package == "ray" and (not path.is_relative_to(ROOT / RAY_FOLDER) or not found.in_function)
    ]
    assert not wrong, "\n".join(wrong)


def test_reports_need_no_torch():
    """Statistics, figures and checkpoints import in an instant, so that a report starts in one."""
    heavy = ["torch", "transformers", "trl", "matplotlib", "PIL"]
    script = "import sys, manako.agent.checkpoint, manako.agent.report.figures; "
    script += f"print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_pyproject_lists_every_package():
    """Each folder with Python files, as it is called inside `manako`; mypy reads the same folders through .mypy/."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for package in PACKAGES for path in sources(package)}
    assert set(listed) == {"manako", *("manako." + ".".join(folder.parts) for folder in folders)}
    for package in PACKAGES:
        assert (ROOT / ".mypy/manako" / package).resolve() == ROOT / package
        assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


def pins() -> dict[str, str]:
    """Canonical name -> version of every line of constraints.txt."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    table = {}
    for line in lines:
        name, version = line.split("==")
        assert name == canonicalize_name(name) and name not in table, f"constraints.txt: {line!r}"
        table[name] = version
    assert list(table) == sorted(table), "constraints.txt is not sorted"
    return table


def project_requirements() -> list[Requirement]:
    """The dependencies and every extra of pyproject.toml, without the extras that name the project itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [requirement for line in lines if (requirement := Requirement(line)).name != project["name"]]


def test_constraints_fit_the_ranges():
    table = pins()
    for requirement in project_requirements():
        name = canonicalize_name(requirement.name)
        assert name in table, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(table[name]), f"constraints.txt: {name}=={table[name]}, not {requirement}"
    assert "+" not in table["torch"]  # a local version tag would shut out the other builds
    assert "pygame" not in table  # pygame-ce installs the same module: two of them break each other


def test_constraints_pin_the_whole_closure():
    """Everything that the installed requirements require, directly or not, has its line."""
    table, seen, missing = pins(), set(), set()
    queue = [(requirement, "manako") for requirement in project_requirements()]
    while queue:
        requirement, wanted_by = queue.pop()
        name = canonicalize_name(requirement.name)
        if name.startswith(("nvidia-", "cuda-", "triton")):  # torch's CUDA builds pin these
            continue
        if name not in table:
            missing.add(f"{name} (wanted by {wanted_by})")
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed here
        for needed in map(Requirement, lines):
            extras = ["", *requirement.extras]
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                queue.append((needed, name))
    assert not missing, f"constraints.txt does not pin {', '.join(sorted(missing))}"
    assert len(seen) > 80
