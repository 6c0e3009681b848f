"""BALROG's BabyAI protocol for any policy, beside the figures that BALROG publishes.

    python experiments/benchmarks/balrog_babyai.py --policy runs/.../final
    python experiments/benchmarks/balrog_babyai.py --policy runs/.../final --episodes 100 --sample true
    python experiments/benchmarks/balrog_babyai.py --policy remote --remote_model gpt-4o-mini

Five tasks (`envs/babyai_mixed.py`), 10 episodes each as in BALROG, up to 64 or 128 steps; progress is 1 where the
mission is done and 0 else. The policy is shown the 7 x 7 cells that the agent sees, at its own run's tile size, or 16
pixels as in BALROG where it has none. Prints success by task, with Wilson intervals, beside a random policy; and means.

What is not BALROG's: the seeds (BALROG draws them anew each time; ours are held out and fixed), the prompt (BALROG adds
a description of the view in words, which its VLMs read beside the image, and up to 16 past observations), and a policy
that has learned these tasks, where BALROG's have not. A model's answer that names no action goes forward, as there.
"""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.envs.settings import EnvSettings  # noqa: E402
from manako.experiments.common.command_line import (  # noqa: E402
    CommandLine,
    UsageError,
    run_main,
    show,
    show_loading,
)
from manako.experiments.common.played_policy import read_played, with_the_runs  # noqa: E402
from manako.experiments.common.remote import asking, check_flags  # noqa: E402
from manako.experiments.common.run_folder import write_text, writing  # noqa: E402
from manako.experiments.common.settings import EvaluateCommand  # noqa: E402
from manako.policies.remote.settings import REMOTE  # noqa: E402

if TYPE_CHECKING:
    from manako.policies.interface import Policy

ENV, LEVEL = "manako/BabyAI-v0", "manako/MixedLocal-v0"
LIMITS = {"goto": 64, "pickup": 64, "open": 128, "putnext": 128, "pick_up_seq_go_to": 128}  # task -> steps
EPISODES = 10  # a task
INSTEAD = "go forward"  # of an answer that names no action
TILE = 16  # pixels, where no run says another
PUBLISHED = {  # BALROG, VLM track: mean progress in %, standard error where it is given
    "Claude 3.5 Sonnet": "82.0 +- 5.4",
    "Gemini 2.5 Pro": "74.0",
    "Llama 3.2 90B Vision": "66.0",
    "GPT-4o": "62.0",
    "Qwen2-VL-72B": "34.0",
    "Qwen2-VL-7B": "2.0",
}


def main() -> int:
    """Runs the protocol once; returns the exit code."""
    line = read_line()
    command = with_the_runs(line)
    show(
        "BALROG",
        f"{line.settings.policy.policy} on BabyAI, {command.run.episodes} episodes of each of {len(LIMITS)} tasks",
    )
    held = writing("--output", command.run.output)
    with held, asking(command.remote if command.policy.policy == REMOTE else None):
        show_loading()
        measure(command)
    return 0


def read_line(arguments: Sequence[str] | None = None) -> CommandLine[EvaluateCommand]:
    """Returns the settings of these words, by default of this program's command line.

    Raises:
        UsageError: no policy, what the protocol fixes, or a file of results that exists.
    """
    expected = "a run folder, a checkpoint, a model folder, a Hub id, a preset, or remote"
    line = read_played(EvaluateCommand, "BALROG's BabyAI protocol for any policy.", expected, arguments)
    check_flags(EvaluateCommand, line.given, "policy", line.settings.policy.policy)
    for flag in ("env", "gif", "max_episode_steps", "success_return"):
        if flag in line.given:
            raise UsageError(f"--{flag} came, and the protocol says it: leave it out, or use evaluate.py.")
    environment = dataclasses.replace(line.settings.environment, env=ENV)
    run = line.settings.run
    run = run if "episodes" in line.given else dataclasses.replace(run, episodes=EPISODES)
    policy = line.settings.policy
    if policy.policy == REMOTE and "illegal_action" not in line.given:
        policy = dataclasses.replace(policy, illegal_action=INSTEAD)
    settings = dataclasses.replace(line.settings, environment=environment, policy=policy, run=run)
    return dataclasses.replace(line, settings=settings, given=line.given | {"env"})


