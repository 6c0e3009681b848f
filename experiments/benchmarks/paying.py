"""The heavy part of reward_scale.py: an environment that pays in another unit, its training, table and chart."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import gymnasium as gym
from rich.console import Console
from rich.table import Table

from manako.agent.ppo_trainer import PPOTrainer
from manako.experiments.benchmarks.settings import RUN, RewardScaleSettings
from manako.experiments.common.building import make_trainer_args, policy_of_run
from manako.experiments.common.environments import make_vector_env

PAID = "manako-benchmarks/Paid-v0"
FACTORS = (0.01, 1.0, 100.0)  # by which rewards are multiplied
LAST = 0.2  # of the training, in which success is told


def paid(env: str, factor: float, render_mode: str | None = None) -> gym.Env:
    """Returns an environment whose rewards are multiplied by `factor`."""
    return gym.wrappers.TransformReward(gym.make(env, render_mode=render_mode), lambda reward: float(reward) * factor)


gym.register(PAID, "manako.experiments.benchmarks.paying:paid")


def compare(given: RewardScaleSettings) -> list[dict[str, Any]]:
    """Trains once for each seed, factor, and with and without the scaling; returns the runs' training curves."""
    runs = []
    for seed in range(given.seeds):
        for factor in FACTORS:
            for scaled in (False, True):
                curve = train(given, seed, factor, scaled)
                runs.append({"seed": seed, "factor": factor, "scaled": scaled, "curve": curve})
                print(f"seed {seed}  rewards x {factor:g}  scaled: {scaled}  success {last(curve):.1%}", flush=True)
    return runs


def train(given: RewardScaleSettings, seed: int, factor: float, scaled: bool) -> list[tuple[int, float]]:
    """Returns (env steps, success of the episodes that ended in the iteration) of each iteration."""
    environment = dataclasses.replace(
        RUN.environment, env=PAID, env_kwargs={"env": given.env, "factor": factor}, num_envs=given.num_envs
    )
    command = dataclasses.replace(
        RUN,
        environment=environment,
        ppo=dataclasses.replace(RUN.ppo, scale_returns=scaled),
        run=dataclasses.replace(RUN.run, seed=seed, total_steps=given.total_steps),
    )
    policy, _ = policy_of_run(environment, command.policy, seed, 1)
    env = make_vector_env(environment, environment.num_envs, seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(policy, make_trainer_args(command, Path(folder)), env)
        trainer.train()
    env.close()
    rows = [row for row in trainer.state.log_history if row.get("success_rate") is not None]
    return [(int(row["env_steps"]), float(row["success_rate"])) for row in rows]


def last(curve: list[tuple[int, float]]) -> float:
    """Returns the mean success of the last fifth of the training."""
    kept = [success for steps, success in curve if steps > (1 - LAST) * curve[-1][0]]
    return sum(kept) / len(kept)


def print_comparison(runs: list[dict[str, Any]], total_steps: int) -> None:
    """Prints a row a factor: success at the end, each seed's."""
    table = Table(title=f"success in the last fifth of {total_steps:,} steps, by seed", title_justify="left")
    for column in ("rewards", "as they are", "scaled"):
        table.add_column(column, no_wrap=True)
    for factor in FACTORS:
        cells = [
            "  ".join(f"{last(run['curve']):.0%}" for run in runs if (run["factor"], run["scaled"]) == (factor, scaled))
            for scaled in (False, True)
        ]
        table.add_row(f"x {factor:g}", *cells)
    Console().print(table)


def draw(runs: list[dict[str, Any]], path: Path, env: str) -> None:
    """Draws success over steps, a panel each for rewards as they are and scaled, a line a seed, a colour a factor."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(8.0, 3.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for ax, scaled in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        for run in (run for run in runs if run["scaled"] is scaled):
            steps, success = zip(*run["curve"], strict=True)
            # an odd line lies on the next one where the unit does not matter, so each is drawn in dashes of its own
            style = ("-", "--", ":")[FACTORS.index(run["factor"]) % 3]
            label = f"rewards x {run['factor']:g}" if run["seed"] == 0 else None
            ax.plot(steps, success, style, color=f"C{FACTORS.index(run['factor'])}", linewidth=1.4, label=label)
        ax.set_title("rewards scaled" if scaled else "rewards as they are (scale_returns: false)", fontsize=10)
        ax.set_xlabel("environment steps")
        ax.grid(color="#dddddd", linewidth=0.6)
        ax.legend(fontsize=8, loc="lower right")
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    figure.axes[0].set_ylabel(f"success in training (%)\n{env}")
    figure.savefig(path)
