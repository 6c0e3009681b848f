"""A run of run_ppo.py: environments, policy, before.gif, training, evaluation with controls, curve, after.gif."""

import contextlib
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from manako.agent.backends import make_rollouts
from manako.agent.interfaces import SEEDED
from manako.agent.ppo_trainer import PPOTrainer
from manako.agent.report.callbacks import CheckpointCallback, MetricsCallback, cut_metrics, read_metrics, set_aside
from manako.agent.report.figures import learning_curve
from manako.experiments.common.building import (
    check_learns_by_acting,
    connected,
    copy_maker,
    make_plan,
    make_trainer_args,
    policy_of_run,
)
from manako.experiments.common.command_line import UsageError
from manako.experiments.common.disk_room import check_disk_room
from manako.experiments.common.environments import dead_frames, ignored_seeds, sights, warn_of
from manako.experiments.common.progress import Progress
from manako.experiments.common.results import evaluate_run, write_final, write_gif
from manako.experiments.common.run_folder import write_description, write_text
from manako.experiments.common.settings import PPOCommand
from manako.policies import VLMPolicy
from manako.policies.room import check_training_room
from manako.policies.sensitivity import sensitivity


def train(command: PPOCommand, run_dir: Path, checkpoint: Path | None, started: float) -> int:
    """Trains from the start or from a checkpoint, and evaluates; connected to Ray where workers play.

    Args:
        command: the settings.
        run_dir: the run folder; a new one is made here.
        checkpoint: where to go on from.
        started: `time.perf_counter()` at the program's start.

    Returns:
        The exit code.
    """
    with connected(command.workers):
        return _train(command, run_dir, checkpoint, started)


def _train(command: PPOCommand, run_dir: Path, checkpoint: Path | None, started: float) -> int:
    environment, ppo, run = command.environment, command.ppo, command.run
    policy, env = policy_of_run(
        environment, command.policy, run.seed, run.torch_threads, trial=checkpoint is None, num_steps=ppo.num_steps
    )
    check_learns_by_acting(policy, command.policy.trainable)
    check_training_room(policy, command.policy.trainable, policy.device)
    check_disk_room(policy, run_dir, run.keep_checkpoints)
    compared = f"and --advantage {ppo.advantage} compares episodes of one seed: {SEEDED}"
    unseeded = ignored_seeds(environment, run.seed, needed_for=None if ppo.advantage == "gae" else compared)
    staging = run_dir / ".staging"
    if checkpoint is not None:
        shutil.rmtree(staging, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        args = make_trainer_args(command, staging)
        plan = make_plan(
            environment,
            command.workers,
            policy,
            copy_maker(command.policy, policy, run.seed, run.torch_threads),
            num_steps=ppo.num_steps,
            num_iterations=args.num_iterations,
            seed=run.seed,
            group_size=None if ppo.advantage == "gae" else ppo.group_size,
            reference=ppo.kl_coef > 0,
            bf16=ppo.bf16,
        )
        rollouts = stack.enter_context(contextlib.closing(make_rollouts(command.workers.rollout_backend, plan)))
        try:
            trainer = PPOTrainer(policy, args, rollouts=rollouts)  # makes the run folder
        except OSError as error:
            raise UsageError(
                f"The run folder {str(run_dir)!r} cannot be made ({error.strerror}): give another --output_dir."
            ) from error
        if checkpoint is None:
            write_description(run_dir, command)
        else:
            iteration = int(checkpoint.name.split("-")[1])
            cut_metrics(run_dir, iteration)
            set_aside(run_dir, iteration)
        metrics = MetricsCallback(run_dir)
        saver = CheckpointCallback(trainer, run_dir, run.save_every, run.keep_checkpoints)
        progress = Progress(run_dir, command, policy, args.num_iterations, trainer.num_samples, started)
        for callback in (metrics, saver, progress):
            trainer.add_callback(callback)
        seen = None if checkpoint else sights(environment, run.seed)
        progress.header(env, None if seen is None else sensitivity(policy, *seen), unseeded)
        warn_of(None if seen is None else dead_frames(environment.env, *seen))
        if checkpoint is None:
            write_gif(environment, policy, run.seed, run.gif_episodes, run_dir / "before.gif")
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            rollouts.close()  # workers have nothing more to do
            if not saver.interrupted and trainer.failure is None:
                _finish(command, policy, run_dir, read_metrics(run_dir), progress)
                return 0
        except KeyboardInterrupt:  # a second signal, or one during the evaluation
            pass
        finally:
            saver.restore_signals()
            progress.stop()
            shutil.rmtree(staging, ignore_errors=True)
            metrics.board.close()
    again = shlex.join(["python", sys.argv[0], "--resume", str(run_dir)])
    if trainer.iteration:
        print(f"Stopped after iteration {trainer.iteration} of {args.num_iterations}. Go on with:\n  {again}")
    else:
        print("Stopped in the first iteration: nothing was learned yet, and there is nothing to go on from.")
    if trainer.failure is not None:
        raise trainer.failure
    return 130


def _finish(
    command: PPOCommand, policy: VLMPolicy, run_dir: Path, rows: list[dict[str, Any]], progress: Progress
) -> None:
    """The final policy folder, evaluation with controls, learning curve, after.gif; evaluation.json ends the run."""
    write_final(policy, run_dir)  # unless a former start wrote it and was stopped in what follows
    summary = evaluate_run(command, policy, run_dir, command.environment.num_envs)
    random = summary["random"]
    measure = "return_mean" if any(row["success"] is None for row in summary.values()) else "success"
    if measure == "return_mean":  # of the episodes that were judged, no rate is drawn
        rows = [{**row, "success_rate": None} for row in rows]
    interval = random["return_ci95" if measure == "return_mean" else "success_ci95"]
    learning_curve(
        rows,
        run_dir / "learning_curve.png",
        f"{command.policy.policy} on {command.environment.env}, seed {command.run.seed}",
        baselines={"random policy": (random[measure], tuple(interval))},
    )
    write_text(run_dir / "evaluation.json", json.dumps(summary, indent=2))
    progress.print_evaluation(summary)
