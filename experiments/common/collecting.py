"""Trajectories of collect.py and of run_dpo.py: episodes that are fixed beforehand, all played to their end."""

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from datasets import Dataset

from manako.agent.backends import make_rollouts
from manako.agent.collector import RolloutCollector
from manako.agent.data.demonstrators import RandomPlayer, RecordedPlayer, ScriptedPlayer
from manako.agent.data.recordings import Recording, split_over_slots
from manako.agent.data.trajectories import (
    episode_returns,
    episode_success,
    save_trajectories,
    to_dataset,
    without_inputs,
)
from manako.agent.data.under_way import UnderWay
from manako.agent.errors import TrainingError
from manako.agent.faults import FaultLog
from manako.agent.interfaces import NOT_FIXED, Rollouts
from manako.agent.png import pixels_of
from manako.agent.report.unfinished import policy_digest
from manako.agent.rollout import Rollout
from manako.envs import training_seeds
from manako.experiments.common import stopping
from manako.experiments.common.building import connected, copy_maker, make_plan, policy_of_run
from manako.experiments.common.command_line import UsageError, as_sections
from manako.experiments.common.ending import ended_by
from manako.experiments.common.environments import dead_frames, knows_expert, make_segment, make_vector_env, warn_of
from manako.experiments.common.outcomes import outcome_in_words
from manako.experiments.common.progress import outcomes_in_words
from manako.experiments.common.remote import make_remote_policy, with_whole_path
from manako.experiments.common.settings import OF_THE_MACHINE, CollectCommand, DPOCommand
from manako.policies import VLMPolicy
from manako.policies.interface import Policy
from manako.policies.remote_policy import RemotePolicy

PATIENCE = 100_000  # steps to wait for an episode's end


def collect(
    command: CollectCommand, recordings: Sequence[Recording], has_expert: bool, unseeded: str | None, started: float
) -> int:
    """Plays and writes the dataset.

    Args:
        command: the settings.
        recordings: the episodes to play again, none for other players.
        has_expert: whether the environment's expert can be asked what it would do.
        unseeded: a sentence where the environment ignores its seeds.
        started: `time.perf_counter()` at the program's start.

    Returns:
        The exit code.
    """
    stopping.tidy_up_from_here()
    with connected(command.workers):
        return _collect(command, recordings, has_expert, unseeded, started)


def _collect(
    command: CollectCommand, recordings: Sequence[Recording], has_expert: bool, unseeded: str | None, started: float
) -> int:
    environment, run = command.environment, command.run
    source = command.policy
    if run.player == "remote":  # who acts then; the policy's prompts and answers are recorded
        source = dataclasses.replace(source, illegal_action=None)
    policy, env = policy_of_run(environment, source, run.seed, run.torch_threads)
    kept = None if recordings else under_way(command, policy)
    with _keeping(kept):
        if kept is None:
            rollouts, quota = _replay(command, policy, recordings, has_expert)
        else:
            rollouts, quota = _play(command, policy, has_expert, kept, env.limit)
        dataset = _write(command, policy, rollouts, quota, unseeded)
    if kept is not None:
        kept.end()
    first = rollouts[0].record
    assert first is not None, "it was asked for"
    warn_of(dead_frames(environment, pixels_of(first.images), first.instructions))
    success = episode_success(dataset)
    faults = [fault for rollout in rollouts for fault in rollout.faults]
    lost = sum(0 if rollout.failed is None else int(rollout.failed.sum()) for rollout in rollouts)
    if faults:
        print(
            f"warning: {environment.env} broke {len(faults)} times, and {lost} of {len(success) + lost} episodes were "
            f"lost with it and are not in the dataset; the last time so: {faults[-1].sentence}"
        )
    print(
        f"{len(success):,} episodes, {len(dataset):,} steps of {named_player(command)} on {environment.env}: "
        f"{outcome_in_words(success, episode_returns(dataset))}; written to {run.output} in "
        f"{time.perf_counter() - started:.0f} s"
    )
    said = Counter(outcome for outcome in dataset["outcome"] if outcome is not None)
    if said:
        print(f"answers: {outcomes_in_words(dict(said.most_common()))}; only legal ones are learned from")
    return 0


def under_way(command: CollectCommand, policy: VLMPolicy) -> UnderWay:
    """Returns where this recording is kept until it is whole; says so where a stopped one is gone on with."""
    sections = as_sections(command)
    of_machine = {"torch_threads", *OF_THE_MACHINE}
    identity = {
        name: value
        for part in ("environment", "policy", "workers", "run")
        for name, value in sections[part].items()
        if name not in of_machine
    }
    digest = policy_digest(policy) if command.run.player == "policy" else None
    model = command.remote.remote_model if command.run.player == "remote" else None
    kept = UnderWay(Path(f"{command.run.output}.under_way"), {**identity, "weights": digest, "remote_model": model})
    if kept.state is not None:
        episodes = sum(len(rollout.episodes) for rollout in kept.rollouts)
        print(f"going on     with {episodes:,} episodes of a start that was stopped", flush=True)
    return kept


