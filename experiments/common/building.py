"""From settings to objects: policy, rollouts, trainer arguments. Shared by the runners; imports torch."""

import dataclasses
import functools
import math
import os
import platform
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import datasets
import gymnasium as gym
import torch
import transformers

from manako.agent.backends import RolloutPlan
from manako.agent.interfaces import ask, remember_for
from manako.agent.ppo_config import PPOConfig
from manako.agent.workers.cluster import cluster
from manako.agent.workers.options import WorkerOptions
from manako.agent.workers.settings import WorkerSettings
from manako.envs import EpisodeVectorEnv
from manako.envs.settings import EnvSettings
from manako.experiments.common.command_line import UsageError
from manako.experiments.common.environments import make_segment, make_vector_env
from manako.experiments.common.run_folder import policy_folder
from manako.experiments.common.settings import PPOCommand, TuningSettings
from manako.policies import PolicySource, VLMPolicy, load_policy
from manako.policies.interface import Draws, Policy
from manako.policies.room import check_place, check_rollout_room

ROOT = Path(__file__).resolve().parents[2]
SMALL_MODEL = 10_000_000  # parameters
Arguments = TypeVar("Arguments")


def quiet_libraries() -> None:
    """Silences libraries' progress bars and warnings between our lines."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")


def make_policy(
    source: PolicySource,
    action_names: tuple[str, ...],
    frame_shape: tuple[int, int, int],
    torch_threads: int | None = None,
    action_space: gym.Space | None = None,
) -> VLMPolicy:
    """Returns the policy of the run, on the GPU where there is one."""
    source = dataclasses.replace(source, policy=policy_folder(source.policy))
    policy = load_policy(source, action_names, frame_shape, action_space)
    return place(policy, source.policy, torch_threads)


def place(policy: VLMPolicy, name: str, torch_threads: int | None = None) -> VLMPolicy:
    """Returns a policy where it runs, on the GPU where there is one; sets torch's threads.

    Raises:
        PolicyError: it does not fit there.
    """
    # The small matrices of a small model lose more to handing work to threads than they gain.
    small = sum(parameter.numel() for parameter in policy.parameters()) < SMALL_MODEL
    torch.set_num_threads(torch_threads or (1 if small else torch.get_num_threads()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_place(policy, name, device)
    return policy.to(device)


def policy_of_run(
    environment: EnvSettings,
    source: PolicySource,
    seed: int,
    torch_threads: int | None,
    trial: bool = False,
    num_steps: int = 1,
) -> tuple[VLMPolicy, EpisodeVectorEnv]:
    """Seeds torch and makes the run's policy for what its environment shows.

    Args:
        environment: what is played.
        source: who plays.
        seed: the run's one seed, of the policy's random weights too.
        torch_threads: CPU threads of torch; None chooses.
        trial: play one step of a held-out episode, so that what is wrong with environment, prompt or model shows before
            a run begins.
        num_steps: of a rollout, whose room is asked with the trial.

    Returns:
        The policy, and one closed environment, which still knows its names and shapes.

    Raises:
        EnvError: the environment breaks.
        PolicyError: the policy cannot read what the environment shows.
    """
    quiet_libraries()
    torch.manual_seed(seed)
    env = make_vector_env(environment, 1, seed, held_out=True)
    try:
        source = dataclasses.replace(source, seed=seed)
        policy = make_policy(source, env.action_names, env.frame_shape, torch_threads, env.action_space)
        check_instruction(environment.instruction, policy)
        if trial:
            remember_for(env, policy)
            observations = env.reset()
            with policy.frozen_weights():
                told = ask(env, policy.needs)
                inputs = policy.prepare(observations.images, observations.instructions, told)
                check_rollout_room(inputs, environment.num_envs, num_steps, policy.device)
                acted = policy.act(inputs, Draws([]), greedy=True)
            env.step(acted.to_env)
    finally:
        env.close()
    return policy, env


def check_instruction(instruction: str | None, policy: VLMPolicy) -> None:
    """Raises where a replaced instruction would not reach the policy as it was given.

    Raises:
        UsageError: it holds what is taken out of every text that an environment gives.
    """
    if instruction is not None and policy.prompts.clean(instruction) != instruction:
        raise UsageError(
            f"--instruction {instruction!r} holds special tokens or control characters, so it would be read as "
            f"{policy.prompts.clean(instruction)!r}: expected plain text."
        )


def check_bf16(bf16: bool) -> None:
    """Says where bfloat16 is asked of a CPU that has to compute it in software, several times slower than float32."""
    native = (torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported)
    on_cpu = not torch.cuda.is_available() and platform.machine() in ("x86_64", "AMD64")
    if bf16 and on_cpu and not any(supported() for supported in native):
        print("note: this CPU has no bfloat16 instructions (AVX512-BF16, AMX): --bf16 false is faster here", flush=True)


def make_trainer_args(command: PPOCommand, output_dir: Path) -> PPOConfig:
    """Returns the arguments of PPOTrainer; the Trainer writes its checkpoints into `output_dir`."""
    check_bf16(command.ppo.bf16)
    samples = command.environment.num_envs * command.ppo.num_steps
    return PPOConfig(
        output_dir=str(output_dir),
        num_iterations=math.ceil(command.run.total_steps / samples),
        seed=command.run.seed,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),  # else bf16 is refused on a CPU
        **dataclasses.asdict(command.ppo),
    )


def make_tuning_args(
    kind: Callable[..., Arguments], settings: TuningSettings, seed: int, run_dir: Path, **own: Any
) -> Arguments:
    """Returns the arguments of a trainer: those that pretraining, SFT, DPO and KTO share, and the method's own.

    Args:
        kind: transformers' TrainingArguments, trl.SFTConfig, DPOConfig or KTOConfig.
        settings: of the training.
        seed: the run's.
        run_dir: the run folder.
        own: further arguments.
    """
    check_bf16(settings.bf16)
    assert settings.learning_rate is not None, "the runner has chosen one"
    schedule: str = settings.lr_scheduler_type
    if schedule == "constant" and own.get("warmup_steps"):
        schedule = "constant_with_warmup"  # by `constant` the library leaves the rise out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of TRL's own defaults
        return kind(
            output_dir=str(run_dir / ".staging"),
            per_device_train_batch_size=settings.batch_size,
            num_train_epochs=settings.epochs,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=schedule,
            max_grad_norm=settings.max_grad_norm,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
            bf16=settings.bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
            **own,
        )


def check_learns_by_acting(policy: VLMPolicy, trainable: str) -> None:
    """Checks that what learns has a gradient of what the policy says.

    Raises:
        UsageError: it is an encoder that learns in its own stage alone.
    """
    if policy.parts.encoder_learns_alone and trainable == "encoder":
        raise UsageError(
            f"--trainable encoder came, but nothing that {type(policy.base_vlm).__name__} says teaches its encoder, "
            "whose codes are whole numbers: expected run_sft.py --stage represent, or --trainable full, or lora."
        )


def make_plan(
    environment: EnvSettings,
    workers: WorkerSettings,
    policy: Policy,
    make_copy: Callable[[], Policy],
    *,
    num_steps: int,
    num_iterations: int,
    seed: int,
    group_size: int | None = None,
    **others: bool,
) -> RolloutPlan:
    """Returns what the run's backend is given.

    Args:
        environment: what is played, and in how many slots.
        workers: who plays.
        policy: who acts.
        make_copy: makes it again in a worker.
        num_steps: env steps of each slot in a rollout.
        num_iterations: how many rollouts there will be.
        seed: the run's.
        group_size: every rollout starts new episodes, so many slots each the same; None plays on.
        others: `reference`, `bf16`, `record` and `ask_expert` of `RolloutPlan`.
    """
    return RolloutPlan(
        make_segment=functools.partial(
            make_segment, environment, seed, group_size or 1, step_timeout=workers.step_timeout
        ),
        policy=policy,
        make_policy=make_copy,
        num_envs=environment.num_envs,
        num_steps=num_steps,
        num_iterations=num_iterations,
        seed=seed,
        options=worker_options(workers),
        batch_size=workers.rollout_batch_size,
        rounds=group_size is not None,
        asynchronous=workers.async_rollouts,
        **others,
    )


def copy_maker(source: PolicySource, policy: Policy, seed: int, torch_threads: int | None) -> Callable[[], VLMPolicy]:
    """Returns what makes the policy again as it was made here, in a worker."""
    spec, source = policy.spec, dataclasses.replace(source, seed=seed)
    return functools.partial(make_policy, source, spec.action_names, spec.frame_shape, torch_threads, spec.action_space)


def connected(workers: WorkerSettings) -> AbstractContextManager[None]:
    """Connects to Ray for a block, where workers play; they import the user's modules, then these."""
    if workers.rollout_backend == "local":
        return nullcontext()
    return cluster(workers.ray_address, paths=[os.getcwd(), str(ROOT)])


def worker_options(settings: WorkerSettings) -> WorkerOptions:
    """Returns what the settings give to rollout workers."""
    return WorkerOptions(
        num_workers=settings.workers,
        cpus=settings.worker_cpus,
        gpus=settings.worker_gpus,
        timeout=settings.worker_timeout,
        placement_timeout=settings.placement_timeout,
    )
