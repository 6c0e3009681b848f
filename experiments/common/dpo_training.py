"""A run of run_dpo.py: in each round trajectories, pairs, training by TRL against the policy as it was, evaluation."""

import contextlib
import functools
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from trl import DPOConfig, KTOConfig

from manako.agent.checkpoint import verify_folder, write_folder
from manako.agent.data.trajectories import load_trajectories, without_masks
from manako.agent.interfaces import ask, remember_for
from manako.agent.report.callbacks import CHECKPOINTS, checkpoints
from manako.agent.tuning.forgetting import measure_retention
from manako.agent.tuning.preferences import (
    Pair,
    branch_pairs,
    expert_pairs,
    judged_pairs,
    pair_dataset,
    return_pairs,
    state_pairs,
    unpaired,
)
from manako.agent.tuning.saving import StepCheckpoints
from manako.agent.tuning.trainers import PolicyDPOTrainer, PolicyKTOTrainer, check_learns_text
from manako.envs import Observations
from manako.experiments.common.building import check_learns_by_acting, make_tuning_args, policy_of_run
from manako.experiments.common.collecting import own_trajectories
from manako.experiments.common.command_line import UsageError
from manako.experiments.common.disk_room import check_disk_room
from manako.experiments.common.ending import Ending, watched
from manako.experiments.common.environments import ignored_seeds, make_vector_env
from manako.experiments.common.progress import plain_console, print_parts, print_retention, print_table
from manako.experiments.common.results import evaluate_run, write_evaluation, write_final
from manako.experiments.common.resuming import Start
from manako.experiments.common.run_folder import write_text
from manako.experiments.common.settings import DPOCommand
from manako.experiments.common.sft_training import describe_start, steps_kept
from manako.policies import VLMPolicy
from manako.policies.interface import Draws
from manako.policies.remote.judge import RemoteJudge
from manako.policies.remote.settings import REMOTE
from manako.policies.remote_policy import budget_in_words, make_chooser, most_cost
from manako.policies.room import check_training_room

SAME_SEED = {
    pairs: f"and --pairs {pairs} compares what follows from one seed: expected --pairs expert or state"
    for pairs in ("return", "branch")
}


ROUNDS = "rounds.json"  # what was reported of the rounds that are done


def train(start: Start[DPOCommand], started: float) -> int:
    """Trains in rounds; nothing is written before the first one's pairs are made.

    A round that was stopped goes on from the policy with which it began, whose trajectories and pairs are made again.

    Args:
        start: how; a new run's folder is described here.
        started: `time.perf_counter()` at the program's start.

    Returns:
        The exit code.
    """
    kept = functools.partial(steps_kept, start.run_dir)
    rate = start.command.dpo.learning_rate
    return watched(start.run_dir, start.changes is not None, rate, functools.partial(_train, start, started), kept)


def _train(start: Start[DPOCommand], started: float, ending: Ending) -> None:
    command, run_dir = start.command, start.run_dir
    environment, dpo, run = command.environment, command.dpo, command.run
    policy, env = policy_of_run(environment, command.policy, run.seed, run.torch_threads)
    if policy.spec.vectors is not None:
        raise UsageError(
            f"{environment.env} has actions that are vectors, and preferences are between actions of a closed set: "
            "expected an env of Discrete actions, run_sft.py --loss actions, or run_ppo.py."
        )
    check_learns_text(policy)
    check_learns_by_acting(policy, command.policy.trainable)
    policy.value_head.requires_grad_(False)  # nothing here asks for values
    check_training_room(policy, command.policy.trainable, policy.device)
    check_disk_room(policy, run_dir, run.keep_checkpoints)
    console, before = plain_console(), measure_retention(policy)
    console.print(f"episodes     {env.limit_from}")
    unseeded = ignored_seeds(environment, run.seed, needed_for=SAME_SEED.get(dpo.pairs))
    if unseeded is not None:
        console.print(f"seeds        {unseeded}")
    judge = make_judge(command, policy) if dpo.pairs == REMOTE else None
    checkpoint = start.checkpoint  # of the round under way
    reports = _rounds_done(run_dir) if start.changes is not None else []
    if reports:
        policy.load_weights(_round_folder(run_dir, len(reports)))
        console.print(f"rounds       {len(reports)} of {dpo.rounds} are done")
    for number in range(len(reports), dpo.rounds):
        if number == 0 and dpo.dataset is not None:
            spec = policy.spec
            trajectories, _ = load_trajectories(dpo.dataset, environment.env, spec.action_names, spec.frame_shape)
            if not environment.action_masks:
                trajectories = without_masks(trajectories)
        else:
            trajectories = own_trajectories(command, policy, number)
        pairs = pair_dataset(trajectories, make_pairs(command, policy, trajectories, number, judge), policy)
        console.print(f"round {number + 1}: {len(trajectories):,} steps, {len(pairs):,} pairs by {dpo.pairs}")
        if judge is not None:
            console.print(f"judged       {judge.in_words()}; {judge.chooser.client.ledger.in_words()}")
        if not ending.described:  # what can be refused has been
            describe_start(start)
            ending.begun = ending.described = True
            print_parts(console, policy)
        begun = time.perf_counter()
        rows = _train_round(command, policy, pairs, run_dir, checkpoint, sum(row["steps"] for row in reports))
        checkpoint = None
        seconds = time.perf_counter() - begun
        reports.append({"round": number + 1, "pairs": len(pairs), "seconds": seconds, "loss": rows[-1]["loss"]})
        reports[-1]["steps"] = len(rows)
        reports[-1]["evaluation"] = evaluate_run(command, policy, run_dir, environment.num_envs)
        print_table(console, reports[-1]["evaluation"], f"{environment.env}, held-out seeds")
        _end_round(policy, run_dir, reports)
    write_final(command, policy, run_dir)
    write_evaluation(command, policy, run_dir, reports[-1]["evaluation"])
    after = measure_retention(policy)
    report = {
        "stage": dpo.method,
        "rounds": reports,
        "seconds": sum(row["seconds"] for row in reports),
        "trained_parameters": sum(p.numel() for p in policy.vlm.parameters() if p.requires_grad),
        "memory": {"before": before.summary(), "after": after.summary()},
    }
    write_text(run_dir / "report.json", json.dumps(report, indent=2))
    print_retention(console, before, after)
    console.print(f"{time.perf_counter() - started:.0f} s in all; written to {run_dir}")


