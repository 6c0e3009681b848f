"""Trains a VLM policy with PPO on the rendered frames of an environment.

    python experiments/run_ppo.py
    python experiments/run_ppo.py --config experiments/configs/frozen_lake.yaml --seed 1
    python experiments/run_ppo.py --env my_module:MyEnv-v0 --policy smollm2 --trainable lora
    python experiments/run_ppo.py --resume runs/...

In order: environments, policy, before.gif, training, evaluation beside a random policy and two controls, after.gif. All
of it lands in a run folder (see the README); an existing one is never overwritten. Ctrl-C or SIGTERM saves a checkpoint
at the end of the iteration and prints the command that goes on from it.
"""

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

# Threads that wait for work sleep instead of spinning: else a second process on the machine slows both tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[1]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.experiments.common.command_line import UsageError, parse, read_settings, run_main  # noqa: E402
from manako.experiments.common.run_folder import (  # noqa: E402
    check_job_folder,
    evaluate_run,
    new_run_dir,
    write_description,
    write_final,
    write_gif,
    write_text,
)
from manako.experiments.common.settings import RunConfig, check_together  # noqa: E402

# Settings that change where a run is computed, and not what: a resumed run may have others.
OF_THE_MACHINE = (
    "rollout_backend",
    "num_workers",
    "worker_cpus",
    "worker_gpus",
    "worker_timeout",
    "placement_timeout",
    "ray_address",
)


def main() -> int:
    """One run, new or resumed; returns the exit code."""
    started = time.perf_counter()
    given = parse(RunConfig, description="Trains a VLM policy with PPO on the frames of an environment.")
    # What can be refused is refused before anything is written, and before the heavy imports where it can be.
    config, run_dir, checkpoint = _resumed(given) if given.resume else (given, new_run_dir(given), None)
    check_together(config)
    if config.rollout_backend == "local":
        return _run(config, run_dir, checkpoint, started)
    from manako.agent.workers.cluster import cluster

    with cluster(config.ray_address, paths=[os.getcwd()]):
        return _run(config, run_dir, checkpoint, started)


