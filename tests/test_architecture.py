"""The arrows between the packages, read from their imports, and the completeness of constraints.txt.

    experiments -> agent -> policies        experiments -> policies, envs

`agent` reaches `policies` through its door alone. The sources are parsed, not imported: an import inside a function or
for type checkers counts as much as one at the top of a file, and so does a string with a module's name, for
import_module.
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
    "agent": {"envs", "experiments"},
    "experiments": set(),
    "manako": {"experiments"},
}
# All that agent/ may know of policies/: the door, its error, and the folder that a policy is read from and written to.
DOOR = ("manako.policies.interface", "manako.policies.errors", "manako.policies.loading", "manako.policies.saving")
DOOR_NAMES = ("manako.policies.PolicyError", "manako.policies.load_policy", "manako.policies.save_policy")
RAY_FOLDER = "agent/workers"


class Import(NamedTuple):
    line: int
    name: str  # dotted, with what is imported from it
    in_function: bool

    @property
    def package(self) -> str:
        """The first part of the dotted name, `manako.agent.x` as `agent`."""
        return self.name.removeprefix("manako.").split(".")[0]


def imports_of(source: str, package: str) -> list[Import]:
    """Every import, and every string that names a module of manako; a relative one counts as of `package`."""
    found = []

    def visit(node: ast.AST, in_function: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(node.lineno, alias.name, in_function) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = f"manako.{package}" + (f".{node.module}" if node.module else "") if node.level else node.module
            found.extend(Import(node.lineno, f"{module}.{alias.name}", in_function) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            first, _, rest = node.value.partition(".")
            if first == "manako" and rest.split(".")[0] in PACKAGES and not any(map(str.isspace, rest)):
                found.append(Import(node.lineno, node.value, in_function))
        inside = in_function or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), in_function=False)
    return found


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_the_import_reader_sees_every_form():
    source = "import torch.nn as nn\nfrom trl import X\nfrom . import y\ndef f():\n    import ray\n"
    source += "from manako import envs\nfrom manako.policies.x import y, z\n"
    source += "if TYPE_CHECKING:\n    from manako.experiments import collect\n"
    source += "import_module('manako.envs.tiles')\nimport_module(f'manako.policies.{row}')\n"
    source += "'manako.envs is a package'\n'manako.prompt'\nfrom ..data import w\n"
    imports = imports_of(source, "agent")
    assert imports == [
        Import(1, "torch.nn", False),
        Import(2, "trl.X", False),
        Import(3, "manako.agent.y", False),
        Import(5, "ray", True),
        Import(6, "manako.envs", False),
        Import(7, "manako.policies.x.y", False),
        Import(7, "manako.policies.x.z", False),
        Import(9, "manako.experiments.collect", False),
        Import(10, "manako.envs.tiles", False),
        Import(11, "manako.policies.", False),
        Import(14, "manako.agent.data.w", False),
    ]
    packages = [
        "torch",
        "trl",
        "agent",
        "ray",
        "envs",
        "policies",
        "policies",
        "experiments",
        "envs",
        "policies",
        "agent",
    ]
    assert [found.package for found in imports] == packages


@pytest.mark.parametrize("package", FORBIDDEN)
def test_arrows(package):
    assert sources(package), f"{package}/ has no Python file"
    wrong = [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.package}"
        for path in sources(package)
        for found in imports_of(path.read_text(), package)
        if found.package in FORBIDDEN[package]
    ]
    assert not wrong, "\n".join(wrong)


def through_the_door(name: str) -> bool:
    """Whether agent/ may import this of policies/."""
    return name in DOOR_NAMES or any(name == module or name.startswith(f"{module}.") for module in DOOR)


def test_the_rule_of_the_door():
    assert through_the_door("manako.policies.interface.Policy") and through_the_door("manako.policies.interface")
    assert through_the_door("manako.policies.load_policy") and through_the_door("manako.policies.saving.save_policy")
    for name in ("", ".VLMPolicy", ".vlm_policy.VLMPolicy", ".PolicySource", ".interface_of_mine.X", ".load_policy2"):
        assert not through_the_door(f"manako.policies{name}")


def test_agent_reaches_policies_through_the_door_alone():
    """Whatever policy there will be, agent/ plays and trains it."""
    wrong = [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.name}"
        for path in sources("agent")
        for found in imports_of(path.read_text(), "agent")
        if found.package == "policies" and not through_the_door(found.name)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_front_is_for_users():
    """Inside, a name is imported from where it stands: `from manako import load_policy` would hide an arrow."""
    wrong = [
        f"{path.relative_to(ROOT)}:{found.line} imports {found.name}"
        for package in PACKAGES
        for path in sources(package)
        for found in imports_of(path.read_text(), package)
        if found.name.startswith("manako.")
        and found.package not in PACKAGES
        and not (ROOT / "manako" / f"{found.package}.py").is_file()
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
