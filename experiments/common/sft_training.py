"""A run of run_sft.py: data, training by TRL, what was forgotten, evaluation."""

import contextlib
import functools
import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import TrainingArguments
from trl import SFTConfig

from manako.agent.data.trajectories import load_trajectories, with_the_experts_actions, without_masks
from manako.agent.report.callbacks import checkpoints, set_aside
from manako.agent.report.validation import Place
from manako.agent.tuning.forgetting import measure_retention
from manako.agent.tuning.pretraining import PretrainingTrainer
from manako.agent.tuning.saving import StepCheckpoints
from manako.agent.tuning.supervised import captions, demonstrated_actions, demonstrations, sample_frames
from manako.agent.tuning.trainers import PolicyCloningTrainer, PolicySFTTrainer, check_learns_text
from manako.experiments.common.building import check_learns_by_acting, make_tuning_args, policy_of_run
from manako.experiments.common.command_line import UsageError
from manako.experiments.common.disk_room import check_disk_room
from manako.experiments.common.ending import Ending, watched
from manako.experiments.common.environments import dead_frames, make_vector_env, random_actions, sights, warn_of
from manako.experiments.common.progress import (
    plain_console,
    print_parts,
    print_retention,
    print_sensitivity,
    print_table,
)
from manako.experiments.common.results import evaluate_run, write_evaluation, write_final
from manako.experiments.common.resuming import Start, in_words, keep_changes
from manako.experiments.common.run_folder import write_description, write_text
from manako.experiments.common.settings import DPOCommand, SFTCommand
from manako.experiments.common.validating import keep_best
from manako.experiments.common.what_learns import trainable_of
from manako.policies import VLMPolicy
from manako.policies.architectures.pretraining import Pretraining
from manako.policies.default_trainable import AUTO
from manako.policies.room import check_training_room
from manako.policies.sensitivity import sensitivity

MEASURED_FRAMES = 256  # of held-out episodes, for what an architecture learns by itself
FITTED_FRAMES = 256  # whose features an adapter with statistics is given
SIDE_BY_SIDE = 32  # environments, for captions and in the evaluation


def train(start: Start[SFTCommand], started: float) -> int:
    """Runs one stage; nothing is written before the data are known to fit.

    Args:
        start: how; a new run's folder is described here.
        started: `time.perf_counter()` at the program's start.

    Returns:
        The exit code.
    """
    kept = functools.partial(steps_kept, start.run_dir)
    rate = start.command.sft.learning_rate
    return watched(start.run_dir, start.changes is not None, rate, functools.partial(_train, start, started), kept)


def _train(start: Start[SFTCommand], started: float, ending: Ending) -> None:
    command, run_dir = start.command, start.run_dir
    environment, run = command.environment, command.run
    command, policy, pretraining = _policy_of_stage(command)
    sft = command.sft
    if pretraining is not None:
        _pretrain(replace(start, command=command), policy, pretraining, started, ending)
        return
    check_learns_by_acting(policy, command.policy.trainable)
    if sft.loss != "actions":
        check_learns_text(policy)
    policy.value_head.requires_grad_(False)  # nothing here asks for values
    check_training_room(policy, command.policy.trainable, policy.device)
    check_disk_room(policy, run_dir, run.keep_checkpoints, best=run.eval_every > 0)
    data, frames = training_data(command, policy)
    console = plain_console()
    console.print(f"data         {len(data):,} examples, {sft.stage}")
    if policy.fit_adapter(np.stack(frames[:FITTED_FRAMES])):
        console.print(f"adapter      standardises features by {min(len(frames), FITTED_FRAMES)} frames")
    print_parts(console, policy)
    if sft.stage == "instruct":
        with contextlib.closing(make_vector_env(environment, 1, run.seed, held_out=True)) as env:
            console.print(f"episodes     {env.limit_from}")
        seen = sights(environment, run.seed)
        print_sensitivity(console, sensitivity(policy, *seen))
        warn_of(dead_frames(environment, *seen))
    describe_start(replace(start, command=command))
    ending.begun = True
    before = measure_retention(policy)
    args = make_tuning_args(SFTConfig, sft, run.seed, run_dir, warmup_steps=sft.warmup_steps, max_length=None)
    kind = PolicyCloningTrainer if sft.loss == "actions" else PolicySFTTrainer
    trainer = kind(policy, args, data, run_dir, sft.adapter_learning_rate)
    saver, others = StepCheckpoints(trainer, run_dir, run.keep_checkpoints, run.save_minutes), []
    if run.eval_every:
        place = Place("step", "examples", functools.partial(examples_of, len(trainer.train_dataset), sft.batch_size))
        told = saver, place, lambda: trainer.state.max_steps, trainer.metrics.append, console, trainer.acting
        others.append(keep_best(command, policy, SIDE_BY_SIDE, run_dir, *told))
    trainer.fit(saver, start.checkpoint, *others)
    seconds = time.perf_counter() - started
    write_final(command, policy, run_dir)
    after = measure_retention(policy)
    report: dict[str, Any] = {
        "stage": sft.stage,
        "seconds": seconds,
        "trained_parameters": sum(p.numel() for p in policy.vlm.parameters() if p.requires_grad),
        "examples": len(data) * sft.epochs,
        "loss": trainer.rows[-1]["loss"] if trainer.rows else None,
        "memory": {"before": before.summary(), "after": after.summary()},
    }
    print_retention(console, before, after)
    if run.eval_episodes and sft.stage == "instruct":
        summary = evaluate_run(command, policy, run_dir, SIDE_BY_SIDE)
        write_evaluation(command, policy, run_dir, summary)
        print_table(console, summary, f"{environment.env}, held-out seeds")
    write_text(run_dir / "report.json", json.dumps(report, indent=2))  # which ends the run
    console.print(f"{seconds:.0f} s of training, {time.perf_counter() - started:.0f} s in all; written to {run_dir}")


