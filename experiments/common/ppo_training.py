"""A run of run_ppo.py: environments, policy, before.gif, training, evaluation with controls, curve, after.gif."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

from manako.agent.backends import make_rollouts
from manako.agent.faults import ERRORS, FaultLog
from manako.agent.interfaces import SEEDED
from manako.agent.ppo_trainer import PPOTrainer
from manako.agent.report.callbacks import CheckpointCallback, MetricsCallback, cut_metrics, read_metrics, set_aside
from manako.agent.report.figures import learning_curve
from manako.agent.report.validation import Place
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
from manako.experiments.common.ending import STAGING, Ending, only_warned, watched
from manako.experiments.common.environments import dead_frames, ignored_seeds, sights, warn_of
from manako.experiments.common.progress import Progress
from manako.experiments.common.results import evaluate_run, write_evaluation, write_final, write_gif
from manako.experiments.common.resuming import Start, in_words, keep_changes, keep_the_end
from manako.experiments.common.run_folder import write_description
from manako.experiments.common.settings import PPOCommand
from manako.experiments.common.validating import keep_best
from manako.policies import VLMPolicy
from manako.policies.room import check_training_room
from manako.policies.sensitivity import sensitivity


def train(start: Start[PPOCommand], started: float) -> int:
    """Trains from the start or from a checkpoint, and evaluates; connected to Ray where workers play.

    Args:
        start: how; a new run's folder is described here.
        started: `time.perf_counter()` at the program's start.

    Returns:
        The exit code.
    """

    def connected_to_workers(ending: Ending) -> None:
        with connected(start.command.workers):
            _train(start, started, ending)

    rate = start.command.ppo.learning_rate
    return watched(start.run_dir, start.changes is not None, rate, connected_to_workers)


def _train(start: Start[PPOCommand], started: float, ending: Ending) -> None:
    command, run_dir, checkpoint, changes = start.command, start.run_dir, start.checkpoint, start.changes
    environment, ppo, run = command.environment, command.ppo, command.run
    policy, env = policy_of_run(
        environment, command.policy, run.seed, run.torch_threads, trial=checkpoint is None, num_steps=ppo.num_steps
    )
    check_learns_by_acting(policy, command.policy.trainable)
    check_training_room(policy, command.policy.trainable, policy.device)
    check_disk_room(policy, run_dir, run.keep_checkpoints, best=run.eval_every > 0)
    compared = f"and --advantage {ppo.advantage} compares episodes of one seed: {SEEDED}"
    unseeded = ignored_seeds(environment, run.seed, needed_for=None if ppo.advantage == "gae" else compared)
    staging = run_dir / STAGING
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
        iteration = start.done
        if changes is None:
            write_description(run_dir, command)
        else:
            cut_metrics(run_dir, iteration)
            set_aside(run_dir, iteration)
            if (run_dir / "evaluation.json").exists():  # and is to be longer
                keep_the_end(run_dir, iteration * trainer.num_samples)
            keep_changes(command, run_dir, changes, iteration)
        ending.begun = True
        trainer.faults = FaultLog(command.workers.max_fault_rate, run_dir / ERRORS)
        metrics = MetricsCallback(run_dir)
        saver = CheckpointCallback(trainer, run_dir, run.save_every, run.keep_checkpoints, run.save_minutes)
        progress = Progress(run_dir, command, policy, args.num_iterations, trainer.num_samples, started)
        trainer.add_callback(metrics)
        trainer.add_callback(saver)
        seen = None if checkpoint else sights(environment, run.seed)
        progress.header(env, None if seen is None else sensitivity(policy, *seen), unseeded)
        if changes:
            progress.console.print(f"changed      {in_words(changes, iteration)}")
        warn_of(None if seen is None else dead_frames(environment, *seen))
        if checkpoint is None:
            write_gif(environment, policy, run.seed, run.gif_episodes, run_dir / "before.gif")
        if run.eval_every:
            place = Place("iteration", "env_steps", lambda number: number * trainer.num_samples)
            num_envs, last = environment.num_envs, args.num_iterations
            told = saver, place, lambda: last, metrics.append, progress.console
            trainer.add_callback(keep_best(command, policy, num_envs, run_dir, *told))
        trainer.add_callback(progress)
        ending.kept = lambda: _kept(saver, args.num_iterations)
        try:
            _fit(trainer, saver, checkpoint)
        finally:
            progress.stop()
            metrics.board.close()
        ending.kept = lambda: f"The training is done, with {run_dir / 'final'}; what is left is the evaluation."
        with only_warned("closing the environments"):
            rollouts.close()  # workers have nothing more to do
        _finish(command, policy, run_dir, read_metrics(run_dir), progress)


def _fit(trainer: PPOTrainer, saver: CheckpointCallback, checkpoint: Path | None) -> None:
    """Trains; whatever ends it, the last good iteration is kept.

    Raises:
        KeyboardInterrupt: a signal came.
    """
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.failure is not None:
            raise trainer.failure
        if saver.interrupted:
            raise KeyboardInterrupt
    except BaseException as error:
        saver.restore_signals()
        if trainer.failure is None and not saver.interrupted_whole(error):
            with only_warned("a checkpoint of the last iteration"):
                saver.keep_last(error)
        raise


def _kept(saver: CheckpointCallback, iterations: int) -> str:
    """What there is to go on with, in words."""
    if saver.last is None:
        return "Stopped in the first iteration: nothing was learned yet, and what goes on begins again."
    return f"Stopped after iteration {saver.last.name.split('-')[1]} of {iterations}."


def _finish(
    command: PPOCommand, policy: VLMPolicy, run_dir: Path, rows: list[dict[str, Any]], progress: Progress
) -> None:
    """The final policy folder, evaluation with controls, learning curve, after.gif; evaluation.json ends the run."""
    write_final(command, policy, run_dir)  # unless a former start wrote it and was stopped in what follows
    summary = evaluate_run(command, policy, run_dir, command.environment.num_envs)
    random = summary["random"]
    measure = "return_mean" if any(row["success"] is None for row in summary.values()) else "success"
    if measure == "return_mean":  # of the episodes that were judged, no rate is drawn
        rows = [{**row, "success_rate": None, "validation/success": None} for row in rows]
    interval = random["return_ci95" if measure == "return_mean" else "success_ci95"]
    with only_warned("learning_curve.png"):
        learning_curve(
            rows,
            run_dir / "learning_curve.png",
            f"{command.policy.policy} on {command.environment.env}, seed {command.run.seed}",
            baselines={"random policy": (random[measure], tuple(interval))},
        )
    write_evaluation(command, policy, run_dir, summary)
    progress.print_evaluation(summary)
