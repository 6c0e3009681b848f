"""Run folders: where they lie and what describes them. Light to import: common/results.py fills them."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from manako.agent.locks import LOCK, held_beside, held_folder, new_folder, refuse_held
from manako.bounded import BadText, json_object, read_text
from manako.experiments.common import stopping
from manako.experiments.common.command_line import UsageError, as_sections, read_yaml
from manako.experiments.common.settings import TrainCommand
from manako.manifest import MANIFEST, sha256
from manako.policies.remote.settings import REMOTE

IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by `ray job submit`
SEAL = "# sha256 of what follows: "  # the first line of a run's config.yaml
LONGEST_PART = 50  # characters of a name in the name of a run
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "gymnasium", "numpy", "pillow", "ray")


def default_run_dir(command: TrainCommand) -> Path:
    """Returns where a run lands that does not say where."""
    names = (command.environment.env, command.policy.policy)
    env, policy = (text.rstrip("/").split("/")[-1].replace(":", "-")[:LONGEST_PART] for text in names)
    return Path("runs") / f"{env}-{policy}-seed{command.run.seed}-{time.strftime('%Y%m%d-%H%M%S')}"


def new_run_dir(command: TrainCommand) -> Path:
    """Returns the place of a new run's folder, which is made later.

    Raises:
        UsageError: it exists, or cannot be made.
    """
    name = command.run.output_dir or str(default_run_dir(command))
    check_job_folder(name, "--output_dir")
    path = Path(name)
    if path.is_dir():
        refuse_held(path)
    if path.exists() and (not path.is_dir() or any(each.name != LOCK for each in path.iterdir())):
        raise UsageError(f"{name!r} exists: a run is never overwritten, give another --output_dir or --resume {name}.")
    above = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UsageError(
            f"The run folder {name!r} cannot be made, since {str(above)!r} is no folder that can be written to: give "
            "another --output_dir."
        )
    return path


@contextlib.contextmanager
def making(folder: Path, flag: str = "--output_dir") -> Iterator[None]:
    """Makes a folder and holds it against every other process for a block; one that stays empty is removed again.

    Raises:
        UsageError: it cannot be made.
        InUseError: another process holds it.
    """
    with _held(new_folder(folder), f"The run folder {str(folder)!r} cannot be made", flag):
        yield


@contextlib.contextmanager
def going_on(folder: Path, flag: str = "--resume") -> Iterator[None]:
    """Holds the folder of a run against every other process for a block.

    Raises:
        UsageError: nothing can be written there.
        InUseError: another process holds it.
    """
    with _held(held_folder(folder), f"Nothing can be written into {str(folder)!r}", flag):
        yield


@contextlib.contextmanager
def writing(flag: str, *outputs: str | None) -> Iterator[None]:
    """Holds the names of outputs that are not there yet for a block.

    Raises:
        UsageError: nothing can be written there.
        InUseError: another process holds one of them.
    """
    names = " and ".join(repr(output) for output in outputs if output)
    with _held(held_beside(*outputs), f"{names} cannot be written", flag):
        yield


@contextlib.contextmanager
def _held(lock: contextlib.AbstractContextManager[None], what: str, flag: str) -> Iterator[None]:
    """Holds a lock for a block, also against a signal that ends the process at once."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock)
        except OSError as error:
            raise UsageError(f"{what} ({error.strerror or error}): give another {flag}.") from error
        with stopping.undone(stack.close):
            yield


def check_job_folder(name: str, flag: str) -> None:
    """Raises where a Ray job would lose a relative folder.

    Raises:
        UsageError: it is relative, and this is a Ray job.
    """
    if IN_RAY_JOB in os.environ and not Path(name).is_absolute():
        raise UsageError(
            f"The run folder {name!r} is relative, and this is a Ray job, whose working folder is a copy that the "
            f"cluster throws away: expected {flag} with an absolute folder that outlives the job, as in /shared/runs/1."
        )


def write_description(run_dir: Path, command: TrainCommand) -> None:
    """Writes config.yaml with every setting, run.json with versions and the command line."""
    write_config(run_dir, command)
    description = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    part = getattr(command, "sft", None) or getattr(command, "dpo", None)
    if part is not None and part.dataset is not None:
        description["dataset"] = describe_dataset(Path(part.dataset))
    write_text(run_dir / "run.json", json.dumps(description, indent=2))


def describe_dataset(folder: Path) -> dict[str, Any]:
    """Returns what a run says of the dataset that it learns from: its name, its digest, what it says of itself.

    The digest is the sum of its manifest, which holds the sums of all files; a dataset without one has none.
    """
    manifest, info = folder / MANIFEST, folder / "dataset_info.json"
    about = {}
    with contextlib.suppress(OSError, BadText):
        about = json_object(str(json_object(read_text(info))["description"]))
    return {
        "folder": folder.resolve().name,
        "manifest_sha256": sha256(manifest) if manifest.is_file() else None,
        "about": about,
    }


def write_config(run_dir: Path, command: TrainCommand) -> None:
    """Writes config.yaml with every setting."""
    sections = as_sections(command)
    sections["run"].pop("resume", None)
    write_settings(run_dir / "config.yaml", sections)


def write_text(path: Path, text: str) -> None:
    """Writes a file that is whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_settings(file: Path, sections: dict[str, Any]) -> None:
    """Writes settings as YAML, whole or not there, behind a line with the sum of them."""
    text = yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)
    write_text(file, f"{SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n{text}")


def read_run_settings(file: Path) -> dict[str, Any]:
    """Returns what `write_settings` wrote, which another hand may have changed only by taking out the first line.

    Raises:
        UsageError: it cannot be read, or is not what was written.
    """
    try:
        content = file.read_bytes()
    except OSError:
        return read_yaml(file)  # says why
    line, _, text = content.partition(b"\n")
    if re.fullmatch(re.escape(SEAL).encode() + rb"[0-9a-f]{64}", line) is None:
        print(f"warning: nothing says that the settings in {str(file)!r} are those that were written", flush=True)
    elif line.decode().removeprefix(SEAL) != hashlib.sha256(text).hexdigest():
        raise UsageError(
            f"The settings in {str(file)!r} are not those that were written (their SHA-256 sum is another): use "
            "another copy of the run; if you changed them on purpose, take out the first line."
        )
    return read_yaml(file)


def is_run(folder: Path) -> bool:
    """Says whether a runner that trains made this folder.

    Raises:
        UsageError: it did, and one of the two files that say how is missing.
    """
    settings, described = folder / "config.yaml", folder / "run.json"
    if settings.is_file() == described.is_file():
        return settings.is_file()
    missing = described if settings.is_file() else settings
    if not any((folder / name).is_dir() for name in ("final", "checkpoints")):
        return False
    if missing == described and not settings.read_bytes().startswith(SEAL.encode()):
        return False  # of another program
    raise UsageError(f"The run {str(folder)!r} lacks {missing.name}: use another copy of it.")


def policy_folder(name: str) -> str:
    """Returns what `--policy` means: of a run its final policy, anything else as it is.

    Raises:
        UsageError: the run has none yet, or the name stands for a server.
    """
    if name == REMOTE:
        raise UsageError(
            "--policy remote is a model behind a chat API, which cannot learn and has no weights here: expected a "
            "policy with a model, such as tiny; evaluate.py --policy remote plays it, collect.py --player remote "
            "records it, run_dpo.py --pairs remote asks it which action is better."
        )
    folder = Path(name)
    if not is_run(folder):
        return name
    if not (folder / "final").is_dir():
        raise UsageError(f"The run {name!r} has no final policy yet: give one of its checkpoints.")
    return str(folder / "final")