def _run(config: RunConfig, run_dir: Path, checkpoint: Path | None, started: float) -> int:
    """Trains from the start or from a checkpoint, and evaluates; returns the exit code."""
    import torch

    from manako.agent.ppo_trainer import PPOTrainer
    from manako.agent.report.callbacks import CheckpointCallback, MetricsCallback, cut_metrics, read_metrics, set_aside
    from manako.experiments.common.building import (
        make_policy,
        make_rollouts,
        make_trainer_args,
        quiet_libraries,
        try_out,
    )
    from manako.experiments.common.environments import held_out_seeds, make_env
    from manako.experiments.common.progress import Progress

    quiet_libraries()
    torch.manual_seed(config.seed)
    with contextlib.closing(make_env(config, 1, held_out=True)) as env:
        policy = make_policy(config, env.action_names, env.frame_shape)
        if checkpoint is None:
            try_out(env, policy)
    staging = run_dir / ".staging"
    if checkpoint is not None:
        shutil.rmtree(staging, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        args = make_trainer_args(config, staging)
        source = make_rollouts(
            config,
            policy,
            args.num_iterations,
            rounds=config.advantage != "gae",
            reference=config.kl_coef > 0,
            asynchronous=config.async_rollouts,
        )
        rollouts = stack.enter_context(contextlib.closing(source))
        try:
            trainer = PPOTrainer(policy, args, rollouts=rollouts)  # makes the run folder
        except OSError as error:
            raise UsageError(
                f"The run folder {str(run_dir)!r} cannot be made ({error.strerror}): give another --output_dir."
            ) from error
        if checkpoint is None:
            write_description(run_dir, config)
        else:
            iteration = int(checkpoint.name.split("-")[1])
            cut_metrics(run_dir, iteration)
            set_aside(run_dir, iteration)
        metrics = MetricsCallback(run_dir)
        saver = CheckpointCallback(trainer, run_dir, config.save_every, config.keep_checkpoints)
        progress = Progress(run_dir, config, policy, args.num_iterations, trainer.num_samples, started)
        for callback in (metrics, saver, progress):
            trainer.add_callback(callback)
        progress.header(env, checkpoint)
        if checkpoint is None:
            seeds = held_out_seeds(config.seed, config.gif_episodes)
            write_gif(config, policy, seeds, run_dir / "before.gif")
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            rollouts.close()  # workers have nothing more to do
            if not saver.interrupted and trainer.failure is None:
                _finish(config, policy, run_dir, read_metrics(run_dir), progress)
                return 0
        except KeyboardInterrupt:  # a second signal, or one during the evaluation
            pass
        finally:
            saver.restore_signals()
            progress.stop()
            metrics.board.close()
            shutil.rmtree(staging, ignore_errors=True)
    command = shlex.join(["python", sys.argv[0], "--resume", str(run_dir)])
    if trainer.iteration:
        print(f"Stopped after iteration {trainer.iteration} of {args.num_iterations}. Go on with:\n  {command}")
    else:
        print("Stopped in the first iteration: nothing was learned yet, and there is nothing to go on from.")
    if trainer.failure is not None:
        raise trainer.failure
    return 130


def _finish(config: RunConfig, policy: Any, run_dir: Path, rows: list[dict], progress: Any) -> None:
    """The final policy folder, evaluation with controls, learning curve, after.gif; evaluation.json ends the run."""
    from manako.agent.report.figures import learning_curve

    write_final(policy, run_dir)  # unless a former start wrote it and was stopped in what follows
    summary = evaluate_run(config, policy, run_dir, config.num_envs)
    random = summary["random"]
    learning_curve(
        rows,
        run_dir / "learning_curve.png",
        f"{config.policy} on {config.env}, seed {config.seed}",
        baselines={"random policy": (random["success"], tuple(random["success_ci95"]))},
    )
    write_text(run_dir / "evaluation.json", json.dumps(summary, indent=2))
    progress.table(summary)


def _resumed(given: RunConfig) -> tuple[RunConfig, Path, Path]:
    """The settings of the run to go on with, its folder and its last whole checkpoint.

    Raises:
        UsageError: no run there, a finished one, no whole checkpoint, or other flags beside --resume.
    """
    from manako.agent.checkpoint import latest_checkpoint

    run_dir = Path(str(given.resume))
    check_job_folder(str(given.resume), "--resume")
    if not (run_dir / "config.yaml").is_file():
        raise UsageError(f"--resume {str(run_dir)!r} is no run: expected a folder with config.yaml and checkpoints.")
    changed = [
        field.name
        for field in dataclasses.fields(RunConfig)
        if field.name not in ("resume", *OF_THE_MACHINE) and getattr(given, field.name) != field.default
    ]
    if changed:
        raise UsageError(f"--resume goes on with the run's own settings, but --{changed[0]} came too: leave it out.")
    if (run_dir / "evaluation.json").exists():
        raise UsageError(
            f"The run in {str(run_dir)!r} is finished: start a new one, with --policy {run_dir}/final if you like."
        )
    values = read_settings(RunConfig, run_dir / "config.yaml")
    defaults = RunConfig()
    moved = {name: value for name in OF_THE_MACHINE if (value := getattr(given, name)) != getattr(defaults, name)}
    if moved.get("rollout_backend") == "local" or ("rollout_backend" in moved and "num_workers" not in moved):
        moved = {"num_workers": None, **moved}
    config = RunConfig(**{**values, **moved})
    with warnings.catch_warnings(record=True) as faults:
        warnings.simplefilter("always")
        checkpoint = latest_checkpoint(run_dir)
    found = "; ".join(str(fault.message).removeprefix("Passed over: ").split(";")[0] for fault in faults)
    if checkpoint is None:
        raise UsageError(
            f"{run_dir} holds no whole checkpoint ({found or 'none was written'}): start a new run without --resume."
        )
    if found:
        print(f"warning: {found}; going on from {checkpoint.name}", file=sys.stderr)
    return config, run_dir, checkpoint


if __name__ == "__main__":
    run_main(main)
