"""The evaluation of evaluate.py: the policy and its controls on held-out seeds, a table, a file, a GIF."""

import contextlib
import json
from pathlib import Path

from manako.agent.report.evaluation import CONDITIONS, evaluate_all
from manako.envs import held_out_seeds
from manako.envs.settings import EnvSettings
from manako.experiments.common import stopping
from manako.experiments.common.building import policy_of_run
from manako.experiments.common.command_line import UsageError
from manako.experiments.common.ending import only_warned
from manako.experiments.common.environments import dead_frames, make_vector_env, sights, warn_of
from manako.experiments.common.progress import RowsDone, plain_console, print_table
from manako.experiments.common.remote import make_remote_policy
from manako.experiments.common.results import unfinished, write_gif
from manako.experiments.common.run_folder import write_text
from manako.experiments.common.settings import EvaluateCommand, EvaluateSettings
from manako.policies.interface import Policy
from manako.policies.remote.ledger import DOLLAR
from manako.policies.remote.settings import REMOTE
from manako.policies.remote_policy import RemotePolicy
from manako.policies.text_policy import Sampling, TextPolicy

UNDER_WAY = ".under_way"  # after the name of --output


def run_evaluation(command: EvaluateCommand, name: str) -> int:
    """Runs one evaluation.

    Args:
        command: the settings, with those of the policy's run.
        name: of the policy, as it was given.

    Returns:
        The exit code.
    """
    stopping.tidy_up_from_here()
    environment, run, console = command.environment, command.run, plain_console()
    remote = make_remote(command) if command.policy.policy == REMOTE else None
    policy = remote or policy_of_run(environment, command.policy, run.seed, run.torch_threads)[0]
    set_sampling(run, policy)
    warn_of(dead_frames(environment, *sights(environment, run.seed)))
    count = min(environment.num_envs, run.episodes)
    seeds, kept = held_out_seeds(run.episodes, run.seed), None
    if run.output and remote is None:
        file = Path(run.output + UNDER_WAY)
        kept = unfinished(file, environment, policy, count, seeds, run.eval_steps, [run.sample, run.top_p])
    env = make_vector_env(environment, count, run.seed, held_out=True, on_fault="give up")
    with contextlib.closing(env), stopping.at_the_next_step() if kept else contextlib.nullcontext():
        console.print(f"episodes     {env.limit_from}")
        try:
            evaluations = evaluate_all(
                policy,
                env,
                seeds,
                run.sample,
                done=RowsDone(console, run.episodes, run.eval_steps),
                most_steps=run.eval_steps,
                kept=kept,
            )
        except BaseException:
            if kept is not None and kept.file.exists():
                console.print(f"What was played is kept in {kept.file}: the same command goes on with it.")
            raise
    summary = {row: evaluation.summary() for row, evaluation in evaluations.items()}
    print_table(console, summary, f"{name} on {environment.env}, held-out seeds of seed {run.seed}")
    if run.output:
        write_text(Path(run.output), json.dumps(summary, indent=2))
    if kept is not None:
        kept.end()
    if run.gif:
        with only_warned(run.gif):
            write_gif(environment, policy, run.seed, run.gif_episodes, Path(run.gif))
    if remote is not None:
        console.print(f"asked        {remote.ledger.in_words()}")
    return 0


def set_sampling(run: EvaluateSettings, policy: Policy) -> None:
    """Makes a policy that writes draw from the nucleus that the settings ask for.

    Raises:
        UsageError: nothing is drawn, or the policy writes nothing.
    """
    if run.top_p == 1:
        return
    if not run.sample or not isinstance(policy, TextPolicy):
        raise UsageError(
            f"--top_p {run.top_p:g} came, which is of sampled answers in text: expected --sample with it and a policy "
            "of --action_format text, or leave it out."
        )
    policy.sampling = Sampling(policy.text.temperature, run.top_p)


def make_remote(command: EvaluateCommand) -> RemotePolicy:
    """Returns the policy of the server that the settings name; says what all rows may cost before it is asked."""
    asking = [row for row in CONDITIONS if row != "random"]
    most = command.run.eval_steps // len(CONDITIONS) * len(asking)
    asked = f"{len(asking)} rows ask, once for each step that shows something new: "
    return remote_of(command, command.environment, most, asked, "; fewer --episodes or --eval_steps ask less")


def remote_of(
    command: EvaluateCommand, environment: EnvSettings, most: int, asked: str = "", fewer: str = ""
) -> RemotePolicy:
    """Returns the policy of the server that the settings name; says what it may cost before it is asked.

    Args:
        command: the settings.
        environment: what is played.
        most: requests.
        asked: why so many, in words before them.
        fewer: what asks less, in words behind them.
    """
    console = plain_console()
    with contextlib.closing(make_vector_env(environment, 1, command.run.seed, held_out=True)) as env:
        shown = env.action_names, env.frame_shape, env.action_space
        policy = make_remote_policy(command.policy, command.remote, environment, *shown)
    for heading, text in policy.describe():
        console.print(f"{heading:<13}{text}")
    cost = policy.most_cost() * most / DOLLAR
    dollars = f", ${cost:,.2f} at most" if cost else ""
    console.print(f"estimate     {asked}{most:,} requests at most{dollars}{fewer}")
    return policy