def examples_of(count: int, batch_size: int, step: int) -> int:
    """Returns how many examples the first `step` steps have seen, of `count` in a pass, whose last batch is smaller."""
    passes, rest = divmod(step, math.ceil(count / batch_size))
    return passes * count + min(count, rest * batch_size)


def describe_start(start: Start[SFTCommand] | Start[DPOCommand]) -> None:
    """Makes and describes a new run's folder; of one that goes on it writes down what is new."""
    if start.changes is None:
        start.run_dir.mkdir(parents=True, exist_ok=True)
        write_description(start.run_dir, start.command)
        return
    set_aside(start.run_dir, start.done)
    keep_changes(start.command, start.run_dir, start.changes, start.done)
    if start.changes:
        print(f"changed      {in_words(start.changes, start.done, 'step')}", flush=True)


def steps_kept(run_dir: Path) -> str:
    """Returns what there is to go on with, in words."""
    if (run_dir / "final").exists():
        return f"The training is done, with {run_dir / 'final'}; what is left is to be measured."
    kept = checkpoints(run_dir)
    if not kept:
        return "Stopped before the first checkpoint: nothing was kept yet, and what goes on begins again."
    return f"Stopped, with a checkpoint of step {kept[-1].name.split('-')[1]}."


def _policy_of_stage(command: SFTCommand) -> tuple[SFTCommand, VLMPolicy, Pretraining | None]:
    """Returns the settings with what learns, the policy, and what its architecture learns at this stage, if anything.

    Raises:
        UsageError: a stage that this architecture does not have.
    """
    environment, run, source = command.environment, command.run, command.policy
    if command.sft.learning_rate is None:
        fast = command.sft.stage == "instruct" and trainable_of(source)[0] == "full"
        command = replace(command, sft=replace(command.sft, learning_rate=1e-3 if fast else 2e-4))
    asked = source.trainable == AUTO
    if asked:  # a pretrained language model stays as it is until it is to act
        source = replace(source, trainable="full" if trainable_of(source)[0] == "full" else "adapter")
    policy, _ = policy_of_run(environment, source, run.seed, run.torch_threads)
    pretraining = policy.pretraining(command.sft.stage)
    if pretraining is None and command.sft.stage == "represent":
        raise UsageError(
            f"--stage represent came, but {type(policy.base_vlm).__name__} of --policy {source.policy} learns nothing "
            "by itself before a language model reads it: expected --stage align, or an architecture with such a stage."
        )
    if pretraining is not None and asked and pretraining.learns != source.trainable:
        source = replace(source, trainable=pretraining.learns)
        policy, _ = policy_of_run(environment, source, run.seed, run.torch_threads)
        pretraining = policy.pretraining(command.sft.stage)
    return replace(command, policy=source), policy, pretraining