@contextlib.contextmanager
def _keeping(kept: UnderWay | None) -> Iterator[None]:
    """Keeps what was played where something ends it, and says how to go on.

    Raises:
        RunEndedError: an error after something was played.
    """
    try:
        yield
    except BaseException as error:
        if kept is not None:
            with contextlib.suppress(TrainingError):
                kept.write()
        if kept is None or not kept.is_there:
            raise
        episodes = sum(len(rollout.episodes) for rollout in kept.rollouts)
        print(f"{episodes:,} episodes are kept in {kept.folder}: the same command goes on from there.", flush=True)
        if not isinstance(error, Exception):
            raise
        raise ended_by(error, kept.folder) from error


def named_player(command: CollectCommand) -> str:
    """Returns who plays, in words."""
    run = command.run
    return {
        "expert": f"expert, wrong {run.error_rate:.0%}" if run.error_rate else "expert",
        "policy": f"policy {command.policy.policy}",
        "random": "random",
        "recorded": f"recorded {run.recording}",
        "remote": f"remote {command.remote.remote_model}",
    }[run.player]


def _write(
    command: CollectCommand,
    policy: VLMPolicy,
    rollouts: Sequence[Rollout],
    quota: Sequence[int],
    unseeded: str | None,
) -> Dataset:
    """Writes the dataset of whole episodes, and returns it."""
    environment, run = command.environment, command.run
    kwargs = None if environment.made_with is None else json.dumps(environment.made_with)
    about = {"env_kwargs": kwargs, "seed": run.seed, "error_rate": run.error_rate}
    about |= {"policy": command.policy.policy, "instruction": environment.instruction}
    about |= {"fixed_by_seed": unseeded is None} | ({} if unseeded is None else {"note": NOT_FIXED})
    dataset = to_dataset(rollouts, policy, environment.env, named_player(command), about, quota)
    save_trajectories(dataset, Path(str(run.output)))
    return dataset


def _play(
    command: CollectCommand, policy: VLMPolicy, has_expert: bool, kept: UnderWay, limit: int | None
) -> tuple[list[Rollout], list[int]]:
    """Rollouts in which all episodes are played to their end, and how many of them each slot has played."""
    environment, workers, run = command.environment, command.workers, command.run
    player: Policy = policy
    copy: Callable[[], Policy] = copy_maker(command.policy, policy, run.seed, run.torch_threads)
    if run.player == "expert":
        copy = functools.partial(ScriptedPlayer, policy.spec, run.error_rate)
        player = copy()
    elif run.player == "random":
        copy = functools.partial(RandomPlayer, policy.spec)
        player = copy()
    elif run.player == "remote":
        player = make_remote(command, policy)
        copy = functools.partial(
            RemotePolicy, player.spec, player.settings, player.ledger.file, command.policy.illegal_action
        )
    seeds = training_seeds(run.episodes or 500, run.seed, run.group_size)
    equal = workers.workers * (workers.rollout_batch_size or 1)  # slots come in multiples of this
    num_envs = min(environment.num_envs, equal * math.ceil(len(seeds) / equal))
    seed_lists, quota = spread(seeds, num_envs)
    plan = make_plan(
        dataclasses.replace(environment, num_envs=num_envs),
        workers,
        player,
        copy,
        num_steps=run.num_steps,
        num_iterations=1_000_000,
        seed=run.seed,
        bf16=run.bf16,
        record=True,
        ask_expert=has_expert,
    )
    segment = functools.partial(
        make_segment, environment, run.seed, 1, seed_lists=seed_lists, step_timeout=workers.step_timeout
    )
    plan = dataclasses.replace(plan, make_segment=segment)
    with contextlib.closing(make_rollouts(workers.rollout_backend, plan)) as source:
        if kept.state is not None:
            source.load_state_dict(kept.state, {})
        log = FaultLog(workers.max_fault_rate)
        return play_to_the_end(source, quota, environment.env, limit=limit, log=log, kept=kept), quota


def make_remote(command: CollectCommand, policy: VLMPolicy) -> RemotePolicy:
    """Returns the player of the server that the settings name; says what it may cost before it is asked."""
    spec, settings = policy.spec, with_whole_path(command.remote)
    shown = spec.action_names, spec.frame_shape, spec.action_space
    player = make_remote_policy(command.policy, settings, command.environment, *shown)
    for heading, text in player.describe():
        print(f"{heading:<13}{text}")
    print(f"estimate     a request for each step of {command.run.episodes or 500:,} episodes", flush=True)
    return player


