"""Run folders: where they lie, what describes them, the final policy, its evaluation. Shared by the runners."""

import contextlib
import dataclasses
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from manako.experiments.common.command_line import UsageError
from manako.experiments.common.settings import PlayConfig, TrainConfig

IN_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by `ray job submit`
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "gymnasium", "numpy", "pillow", "ray")


def default_run_dir(config: TrainConfig) -> Path:
    """Where a run lands that does not say where."""
    env, policy = (text.rstrip("/").split("/")[-1].replace(":", "-") for text in (config.env, config.policy))
    return Path("runs") / f"{env}-{policy}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"


def new_run_dir(config: TrainConfig) -> Path:
    """The place of a new run's folder, which is made later.

    Raises:
        UsageError: it exists, or cannot be made.
    """
    name = config.output_dir or str(default_run_dir(config))
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
    """In a Ray job a relative folder is lost.

    Raises:
        UsageError: it is relative, and this is a Ray job.
    """
    if IN_RAY_JOB in os.environ and not Path(name).is_absolute():
        raise UsageError(
            f"The run folder {name!r} is relative, and this is a Ray job, whose working folder is a copy that the "
            f"cluster throws away: expected {flag} with an absolute folder that outlives the job, as in /shared/runs/1."
        )


def write_description(run_dir: Path, config: TrainConfig) -> None:
    """config.yaml with every setting, run.json with versions and the command line."""
    import importlib.metadata

    import yaml

    values = {key: value for key, value in dataclasses.asdict(config).items() if key != "resume"}
    write_text(run_dir / "config.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    description = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    write_text(run_dir / "run.json", json.dumps(description, indent=2))


def write_text(path: Path, text: str) -> None:
    """Writes a file that is whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def is_run(folder: Path) -> bool:
    """Whether a runner that trains made this folder."""
    return (folder / "config.yaml").is_file() and (folder / "run.json").is_file()


def policy_folder(name: str) -> str:
    """What `--policy` means: of a run its final policy, anything else as it is.

    Raises:
        UsageError: the run has none yet.
    """
    folder = Path(name)
    if not is_run(folder):
        return name
    if not (folder / "final").is_dir():
        raise UsageError(f"The run {name!r} has no final policy yet: give one of its checkpoints.")
    return str(folder / "final")


def write_final(policy: Any, run_dir: Path) -> None:
    """final/, whole or not there; one that is there stays."""
    from manako.agent.checkpoint import write_folder
    from manako.policies import save_policy

    if not (run_dir / "final").exists():
        write_folder(run_dir / "final", lambda folder: save_policy(policy, folder))


def evaluate_run(config: TrainConfig, policy: Any, run_dir: Path, num_envs: int) -> dict[str, Any]:
    """The policy and its controls on held-out seeds; writes episodes.json and after.gif.

    Args:
        config: the run's settings.
        policy: the policy.
        run_dir: the run folder.
        num_envs: episodes side by side, at most.

    Returns:
        The content of evaluation.json, which the caller writes last.
    """
    from manako.agent.report.evaluation import evaluate_all
    from manako.experiments.common.environments import held_out_seeds, make_env

    seeds = held_out_seeds(config.seed, max(config.eval_episodes, config.gif_episodes))
    with contextlib.closing(make_env(config, min(num_envs, config.eval_episodes), held_out=True)) as env:
        evaluations = evaluate_all(policy, env, seeds[: config.eval_episodes])
    success = {name: [episode.success for episode in result.episodes] for name, result in evaluations.items()}
    write_text(run_dir / "episodes.json", json.dumps({"seeds": seeds[: config.eval_episodes], "success": success}))
    write_gif(config, policy, seeds[: config.gif_episodes], run_dir / "after.gif")
    return {name: evaluation.summary() for name, evaluation in evaluations.items()}


def write_gif(config: PlayConfig, policy: Any, seeds: list[int], path: Path) -> None:
    """One episode for each seed, played greedily."""
    from manako.agent.report.evaluation import record_episodes
    from manako.agent.report.figures import episode_gif
    from manako.experiments.common.environments import make_env

    if seeds:
        env = make_env(config, len(seeds), held_out=True)
        episode_gif(record_episodes(policy, env, seeds), env.action_names, path)
        env.close()