def _pretrain(
    start: Start[SFTCommand], policy: VLMPolicy, pretraining: Pretraining, started: float, ending: Ending
) -> None:
    """Runs a stage by the architecture's own losses, measured before and after on frames of held-out episodes."""
    command, run_dir = start.command, start.run_dir
    sft, run = command.sft, command.run
    policy.value_head.requires_grad_(False)
    check_training_room(policy, command.policy.trainable, policy.device)
    check_disk_room(policy, run_dir, run.keep_checkpoints)
    captioned = pretraining.needs_captions
    frames, texts = frames_and_captions(command, sft.captions, captioned=captioned)
    held_out = frames_and_captions(command, MEASURED_FRAMES, held_out=True, captioned=captioned)
    unseen = np.stack(held_out[0]), held_out[1]
    console = plain_console()
    console.print(f"data         {len(frames):,} frames and captions, {sft.stage}")
    print_parts(console, policy)
    before = pretraining.measure(*unseen)
    describe_start(start)
    ending.begun = True
    args = make_tuning_args(TrainingArguments, sft, run.seed, run_dir, warmup_steps=sft.warmup_steps)
    trainer = PretrainingTrainer(policy, pretraining, args, frames, texts, run_dir, sft.adapter_learning_rate)
    trainer.fit(StepCheckpoints(trainer, run_dir, run.keep_checkpoints, run.save_minutes), start.checkpoint)
    seconds = time.perf_counter() - started
    write_final(command, policy, run_dir)
    after = pretraining.measure(*unseen)
    report = {
        "stage": sft.stage,
        "seconds": seconds,
        "trained_parameters": sum(p.numel() for p in policy.vlm.parameters() if p.requires_grad),
        "examples": len(frames) * sft.epochs,
        "loss": trainer.rows[-1]["loss"] if trainer.rows else None,
        "held_out": {"frames": MEASURED_FRAMES, "before": before, "after": after},
    }
    write_text(run_dir / "report.json", json.dumps(report, indent=2))
    console.print(f"{MEASURED_FRAMES} frames of held-out episodes, before -> after:")
    for name, value in after.items():
        console.print(f"  {name:26} {before[name]:.3f} -> {value:.3f}")
    console.print(f"{seconds:.0f} s of training, {time.perf_counter() - started:.0f} s in all; written to {run_dir}")


def training_data(command: SFTCommand, policy: VLMPolicy) -> tuple[Dataset, list[np.ndarray]]:
    """Returns the examples, and frames (H, W, 3) of the environment for an adapter with statistics."""
    sft = command.sft
    if sft.stage == "align":
        frames, texts = frames_and_captions(command, sft.captions)
        return captions(frames, texts, policy.spec.frames), frames
    spec = policy.spec
    trajectories, _ = load_trajectories(
        str(sft.dataset), command.environment.env, spec.action_names, spec.frame_shape, spec.action_space
    )
    if not command.environment.action_masks:
        trajectories = without_masks(trajectories)
    if sft.target == "expert" and policy.next_frame_coef:
        raise UsageError("--target expert leaves out what was done, of which the next frame is: give --target taken.")
    if sft.target == "expert":
        trajectories = with_the_experts_actions(trajectories)
    frames = sample_frames(trajectories, FITTED_FRAMES)
    if sft.loss == "actions":
        predicts = policy.next_frame_coef > 0
        writes = spec.text is not None
        data = demonstrated_actions(trajectories, sft.only_success, predicts, spec.frames, spec.history, writes)
        return data, frames
    return demonstrations(trajectories, policy, sft.only_success), frames


def frames_and_captions(
    command: SFTCommand, count: int, held_out: bool = False, captioned: bool = True
) -> tuple[list[np.ndarray], list[str]]:
    """Returns frames of random play, on training or held-out seeds, and what is on them in words, if asked."""
    seed = command.run.seed
    frames: list[np.ndarray] = []
    texts: list[str] = []
    generator = np.random.default_rng(seed)
    with contextlib.closing(make_vector_env(command.environment, min(SIDE_BY_SIDE, count), seed, held_out)) as env:
        seen = env.reset()
        while len(frames) < count:
            frames += list(seen.images)
            texts += list(env.captions()) if captioned else [""] * env.num_envs
            result = env.step(random_actions(env, generator))
            seen = env.reset_done(result.terminated | result.truncated)
    return frames[:count], texts[:count]
