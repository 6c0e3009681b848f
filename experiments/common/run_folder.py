"""Run folders: where they lie and what describes them. Light to import: common/results.py fills them."""

import importlib.metadata
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import yaml

from manako.experiments.common.command_line import UsageError, as_sections
from manako.experiments.common.settings import TrainCommand
from manako.policies.remote.settings import REMOTE

IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by `ray job submit`
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "gymnasium", "numpy", "pillow", "ray")


def default_run_dir(command: TrainCommand) -> Path:
    """Returns where a run lands that does not say where."""
    names = (command.environment.env, command.policy.policy)
    env, policy = (text.rstrip("/").split("/")[-1].replace(":", "-") for text in names)
    return Path("runs") / f"{env}-{policy}-seed{command.run.seed}-{time.strftime('%Y%m%d-%H%M%S')}"


def new_run_dir(command: TrainCommand) -> Path:
    """Returns the place of a new run's folder, which is made later.

    Raises:
        UsageError: it exists, or cannot be made.
    """
    name = command.run.output_dir or str(default_run_dir(command))
    check_job_folder(name, "--output_dir")
    path = Path(name)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{name!r} exists: a run is never overwritten, give another --output_dir or --resume {name}.")
    above = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UsageError(
            f"The run folder {name!r} cannot be made, since {str(above)!r} is no folder that can be written to: give "
            "another --output_dir."
        )
    return path


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
    write_text(run_dir / "run.json", json.dumps(description, indent=2))


def write_config(run_dir: Path, command: TrainCommand) -> None:
    """Writes config.yaml with every setting."""
    sections = as_sections(command)
    sections["run"].pop("resume", None)
    write_text(run_dir / "config.yaml", yaml.safe_dump(sections, sort_keys=False, allow_unicode=True))


def write_text(path: Path, text: str) -> None:
    """Writes a file that is whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def is_run(folder: Path) -> bool:
    """Says whether a runner that trains made this folder."""
    return (folder / "config.yaml").is_file() and (folder / "run.json").is_file()


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
