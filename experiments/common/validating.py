"""The validation of a run that trains, `--eval_every`: its seeds, its environments, what is printed of it.

Played in this process, whatever backend the rollouts come from, as the final evaluation is.
"""

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from rich.console import Console

from manako.agent.checkpoint import BEST
from manako.agent.report.callbacks import Checkpoints
from manako.agent.report.evaluation import evaluate_all
from manako.agent.report.validation import RULE, BestPolicy, Looked, Place
from manako.envs import VALIDATION, validation_seeds
from manako.experiments.common.environments import make_vector_env
from manako.experiments.common.model_card import write_card
from manako.experiments.common.results import unfinished
from manako.experiments.common.settings import PPOCommand, SFTCommand
from manako.policies import VLMPolicy

MOST_STEPS = (
    50_000  # env steps of one evaluation, or a little more: fewer whole episodes are played where they are long
)
UNDER_WAY = "validation_under_way.json"


def keep_best(
    command: PPOCommand | SFTCommand,
    policy: VLMPolicy,
    num_envs: int,
    run_dir: Path,
    saver: Checkpoints,
    place: Place,
    last: Callable[[], int],
    write: Callable[[dict[str, Any]], None],
    console: Console,
    acting: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> BestPolicy:
    """Returns the callback that evaluates a run while it trains, and keeps its best policy; says what it will do.

    Args:
        command: the run's settings.
        policy: who learns.
        num_envs: episodes side by side, at most.
        run_dir: the run folder.
        saver: as of `BestPolicy`, as are place, last and write.
        place: see there.
        last: see there.
        write: see there.
        console: where to.
        acting: makes the policy for a block what it is when it is not trained.
    """
    environment, run = command.environment, command.run
    seeds = validation_seeds(run.validation_episodes, run.seed)
    count, file = min(num_envs, len(seeds)), run_dir / UNDER_WAY

    def play() -> dict[str, Any]:
        with acting(), contextlib.ExitStack() as stack:
            kept = unfinished(file, environment, policy, count, seeds, MOST_STEPS, stop=lambda: saver.interrupted)
            env = make_vector_env(environment, count, run.seed, split=VALIDATION, on_fault="give up")
            stack.enter_context(contextlib.closing(env))
            played = evaluate_all(policy, env, seeds, most_steps=MOST_STEPS, kept=kept, conditions=("policy",))
            return played["policy"].summary()

    def heard(looked: Looked) -> None:
        file.unlink(missing_ok=True)
        console.print(in_words(looked))

    console.print(
        f"validation   every {run.eval_every:,} {place.samples.replace('_', ' ')}, {len(seeds)} episodes of seeds of "
        f"their own; {BEST}/ keeps {RULE}"
    )
    describe = functools.partial(write_card, command, policy, run_dir)
    return BestPolicy(saver, play, run_dir, run.eval_every, place, last, write, heard, describe)


def in_words(looked: Looked) -> str:
    """Returns a line on an evaluation."""
    (number, at), (samples, count) = looked.place.items()
    where = f"{number} {at:4d}  {samples.replace('_', ' ')} {count:8,d}"
    return f"validation   {where}  {measured(looked.summary)}{'  best so far' if looked.is_best else ''}"


def measured(summary: dict[str, Any]) -> str:
    """Returns success and mean return of an evaluation with their intervals, and of how many episodes they are."""
    low, high = summary["return_ci95"]
    said = f"return {summary['return_mean']:.2f} [{low:.2f}, {high:.2f}] of {summary['episodes']} episodes"
    if summary["success"] is not None:
        low, high = summary["success_ci95"]
        said = f"success {summary['success']:.1%} [{low:.1%}, {high:.1%}]  {said}"
    return said + (f", {summary['note']}" if "note" in summary else "")