def _round_folder(run_dir: Path, number: int) -> Path:
    return run_dir / CHECKPOINTS / f"round-{number}"


def _rounds_done(run_dir: Path) -> list[dict[str, Any]]:
    """The reports of the rounds that are done; what a start that was killed has left of the one after them is removed.

    Raises:
        TrainingError: the policy that the last of them ended with is not there, or damaged.
    """
    file = run_dir / ROUNDS
    reports: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    if reports:
        verify_folder(_round_folder(run_dir, len(reports)))
    for folder in (run_dir / CHECKPOINTS).glob("round-*"):
        if folder != _round_folder(run_dir, len(reports)):
            shutil.rmtree(folder)
    return reports


def _end_round(policy: VLMPolicy, run_dir: Path, reports: Sequence[dict[str, Any]]) -> None:
    """Keeps the policy that a round ends with, in place of the one before and of the checkpoints within the round.

    The report comes last: the next round must find no checkpoint of this one, and this one the policy before it.
    """
    write_folder(_round_folder(run_dir, len(reports)), policy.save)
    for old in checkpoints(run_dir):
        shutil.rmtree(old)
    write_text(run_dir / ROUNDS, json.dumps(reports))
    shutil.rmtree(_round_folder(run_dir, len(reports) - 1), ignore_errors=True)


def make_judge(command: DPOCommand, policy: VLMPolicy) -> RemoteJudge:
    """Returns the judge that the settings name; says what it may cost before it is asked."""
    dpo, spec, console = command.dpo, policy.spec, plain_console()
    chooser, _ = make_chooser(command.remote)
    judge = RemoteJudge(chooser, spec.action_names)
    most = most_cost(chooser, judge.question(np.zeros(spec.frame_shape, np.uint8), "x" * 200, (0, 1)))
    episodes = "each episode of the dataset" if dpo.dataset is not None else f"each of {dpo.episodes:,} episodes"
    console.print(f"judge        {command.remote.remote_model} at {command.remote.remote_url}")
    console.print(f"budget       {budget_in_words(chooser, most)}")
    console.print(f"estimate     two requests for each of {dpo.branch_steps} steps of {episodes}, in each round")
    return judge


def make_pairs(
    command: DPOCommand, policy: VLMPolicy, trajectories: Dataset, number: int, judge: RemoteJudge | None = None
) -> list[Pair]:
    """Returns pairs by the method that the settings name."""
    if judge is not None:
        num_actions = len(policy.spec.action_names)
        return judged_pairs(trajectories, judge, num_actions, command.dpo.branch_steps, command.run.seed + number)
    of_trajectories: dict[str, Callable[[Dataset], list[Pair]]] = {
        "expert": expert_pairs,
        "state": functools.partial(state_pairs, frames=policy.spec.frames, history=policy.spec.history),
        "return": return_pairs,
    }
    if command.dpo.pairs in of_trajectories:
        return of_trajectories[command.dpo.pairs](trajectories)

    seed, num_actions = command.run.seed, len(policy.spec.action_names)
    with contextlib.closing(make_vector_env(command.environment, num_actions, seed)) as env:
        remember_for(env, policy)

        def act(observations: Observations) -> np.ndarray:
            with policy.frozen_weights():
                inputs = policy.prepare(observations.images, observations.instructions, ask(env, policy.needs))
                return policy.act(inputs, Draws([]), greedy=True).to_env

        return branch_pairs(trajectories, env, act, command.dpo.branch_steps, seed + number)


def _train_round(
    command: DPOCommand, policy: VLMPolicy, pairs: Dataset, run_dir: Path, checkpoint: Path | None, rows_before: int
) -> list[dict[str, Any]]:
    """One round's training, perhaps from a checkpoint in it; its rows of metrics.jsonl."""
    dpo, seed = command.dpo, command.run.seed
    trainer: PolicyDPOTrainer | PolicyKTOTrainer
    if dpo.method == "dpo":
        args = make_tuning_args(DPOConfig, dpo, seed, run_dir, beta=dpo.beta, max_length=None)
        trainer = PolicyDPOTrainer(policy, args, pairs, run_dir, adapter_learning_rate=dpo.adapter_learning_rate)
    else:
        args = make_tuning_args(KTOConfig, dpo, seed, run_dir, beta=dpo.beta, max_length=None)
        trainer = PolicyKTOTrainer(
            policy, args, unpaired(pairs), run_dir, adapter_learning_rate=dpo.adapter_learning_rate
        )
    saver = StepCheckpoints(trainer, run_dir, command.run.keep_checkpoints, command.run.save_minutes)
    saver.rows_before = rows_before
    trainer.fit(saver, checkpoint)
    return trainer.rows
