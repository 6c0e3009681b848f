"""The evaluation of evaluate.py: the policy and its controls on held-out seeds, a table, a file, a GIF."""

import contextlib
import json
from pathlib import Path

from manako.agent.report.evaluation import evaluate_all
from manako.envs import held_out_seeds
from manako.experiments.common.building import policy_of_run
from manako.experiments.common.environments import dead_frames, make_vector_env, sights, warn_of
from manako.experiments.common.progress import RowsDone, plain_console, print_table
from manako.experiments.common.results import write_gif
from manako.experiments.common.settings import EvaluateCommand


def run_evaluation(command: EvaluateCommand, name: str) -> int:
    """Runs one evaluation.

    Args:
        command: the settings, with those of the policy's run.
        name: of the policy, as it was given.

    Returns:
        The exit code.
    """
    environment, run, console = command.environment, command.run, plain_console()
    policy, _ = policy_of_run(environment, command.policy, run.seed, run.torch_threads)
    warn_of(dead_frames(environment.env, *sights(environment, run.seed)))
    count = min(environment.num_envs, run.episodes)
    with contextlib.closing(make_vector_env(environment, count, run.seed, held_out=True)) as env:
        evaluations = evaluate_all(
            policy,
            env,
            held_out_seeds(run.episodes, run.seed),
            run.sample,
            done=RowsDone(console, run.episodes, run.eval_steps),
            most_steps=run.eval_steps,
        )
    summary = {row: evaluation.summary() for row, evaluation in evaluations.items()}
    print_table(console, summary, f"{name} on {environment.env}, held-out seeds of seed {run.seed}")
    if run.output:
        Path(run.output).write_text(json.dumps(summary, indent=2))
    if run.gif:
        write_gif(environment, policy, run.seed, run.gif_episodes, Path(run.gif))
    return 0