def environment_of(task: str, environment: EnvSettings) -> EnvSettings:
    """Returns what a task is played as: of the policy's own settings, how it is shown and which actions there are."""
    own = {name: value for name, value in (environment.env_kwargs or {}).items() if name not in ("level", "held_out")}
    fixed = {"level": LEVEL, "level_kwargs": {"task": task}, "missions": "train"}
    return dataclasses.replace(environment, env=ENV, env_kwargs={"tile_size": TILE, **own, **fixed})


def measure(command: EvaluateCommand) -> dict[str, Any]:
    """Plays the tasks, prints the table and writes the results; returns them."""
    from manako.agent.report.evaluation import evaluate
    from manako.envs import held_out_seeds
    from manako.experiments.common.environments import make_vector_env
    from manako.experiments.common.evaluating import set_sampling
    from manako.experiments.common.progress import plain_console

    run, policy = command.run, _policy(command)
    set_sampling(run, policy)
    seeds, results = held_out_seeds(run.episodes, run.seed), {}
    for task in LIMITS:
        count = min(command.environment.num_envs, run.episodes)
        with contextlib.closing(
            make_vector_env(environment_of(task, command.environment), count, run.seed, held_out=True)
        ) as env:
            results[task] = {
                "policy": evaluate(policy, env, seeds, sample=run.sample, seed=run.seed).summary(),
                "random": evaluate(policy, env, seeds, "random", seed=run.seed).summary(),
            }
        plain_console().print(f"{task}: {results[task]['policy']['success']:.0%}")
    summary = {"tasks": results, "mean": {row: mean_of(results, row) for row in ("policy", "random")}}
    _print(summary, run.sample)
    if run.output:
        write_text(Path(run.output), json.dumps(summary, indent=2))
    return summary


def mean_of(results: dict[str, dict[str, dict[str, Any]]], row: str) -> dict[str, Any]:
    """Returns mean progress in % over the tasks, which all have as many episodes, its standard error and interval."""
    from manako.agent.report.statistics import wilson_interval

    counts = [result[row]["episodes"] for result in results.values()]
    episodes = sum(counts)
    successes = round(
        sum(result[row]["success"] * count for result, count in zip(results.values(), counts, strict=True))
    )
    rate = successes / episodes
    return {
        "progress": 100 * rate,
        "standard_error": 100 * (rate * (1 - rate) / episodes) ** 0.5,
        "ci95": [100 * bound for bound in wilson_interval(successes, episodes)],
        "episodes": episodes,
    }


def _policy(command: EvaluateCommand) -> "Policy":
    from manako.experiments.common.building import policy_of_run
    from manako.experiments.common.evaluating import remote_of

    first, run = environment_of(next(iter(LIMITS)), command.environment), command.run
    if command.policy.policy == REMOTE:
        return remote_of(command, first, run.episodes * sum(LIMITS.values()))
    return policy_of_run(first, command.policy, run.seed, run.torch_threads)[0]


def _print(summary: dict[str, Any], sample: bool) -> None:
    from rich import box
    from rich.table import Table

    from manako.experiments.common.progress import plain_console

    table = Table(
        title=f"{'drawn' if sample else 'likeliest'} actions, held-out seeds", box=box.SIMPLE, title_justify="left"
    )
    for column in ("task", "policy [95 %]", "random [95 %]", "steps"):
        table.add_column(column, justify="left" if column == "task" else "right", no_wrap=True)
    for task, rows in summary["tasks"].items():
        cells = [
            f"{row['success']:.1%} [{row['success_ci95'][0]:.1%}, {row['success_ci95'][1]:.1%}]"
            for row in (rows["policy"], rows["random"])
        ]
        table.add_row(task, *cells, f"{rows['policy']['length_mean']:.1f}")
    cells = [
        f"{mean['progress']:.1f}% [{mean['ci95'][0]:.1f}%, {mean['ci95'][1]:.1f}%]"
        for mean in (summary["mean"]["policy"], summary["mean"]["random"])
    ]
    table.add_row("mean progress", *cells, "")
    console, mean = plain_console(), summary["mean"]["policy"]
    console.print(table)
    console.print(
        f"As BALROG writes it: {mean['progress']:.1f} +- {mean['standard_error']:.1f}, a standard error over "
        f"{mean['episodes']} episodes. BALROG's VLM track, not trained on these tasks:"
    )
    for model, figure in PUBLISHED.items():
        console.print(f"  {model:<22}{figure}")


if __name__ == "__main__":
    run_main(main)
