"""The heavy part of compare_sb3.py: our training, judged every few updates, and the table of both."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from manako.agent.ppo_trainer import PPOTrainer
from manako.agent.report.evaluation import evaluate
from manako.experiments.common.building import make_trainer_args, policy_of_run
from manako.experiments.common.environments import make_vector_env
from manako.experiments.common.settings import PPOCommand
from manako.policies import VLMPolicy

Judge = Callable[[int, float, float], bool]  # (env steps, seconds, success rate) -> whether that is enough


class Curve:
    """The evaluations of one run: a `Judge` that keeps what it hears.

    Args:
        target: the success rate that is enough.
    """

    def __init__(self, target: float) -> None:
        self.target = target
        self.evaluations: list[dict[str, float]] = []
        self.reached: dict[str, float] | None = None

    def __str__(self) -> str:
        last = self.evaluations[-1]
        return f"{last['success']:.1%} after {last['steps']:,} steps, {last['seconds']:.0f} s"

    def __call__(self, steps: int, seconds: float, success: float) -> bool:
        """Notes an evaluation; returns True once the target is reached."""
        self.evaluations.append({"steps": steps, "seconds": seconds, "success": success})
        if self.reached is None and success >= self.target:
            self.reached = self.evaluations[-1]
        return self.reached is not None

    def result(self, seed: int) -> dict[str, Any]:
        """Returns the run for JSON."""
        return {"seed": seed, "reached": self.reached, "evaluations": self.evaluations}


def train_ours(command: PPOCommand, seeds: list[int], every: int, judge: Judge) -> VLMPolicy:
    """Trains until `judge` is content or `command.run.total_steps` are played.

    Args:
        command: the settings, as of run_ppo.py.
        seeds: of the held-out episodes.
        every: updates between evaluations.
        judge: hears env steps, seconds of training and the success rate after each evaluation.

    Returns:
        The trained policy.
    """
    environment, run = command.environment, command.run
    policy, _ = policy_of_run(environment, command.policy, run.seed, run.torch_threads)
    env = make_vector_env(environment, environment.num_envs, run.seed)
    held_out = make_vector_env(environment, min(environment.num_envs, len(seeds)), run.seed, held_out=True)

    class EvaluateEvery(TrainerCallback):
        """Evaluates after every `every` updates and the last; the clock stands still meanwhile."""

        resumed, seconds = 0.0, 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.resumed = time.perf_counter()

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if trainer.iteration % every and trainer.iteration < args.num_iterations:
                return
            self.seconds += time.perf_counter() - self.resumed
            played = evaluate(policy, held_out, seeds).episodes
            success = sum(episode.success is True for episode in played) / len(played)
            control.should_training_stop |= judge(trainer.iteration * trainer.num_samples, self.seconds, success)
            self.resumed = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(policy, make_trainer_args(command, Path(folder)), env)
        trainer.add_callback(EvaluateEvery())  # after the trainer's own, which counts the iteration
        trainer.train()
    env.close()
    held_out.close()
    return policy


def print_comparison(console: Console, runs: dict[str, list[dict[str, Any]]], success: float, episodes: int) -> None:
    """Prints one row a method: medians and ranges over the seeds that reached the target."""
    table = Table(title=f"{success:.0%} success on {episodes} held-out episodes", title_justify="left")
    for column in ("", "reached", "env steps (range)", "seconds (range)", "steps/s"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, results in runs.items():
        reached = [result["reached"] for result in results if result["reached"]]
        last = [result["evaluations"][-1] for result in results]
        rate = statistics.median(row["steps"] / row["seconds"] for row in last)
        table.add_row(
            name,
            f"{len(reached)} of {len(results)}",
            _range([row["steps"] for row in reached], ",.0f"),
            _range([row["seconds"] for row in reached], ",.0f"),
            f"{rate:,.0f}",
        )
    console.width = max(console.width, 100)
    console.print(table)


def _range(values: list[float], form: str) -> str:
    if not values:
        return "not reached"
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
