"""Env steps and seconds to 95 % success on held-out episodes: our policy beside Stable-Baselines3's PPO with a CNN.

    python experiments/compare_sb3.py
    python experiments/compare_sb3.py --seeds 1 --output comparison.json

Both play the same training episodes with the same PPO settings (the defaults of run_ppo.py) and are evaluated greedily
on the same held-out seeds every few updates; the time of evaluations and of building is left out. The CNN is given the
named colour as a one-hot, ours reads the instruction. The learning rate of each decays over its own budget of steps.
Needs stable-baselines3 (extra: compare).
"""

import dataclasses
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.experiments.common.command_line import UsageError, parse, run_main, setting  # noqa: E402
from manako.experiments.common.settings import RunConfig  # noqa: E402

if TYPE_CHECKING:
    from manako.policies import VLMPolicy

OURS, SB3 = "VLM policy, tiny", "Stable-Baselines3 CNN"
Judge = Callable[[int, float, float], bool]  # (env steps, seconds, success rate) -> whether that is enough


@dataclass
class CompareConfig:
    """Settings of compare_sb3.py."""

    env: str = setting("manako/GoTo-v0", "Gymnasium id of an environment whose instructions name a colour")
    seeds: int = setting(3, "how many seeds, from 0 on", ge=1)
    total_steps: int = setting(RunConfig().total_steps, "env steps of ours at most", ge=1)
    total_steps_sb3: int = setting(600_000, "env steps of Stable-Baselines3 at most", ge=1)
    success: float = setting(0.95, "share of held-out episodes to reach", gt=0, le=1)
    episodes: int = setting(200, "held-out episodes of an evaluation", ge=1)
    eval_every: int = setting(4, "updates between evaluations", ge=1)
    torch_threads: int | None = setting(
        None, "CPU threads of torch; by default 1 for ours, torch's own choice for the CNN", ge=1
    )
    output: str | None = setting(None, "JSON file for the results, must not exist")


def main() -> int:
    """One comparison; returns the exit code."""
    given = parse(CompareConfig, description="Steps and seconds to a success rate: ours and Stable-Baselines3.")
    if given.output and Path(given.output).exists():
        raise UsageError(f"{given.output!r} exists and is not overwritten: give another file.")
    if given.output and not Path(given.output).resolve().parent.is_dir():
        raise UsageError(f"The folder of {given.output!r} does not exist: make it or give another file.")
    if importlib.util.find_spec("stable_baselines3") is None:
        raise UsageError('The comparison needs stable-baselines3, which is not installed: pip install -e ".[compare]"')
    import torch
    from rich.console import Console

    from manako.experiments.benchmarks import sb3_ppo
    from manako.experiments.common.environments import held_out_seeds

    threads = given.torch_threads or torch.get_num_threads()
    console = Console(soft_wrap=True, highlight=False)
    load = os.getloadavg()
    runs: dict[str, list[dict[str, Any]]] = {OURS: [], SB3: []}
    for seed in range(given.seeds):
        config = RunConfig(
            env=given.env,
            seed=seed,
            total_steps=given.total_steps,
            eval_episodes=given.episodes,
            torch_threads=given.torch_threads,
        )
        episodes = held_out_seeds(config.seed, given.episodes)
        ours, theirs = Curve(given.success), Curve(given.success)
        train_ours(config, episodes, given.eval_every, ours)
        print(f"{OURS}, seed {seed}: {ours}", flush=True)
        torch.set_num_threads(threads)
        sb3_config = dataclasses.replace(config, total_steps=given.total_steps_sb3)
        sb3_ppo.train(sb3_config, episodes, given.eval_every, theirs)
        print(f"{SB3}, seed {seed}: {theirs}", flush=True)
        runs[OURS].append(ours.result(seed))
        runs[SB3].append(theirs.result(seed))
    print_table(console, runs, given)
    if given.output:
        about = {"settings": dataclasses.asdict(given), "load_average": [load, os.getloadavg()]}
        Path(given.output).write_text(json.dumps({**about, "runs": runs}, indent=2))
    return 0


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
        """Notes an evaluation; True once the target is reached."""
        self.evaluations.append({"steps": steps, "seconds": seconds, "success": success})
        if self.reached is None and success >= self.target:
            self.reached = self.evaluations[-1]
        return self.reached is not None

    def result(self, seed: int) -> dict[str, Any]:
        """For JSON."""
        return {"seed": seed, "reached": self.reached, "evaluations": self.evaluations}


def train_ours(config: RunConfig, seeds: list[int], every: int, judge: Judge) -> "VLMPolicy":
    """Trains until `judge` is content or `config.total_steps` are played.

    Args:
        config: the settings, as of run_ppo.py.
        seeds: of the held-out episodes.
        every: updates between evaluations.
        judge: hears env steps, seconds of training and the success rate after each evaluation.

    Returns:
        The trained policy.
    """
    import torch
    from transformers import TrainerCallback

    from manako.agent.ppo_trainer import PPOTrainer
    from manako.agent.report.evaluation import evaluate
    from manako.experiments.common.building import make_policy, make_trainer_args, quiet_libraries
    from manako.experiments.common.environments import make_env

    quiet_libraries()
    torch.manual_seed(config.seed)
    env = make_env(config, config.num_envs)
    held_out = make_env(config, min(config.num_envs, len(seeds)), held_out=True)
    policy = make_policy(config, env.action_names, env.frame_shape)

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
            success = sum(episode.success for episode in played) / len(played)
            control.should_training_stop |= judge(trainer.iteration * trainer.num_samples, self.seconds, success)
            self.resumed = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(policy, make_trainer_args(config, Path(folder)), env)
        trainer.add_callback(EvaluateEvery())  # after the trainer's own, which counts the iteration
        trainer.train()
    env.close()
    held_out.close()
    return policy


def print_table(console: Any, runs: dict[str, list[dict[str, Any]]], given: CompareConfig) -> None:
    """One row a method: medians and ranges over the seeds that reached the target."""
    from rich.table import Table

    table = Table(title=f"{given.success:.0%} success on {given.episodes} held-out episodes", title_justify="left")
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


if __name__ == "__main__":
    run_main(main)