def _replay(
    command: CollectCommand, policy: VLMPolicy, recordings: Sequence[Recording], has_expert: bool
) -> tuple[list[Rollout], list[int]]:
    """Rollouts in which every recording is played to its end, and how many of them each slot has played."""
    environment, run = command.environment, command.run
    player = RecordedPlayer(policy.spec, split_over_slots(recordings, environment.num_envs))
    env = make_vector_env(environment, len(player.queues), run.seed, seed_lists=player.seed_lists)
    collector = RolloutCollector(env, player, run.num_steps, run.seed, record=True, ask_expert=has_expert)
    with contextlib.closing(collector):
        numbers = range(math.ceil(player.num_steps / run.num_steps))
        rollouts = [without_inputs(collector.collect(number)) for number in numbers]
    return rollouts, player.quota


def own_trajectories(command: DPOCommand, policy: VLMPolicy, number: int) -> Dataset:
    """Returns the policy's own episodes, sampled, other ones in every round."""
    environment, dpo, seed = command.environment, command.dpo, command.run.seed
    with contextlib.closing(make_vector_env(environment, 1, seed, held_out=True)) as env:
        expert = knows_expert(env)
    seeds = training_seeds(dpo.episodes, seed, dpo.group_size, part=number)
    seed_lists, quota = spread(seeds, min(environment.num_envs, len(seeds)))
    env = make_vector_env(environment, len(quota), seed, seed_lists=seed_lists, on_fault="give up")
    with contextlib.closing(env):
        collector = RolloutCollector(env, policy, dpo.num_steps, seed, record=True, ask_expert=expert)
        rollouts = play_to_the_end(collector, quota, environment.env, first=1000 * number, limit=env.limit)
    player = f"policy {command.policy.policy}, round {number + 1}"
    return to_dataset(rollouts, policy, environment.env, player, {}, quota)


def spread(seeds: Sequence[int], slots: int) -> tuple[list[list[int]], list[int]]:
    """Returns the seeds of each slot's episodes, neighbouring ones as equally as can be, and how many it plays.

    A slot beyond the last seed plays that again, and 0 episodes of it count.
    """
    parts = [part.tolist() for part in np.array_split(np.array(seeds), slots)]
    return [part or [seeds[-1]] for part in parts], [len(part) for part in parts]


def play_to_the_end(
    source: Rollouts,
    quota: Sequence[int],
    env: str,
    first: int = 0,
    limit: int | None = None,
    log: FaultLog | None = None,
    kept: UnderWay | None = None,
) -> list[Rollout]:
    """Returns rollouts from number `first` on, until every slot has ended its episodes, however long they are.

    Which episodes count is fixed beforehand: were it those that end first, it would be the short ones.

    Args:
        source: of the rollouts.
        quota: episodes of each slot.
        env: its name.
        first: number of the first rollout.
        limit: steps of an episode at most, where that is known.
        log: of the environments' faults.
        kept: what a former start has played, and where this one is kept.

    Raises:
        WorkersError: environments broke too often.
        UsageError: none ended in more than `PATIENCE` steps of the slots that still play, together.
    """
    rollouts: list[Rollout] = [] if kept is None else list(kept.rollouts)
    log = FaultLog() if log is None else log
    left, waited = np.array(quota), 0
    for rollout in rollouts:
        _count(rollout, left)
    while (left > 0).any():
        playing = int((left > 0).sum())
        rollouts.append(without_inputs(source.collect(first + len(rollouts))))
        if kept is not None:
            kept.add(rollouts[-1], source.state_dict())
        log.add(rollouts[-1].faults, playing * source.num_steps, first + len(rollouts))
        waited = 0 if _count(rollouts[-1], left) else waited + playing * source.num_steps
        if waited > (PATIENCE if limit is None else max(PATIENCE, playing * (limit + source.num_steps))):
            raise UsageError(
                f"No episode of {env} ended in {waited:,} steps of {playing} environments, and "
                f"{sum(quota) - int(left.clip(0).sum()):,} of {sum(quota):,} had before: expected an environment whose "
                "episodes end, so set a limit, such as --max_episode_steps 500."
            )
    return rollouts


def _count(rollout: Rollout, left: np.ndarray) -> int:
    """Takes a rollout's episodes off what each slot has left to play; returns how many of them count."""
    over = [(episode.step, episode.slot) for episode in rollout.episodes]
    if rollout.failed is not None:  # one of those that were fixed beforehand, and lost
        over += [(step, slot) for step, slot in rollout.failed.nonzero().tolist()]
    counted = [slot for _, slot in sorted(over) if left[slot] > 0]
    np.subtract.at(left, counted, 1)
    return len(counted)
