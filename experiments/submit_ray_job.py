"""Submits run_ppo.py to a Ray cluster as a job, follows its log, and ends with its exit code.

    python experiments/submit_ray_job.py --rollout_backend ray-replica --num_workers 8 --output_dir /shared/runs/1
    python experiments/submit_ray_job.py --job_address http://head:8265 --env my_env:Corridor-v0

Takes every flag of run_ppo.py, checks them here first, and sends along the project and the module of your environment.
Flags of its own: --job_address, the cluster's dashboard (else RAY_ADDRESS, else http://127.0.0.1:8265), and --follow
false, which returns once the job is submitted. The plain way is `ray job submit --working-dir . -- python
experiments/run_ppo.py ...`, see docs/cluster.md.
"""

import asyncio
import importlib.util
import json
import logging
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako

    del sys.path[0]

import manako  # noqa: E402
from manako.experiments.common.command_line import (  # noqa: E402
    CommandLine,
    UsageError,
    as_sections,
    read_command_line,
    run_main,
    section,
    show,
)
from manako.experiments.common.run_folder import default_run_dir  # noqa: E402
from manako.experiments.common.settings import GOTO, OF_THE_MACHINE, PPOCommand, check_together  # noqa: E402
from manako.settings import setting  # noqa: E402

PACKAGES = ("agent", "envs", "policies", "experiments")
RUNNER = """from manako.experiments.common.command_line import run_main
from manako.experiments.run_ppo import main

run_main(main)
"""
LEFT_AT_HOME = [
    ".git",
    ".venv",
    "venv",
    "runs",
    "tests",
    "docs",
    "__pycache__",
    ".mypy",
    ".mypy_cache",
    ".ruff_cache",
    "*.egg-info",
]


@dataclass(frozen=True)
class JobSettings:
    """Which cluster, and whether to wait."""

    job_address: str | None = setting(None, "address of the cluster's dashboard, such as http://head:8265")
    follow: bool = setting(True, "print the job's log until it ends, and end with its exit code")


@dataclass(frozen=True)
class JobCommand(PPOCommand):
    """Settings of submit_ray_job.py: those of a run, and two of its own."""

    job: JobSettings = section(JobSettings, "job")


def main() -> int:
    """Submits one job; returns its exit code."""
    line = read_line()
    given = line.settings
    if not given.run.resume:
        check_together(given)
    folder = os.path.abspath(given.run.resume or given.run.output_dir or str(default_run_dir(given)))
    words = job_words(line, folder)
    module = plugin_file(given.environment.env)
    show("run", folder)
    from manako.agent.workers.cluster import job_client  # ray

    client = job_client(given.job.job_address)
    entrypoint = shlex.join(["python", "experiments/run_ppo.py", *words])
    logging.getLogger("ray").setLevel(logging.ERROR)  # a line for each file that stays here
    with tempfile.TemporaryDirectory() as staging:
        stage(Path(staging), module)
        job = client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": staging})
    show("job", job)
    show("command", entrypoint)
    if not given.job.follow:
        return 0
    try:
        asyncio.run(_print_log(client, job))
    except KeyboardInterrupt:
        print(f"The job goes on. Its log: ray job logs -f {job}; its end: ray job stop {job}")
        return 130
    details = client.get_job_info(job)
    status = str(getattr(details.status, "value", details.status))
    print(f"job {job}: {status.lower()}")
    if status == "SUCCEEDED":
        return 0
    print(f"{' '.join(str(details.message).split())[:300]}", file=sys.stderr)
    return details.driver_exit_code or 1


def read_line(arguments: Sequence[str] | None = None) -> CommandLine[JobCommand]:
    """Returns the settings of these words, by default of this program's command line."""
    about = "Submits run_ppo.py to a Ray cluster; takes its flags."
    return read_command_line(JobCommand, about, arguments, file_without=(GOTO, ("env", "resume")))


def job_words(line: CommandLine[JobCommand], folder: str) -> list[str]:
    """Returns the words of run_ppo.py in the job: all settings in one --config, so that no file has to be there.

    Args:
        line: what came here.
        folder: the run's, absolute. A resumed run has its own settings, and only those of the machine travel.
    """
    sections = as_sections(line.settings)
    del sections["job"]
    if line.settings.run.resume:
        moved = {name: value for name, value in sections["workers"].items() if name in line.given & OF_THE_MACHINE}
        named = ["--env", line.settings.environment.env] if "env" in line.given else []
        return ["--resume", folder, *named, *(["--config", json.dumps({"workers": moved})] if moved else [])]
    sections["run"] |= {"output_dir": folder, "resume": None}
    if Path(sections["policy"]["policy"]).is_dir():
        sections["policy"]["policy"] = os.path.abspath(sections["policy"]["policy"])
    return ["--config", json.dumps(sections)]


def plugin_file(env: str) -> Path | None:
    """Returns the file or folder of `module:EnvId-v0`'s module where it lies in the current folder.

    Raises:
        UsageError: there is no such module.
    """
    name, colon, _ = env.partition(":")
    if not colon:
        return None
    top = name.split(".")[0]
    if top == "manako":
        return None
    for place in (Path.cwd() / top, Path.cwd() / f"{top}.py"):
        if place.exists():
            return place
    if importlib.util.find_spec(top) is None:
        raise UsageError(f"The module {top!r} of --env {env!r} is not here: expected {top}.py in the current folder.")
    return None  # installed: expected on the cluster too


def stage(folder: Path, module: Path | None) -> None:
    """Fills the job's working folder with `manako`, the environment's module, and the runner as a file.

    `manako` is laid out as in an installed wheel: no `envs` or `agent` of ours stands where a user has one.

    Args:
        folder: an empty one.
        module: what `plugin_file` found.
    """
    ignore = shutil.ignore_patterns(*LEFT_AT_HOME)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / "manako" / package, ignore=ignore)
    for file in Path(manako.__file__).parent.glob("*.py"):
        shutil.copy(file, folder / "manako")
    if module is not None and module.is_dir():
        shutil.copytree(module, folder / module.name, ignore=ignore)
    elif module is not None:
        shutil.copy(module, folder)
    (folder / "experiments").mkdir(exist_ok=True)  # a user's own may be there
    (folder / "experiments/run_ppo.py").write_text(RUNNER, encoding="utf-8")


async def _print_log(client: Any, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


if __name__ == "__main__":
    run_main(main)
