"""Trains a VLM policy with PPO on the rendered frames of an environment.

    python experiments/run_ppo.py
    python experiments/run_ppo.py --config experiments/configs/frozen_lake.yaml --seed 1
    python experiments/run_ppo.py --env my_module:MyEnv-v0 --policy smollm2 --trainable lora
    python experiments/run_ppo.py --resume runs/...

In order: environments, policy, before.gif, training, evaluation beside a random policy and two controls, after.gif. All of it lands in
a run folder (see the README); an existing one is never overwritten.
"""

import dataclasses
import json
import os
import platform
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

# Threads that wait for work sleep instead of spinning: else a second process on the machine slows both tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from experiments.command_line import UsageError, parse, read_yaml, run_main  # noqa: E402
from experiments.settings import RunConfig  # noqa: E402

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "gymnasium", "numpy", "pillow")


def main() -> int:
    """One run, new or resumed; returns the exit code."""
    started = time.perf_counter()
    given = parse(RunConfig, description="Trains a VLM policy with PPO on the frames of an environment.")
    config, run_dir = _resume_config(given) if given.resume else (given, None)
    # Heavy imports come after the flags, so that --help and a wrong flag answer at once.
    import torch
    from transformers.utils import logging

    from agent.callbacks import CheckpointCallback, MetricsCallback, cut_metrics, read_metrics
    from agent.checkpoint import latest_checkpoint, verify_folder
    from agent.ppo_trainer import PPOTrainer
    from experiments.progress import Progress
    from experiments.setup import held_out_seeds, make_env, make_policy, make_trainer_args

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(config.torch_threads or torch.get_num_threads())
    torch.manual_seed(config.seed)
    env = make_env(config, config.num_envs)
    checkpoint = None
    if run_dir is not None:
        checkpoint = latest_checkpoint(run_dir)
        if checkpoint is None:
            raise UsageError(f"{run_dir} holds no whole checkpoint: start a new run without --resume.")
        verify_folder(checkpoint)
    policy = make_policy(config, env)
    resumed = run_dir is not None
    run_dir = run_dir or _new_run_dir(config)
    staging = run_dir / ".staging"
    shutil.rmtree(staging, ignore_errors=True)
    args = make_trainer_args(config, staging)
    trainer = PPOTrainer(policy, args, env)
    if not resumed:
        _write_description(run_dir, config)
    saver = CheckpointCallback(trainer, run_dir, config.save_every, config.keep_checkpoints)
    progress = Progress(run_dir, config, policy, args.num_iterations, trainer.num_samples, started)
    trainer.add_callback(MetricsCallback(run_dir))
    trainer.add_callback(saver)
    trainer.add_callback(progress)
    progress.header(env, checkpoint)
    seeds = held_out_seeds(config)
    if not resumed:
        _gif(config, policy, env, seeds, run_dir / "before.gif")
    else:
        cut_metrics(run_dir, int(checkpoint.name.split("-")[1]))  # type: ignore[union-attr]
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        saver.restore_signals()
        progress.stop()
        env.close()
        shutil.rmtree(staging, ignore_errors=True)
    if trainer.iteration < args.num_iterations:
        print(f"Stopped after iteration {trainer.iteration}. Go on with:\n  python experiments/run_ppo.py --resume {run_dir}")
        return 130
    return _finish(config, policy, run_dir, seeds, read_metrics(run_dir), progress)


def _finish(config: RunConfig, policy: Any, run_dir: Path, seeds: list[int], rows: list[dict], progress: Any) -> int:
    """Evaluation with controls, learning curve, after.gif and the final policy folder."""
    from agent.checkpoint import write_folder
    from agent.evaluation import evaluate_all
    from agent.figures import learning_curve
    from experiments.setup import make_env
    from policies import save_policy

    env = make_env(config, min(config.num_envs, config.eval_episodes), held_out=True)
    evaluations = evaluate_all(policy, env, seeds)
    env.close()
    summary: dict[str, Any] = {name: evaluation.summary() for name, evaluation in evaluations.items()}
    random = summary["random"]
    write_folder(run_dir / "final", lambda folder: save_policy(policy, folder)) if not (run_dir / "final").exists() else None
    _write(run_dir / "evaluation.json", json.dumps(summary, indent=2))
    learning_curve(
        rows,
        run_dir / "learning_curve.png",
        f"{config.policy} on {config.env}, seed {config.seed}",
        baselines={"random policy": (random["success"], tuple(random["success_ci95"]))},
    )
    _gif(config, policy, None, seeds, run_dir / "after.gif")
    progress.table(summary)
    return 0


def _gif(config: RunConfig, policy: Any, env: Any, seeds: list[int], path: Path) -> None:
    from agent.evaluation import record_episodes
    from agent.figures import episode_gif
    from experiments.setup import make_env

    shown = seeds[: config.gif_episodes]
    if shown:
        own = make_env(config, len(shown), held_out=True)
        episode_gif(record_episodes(policy, own, shown), own.action_names, path)
        own.close()


def _resume_config(given: RunConfig) -> tuple[RunConfig, Path]:
    """The settings of the run to go on with; other flags beside --resume are refused."""
    run_dir = Path(str(given.resume))
    if not (run_dir / "config.yaml").is_file():
        raise UsageError(f"There is no run to resume in {str(run_dir)!r}: expected a folder with config.yaml and checkpoints.")
    changed = [
        field.name
        for field in dataclasses.fields(RunConfig)
        if field.name != "resume" and getattr(given, field.name) != field.default
    ]
    if changed:
        raise UsageError(f"--resume goes on with the run's own settings, but --{changed[0]} came too: leave it out.")
    if (run_dir / "evaluation.json").exists():
        raise UsageError(f"The run in {str(run_dir)!r} is finished: start a new one, with --policy {run_dir}/final if you like.")
    from experiments.command_line import check

    values = read_yaml(run_dir / "config.yaml")
    check(RunConfig, values, str(run_dir / "config.yaml"))
    return RunConfig(**values), run_dir


def _new_run_dir(config: RunConfig) -> Path:
    name = config.output_dir
    if name is None:
        env, policy = (text.rstrip("/").split("/")[-1].replace(":", "-") for text in (config.env, config.policy))
        name = f"runs/{env}-{policy}-seed{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    path = Path(name)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{name!r} exists: a run is never overwritten, give another --output_dir or --resume {name}.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"The run folder {name!r} cannot be made ({error.strerror}): give another --output_dir.") from error
    return path


def _write_description(run_dir: Path, config: RunConfig) -> None:
    """config.yaml with every setting, run.json with versions and the command line."""
    import importlib.metadata

    import yaml

    values = {key: value for key, value in dataclasses.asdict(config).items() if key != "resume"}
    _write(run_dir / "config.yaml", yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    description = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    _write(run_dir / "run.json", json.dumps(description, indent=2))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    run_main(main)
