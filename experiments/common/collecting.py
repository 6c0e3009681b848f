"""Trajectories of collect.py and of run_dpo.py: rollouts until enough episodes have ended, as a dataset."""

import contextlib
import functools
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from datasets import Dataset

from manako.agent.backends import make_rollouts
from manako.agent.collector import RolloutCollector
from manako.agent.data.demonstrators import RandomPlayer, RecordedPlayer, ScriptedPlayer
from manako.agent.data.recordings import Recording, split_over_slots
from manako.agent.data.trajectories import episode_returns, episode_success, save_trajectories, to_dataset
from manako.agent.interfaces import Rollouts
from manako.agent.rollout import Rollout
from manako.experiments.common.building import connected, copy_maker, make_plan, policy_of_run
from manako.experiments.common.command_line import UsageError
from manako.experiments.common.environments import knows_expert, make_vector_env
from manako.experiments.common.outcomes import outcome_in_words
from manako.experiments.common.settings import CollectCommand, DPOCommand
from manako.policies import VLMPolicy
from manako.policies.interface import Policy

PATIENCE = 100_000  # steps to wait for the first episode's end


def collect(command: CollectCommand, recordings: Sequence[Recording], has_expert: bool, started: float) -> int:
    """Plays and writes the dataset.

    Args:
        command: the settings.
        recordings: the episodes to play again, none for other players.
        has_expert: whether the environment's expert can be asked what it would do.
        started: `time.perf_counter()` at the program's start.

    Returns:
        The exit code.
    """
    with connected(command.workers):
        return _collect(command, recordings, has_expert, started)


def _collect(command: CollectCommand, recordings: Sequence[Recording], has_expert: bool, started: float) -> int:
    environment, run = command.environment, command.run
    policy, _ = policy_of_run(environment, command.policy, run.seed, run.torch_threads)
    if recordings:
        rollouts, quota = _replay(command, policy, recordings, has_expert)
    else:
        rollouts, quota = _play(command, policy, has_expert), None
    named = {
        "expert": f"expert, wrong {run.error_rate:.0%}" if run.error_rate else "expert",
        "policy": f"policy {command.policy.policy}",
        "random": "random",
        "recorded": f"recorded {run.recording}",
    }
    kwargs = None if environment.env_kwargs is None else json.dumps(environment.env_kwargs)
    about = {"env_kwargs": kwargs, "seed": run.seed, "error_rate": run.error_rate}
    about |= {"policy": command.policy.policy, "instruction": environment.instruction}
    dataset = to_dataset(rollouts, policy, environment.env, named[run.player], about, quota)
    save_trajectories(dataset, Path(str(run.output)))
    success = episode_success(dataset)
    print(
        f"{len(success):,} episodes, {len(dataset):,} steps of {named[run.player]} on {environment.env}: "
        f"{outcome_in_words(success, episode_returns(dataset))}; written to {run.output} in "
        f"{time.perf_counter() - started:.0f} s"
    )
    return 0


def _play(command: CollectCommand, policy: VLMPolicy, has_expert: bool) -> list[Rollout]:
    """Rollouts until enough episodes have ended."""
    run = command.run
    player: Policy = policy
    copy: Callable[[], Policy] = copy_maker(command.policy, policy, run.seed, run.torch_threads)
    if run.player == "expert":
        copy = functools.partial(ScriptedPlayer, policy.spec, run.error_rate)
        player = copy()
    elif run.player == "random":
        copy = functools.partial(RandomPlayer, policy.spec)
        player = copy()
    plan = make_plan(
        command.environment,
        command.workers,
        player,
        copy,
        num_steps=run.num_steps,
        num_iterations=1_000_000,
        seed=run.seed,
        group_size=run.group_size if run.group_size > 1 else None,
        bf16=run.bf16,
        record=True,
        ask_expert=has_expert,
    )
    with contextlib.closing(make_rollouts(command.workers.rollout_backend, plan)) as source:
        return play_until(source, run.episodes or 500, command.environment.env)


def _replay(
    command: CollectCommand, policy: VLMPolicy, recordings: Sequence[Recording], has_expert: bool
) -> tuple[list[Rollout], list[int]]:
    """Rollouts in which every recording is played to its end, and how many of them each slot has played."""
    environment, run = command.environment, command.run
    player = RecordedPlayer(policy.spec, split_over_slots(recordings, environment.num_envs))
    env = make_vector_env(environment, len(player.queues), run.seed, seed_lists=player.seed_lists)
    collector = RolloutCollector(env, player, run.num_steps, run.seed, record=True, ask_expert=has_expert)
    with contextlib.closing(collector):
        rollouts = [collector.collect(number) for number in range(math.ceil(player.num_steps / run.num_steps))]
    return rollouts, player.quota


def own_trajectories(command: DPOCommand, policy: VLMPolicy, number: int) -> Dataset:
    """Returns the policy's own episodes, sampled, other ones in every round."""
    environment, dpo, seed = command.environment, command.dpo, command.run.seed
    env = make_vector_env(environment, environment.num_envs, seed, group_size=dpo.group_size)
    with contextlib.closing(env):
        expert = knows_expert(env)
        collector = RolloutCollector(env, policy, dpo.num_steps, seed, rounds=True, record=True, ask_expert=expert)
        rollouts = play_until(collector, dpo.episodes, environment.env, first=1000 * number)
    return to_dataset(rollouts, policy, environment.env, f"policy {command.policy.policy}, round {number + 1}", {})


def play_until(source: Rollouts, episodes: int, env: str, first: int = 0) -> list[Rollout]:
    """Returns rollouts from number `first` on, until as many episodes have ended.

    Raises:
        UsageError: none ended in more than `PATIENCE` steps of all slots together.
    """
    rollouts: list[Rollout] = []
    ended = steps = 0
    while ended < episodes:
        rollouts.append(source.collect(first + len(rollouts)))
        ended += len(rollouts[-1].episodes)
        steps += source.num_envs * source.num_steps
        if steps > PATIENCE and not ended:
            raise UsageError(
                f"No episode of {env} ended in {steps:,} steps of {source.num_envs} environments: expected an "
                "environment whose episodes end, and --num_steps no shorter than they are."
            )
    return rollouts
