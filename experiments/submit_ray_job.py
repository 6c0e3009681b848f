"""Submits run_ppo.py to a Ray cluster as a job, follows its log, and ends with its exit code.

    python experiments/submit_ray_job.py --rollout_backend ray-replica --num_workers 8 --output_dir /shared/runs/1
    python experiments/submit_ray_job.py --job_address http://head:8265 --env my_env:Corridor-v0

Takes every flag of run_ppo.py, checks them here first, and sends along the project and the module of your environment.
Flags of its own: --job_address, the cluster's dashboard (else RAY_ADDRESS, else http://127.0.0.1:8265), and --follow
false, which returns once the job is submitted. The plain way is `ray job submit --working-dir . -- python
experiments/run_ppo.py ...`, see docs/cluster.md.
"""

import asyncio
import dataclasses
import importlib.util
import logging
import os
import shlex
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako

    del sys.path[0]

import manako  # noqa: E402
from manako.experiments.common.command_line import UsageError, parse, run_main, setting  # noqa: E402
from manako.experiments.common.run_folder import default_run_dir  # noqa: E402
from manako.experiments.common.settings import RunConfig, check_together  # noqa: E402

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


@dataclass
class JobConfig(RunConfig):
    """Settings of submit_ray_job.py: those of a run, and two of its own."""

    job_address: str | None = setting(None, "address of the cluster's dashboard, such as http://head:8265")
    follow: bool = setting(True, "print the job's log until it ends, and end with its exit code")


def main() -> int:
    """One submission; returns the job's exit code."""
    given = parse(JobConfig, description="Submits run_ppo.py to a Ray cluster; takes its flags.")
    fields = [field.name for field in dataclasses.fields(RunConfig)]
    run = RunConfig(**{name: getattr(given, name) for name in fields})
    check_together(dataclasses.replace(run))
    folder = run.resume or run.output_dir or str(default_run_dir(run))
    run.resume, run.output_dir = (os.path.abspath(folder), None) if run.resume else (None, os.path.abspath(folder))
    if Path(run.policy).is_dir():
        run.policy = os.path.abspath(run.policy)
    # A resumed run has its own settings; all others travel as flags, so that no file has to be there.
    words = [
        word
        for name in fields
        if (value := getattr(run, name)) != getattr(RunConfig(), name)
        for word in (f"--{name}", str(value).lower() if isinstance(value, bool) else str(value))
    ]
    module = plugin_file(run.env)
    from manako.agent.workers.cluster import job_client

    client = job_client(given.job_address)
    entrypoint = shlex.join(["python", "experiments/run_ppo.py", *words])
    logging.getLogger("ray").setLevel(logging.ERROR)  # a line for each file that stays here
    with tempfile.TemporaryDirectory() as staging:
        stage(Path(staging), module)
        job = client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": staging})
    print(f"job          {job}\ncommand      {entrypoint}\nrun          {run.resume or run.output_dir}", flush=True)
    if not given.follow:
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
    (folder / "experiments/run_ppo.py").write_text(RUNNER)


async def _print_log(client: Any, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        print(lines, end="", flush=True)


if __name__ == "__main__":
    run_main(main)
