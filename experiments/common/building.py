"""From settings to objects: policy, rollouts, trainer arguments. Shared by the runners."""

import functools
import math
import platform
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from manako.agent.ppo_config import PPOConfig
from manako.agent.rollout import Rollout, RolloutCollector, Rollouts
from manako.envs import EpisodeVectorEnv
from manako.experiments.common.command_line import UsageError
from manako.experiments.common.environments import make_segment
from manako.experiments.common.run_folder import policy_folder
from manako.experiments.common.settings import PlayConfig, RolloutConfig, RunConfig
from manako.policies import PolicySource, VLMPolicy, load_policy
from manako.policies.source import SYSTEM

if TYPE_CHECKING:
    from manako.agent.workers.options import WorkerOptions

PATIENCE = 100_000  # steps to wait for the first episode's end
# settings of a run that are PPOConfig's by the same name
SHARED = (
    "num_steps",
    "num_ppo_epochs",
    "minibatch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "adapter_learning_rate",
    "lr_scheduler_type",
    "advantage",
    "group_size",
    "step_weight",
    "gamma",
    "gae_lambda",
    "clip_range",
    "clip_range_vf",
    "vf_coef",
    "ent_coef",
    "kl_coef",
    "target_kl",
    "max_grad_norm",
    "bf16",
    "seed",
)


SMALL_MODEL = 10_000_000  # parameters


def quiet_libraries() -> None:
    """No progress bars and warnings of libraries between our lines."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl")


def make_policy(config: PlayConfig, action_names: tuple[str, ...], frame_shape: tuple[int, int, int]) -> VLMPolicy:
    """The policy of the run, on the GPU where there is one."""
    import torch

    source = PolicySource(
        policy=policy_folder(config.policy),
        vision_encoder=config.vision_encoder,
        adapter=config.adapter,
        language_model=config.language_model,
        image_size=config.image_size,
        patch_size=config.patch_size,
        trainable=config.trainable,
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        dtype=config.dtype,
        action_format=config.action_format,  # type: ignore[arg-type]
        system=SYSTEM if config.system is None else config.system,
        seed=config.seed,
    )
    policy = load_policy(source, action_names, frame_shape)
    if config.instruction is not None and policy.prompts.clean(config.instruction) != " ".join(
        config.instruction.split()
    ):
        raise UsageError(
            f"--instruction {config.instruction!r} holds special tokens or control characters, or is too long: "
            f"expected plain text such as {policy.prompts.clean(config.instruction)!r}."
        )
    # The small matrices of a small model lose more to handing work to threads than they gain.
    small = sum(parameter.numel() for parameter in policy.parameters()) < SMALL_MODEL
    torch.set_num_threads(config.torch_threads or (1 if small else torch.get_num_threads()))
    return policy.to("cuda" if torch.cuda.is_available() else "cpu")


def try_out(env: EpisodeVectorEnv, policy: VLMPolicy) -> None:
    """Plays one step of a held-out episode: what is wrong with environment, prompt or model shows before a run begins.

    Raises:
        EnvError: the environment breaks.
        PolicyError: the policy cannot read what the environment shows.
    """
    observations = env.reset()
    with policy.frozen_weights():
        policy(policy.prepare(observations.images, observations.instructions).to(policy.device))
    env.step(np.zeros(env.num_envs, dtype=np.int64))


def check_bf16(config: PlayConfig) -> None:
    """Says where bfloat16 is asked of a CPU that has to compute it in software, several times slower than float32."""
    import torch

    native = (torch.cpu._is_avx512_bf16_supported, torch.cpu._is_amx_tile_supported)
    on_cpu = not torch.cuda.is_available() and platform.machine() in ("x86_64", "AMD64")
    if config.bf16 and on_cpu and not any(supported() for supported in native):
        print("note: this CPU has no bfloat16 instructions (AVX512-BF16, AMX): --bf16 false is faster here", flush=True)


def make_trainer_args(config: RunConfig, output_dir: Path) -> PPOConfig:
    """Arguments of PPOTrainer; the Trainer writes its checkpoints into `output_dir`."""
    import torch

    check_bf16(config)
    return PPOConfig(
        output_dir=str(output_dir),
        num_iterations=math.ceil(config.total_steps / (config.num_envs * config.num_steps)),
        report_to="none",
        use_cpu=not torch.cuda.is_available(),  # else bf16 is refused on a CPU
        **{name: getattr(config, name) for name in SHARED},
    )


def make_tuning_args(kind: Any, config: Any, run_dir: Path, **own: Any) -> Any:
    """Arguments of one of TRL's trainers: those that SFT, DPO and KTO share, and the method's own.

    Args:
        kind: trl.SFTConfig, DPOConfig or KTOConfig.
        config: settings of run_sft.py or run_dpo.py.
        run_dir: the run folder.
        own: further arguments.
    """
    import torch

    check_bf16(config)
    schedule = config.lr_scheduler_type
    if schedule == "constant" and own.get("warmup_steps"):
        schedule = "constant_with_warmup"  # by `constant` the library leaves the rise out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of TRL's own defaults
        return kind(
            output_dir=str(run_dir / ".staging"),
            per_device_train_batch_size=config.batch_size,
            num_train_epochs=config.epochs,
            learning_rate=config.learning_rate,
            lr_scheduler_type=schedule,
            max_grad_norm=config.max_grad_norm,
            max_length=None,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
            bf16=config.bf16,
            use_cpu=not torch.cuda.is_available(),
            seed=config.seed,
            **own,
        )


def make_rollouts(
    config: RolloutConfig,
    policy: VLMPolicy,
    num_iterations: int,
    rounds: bool = False,
    reference: bool = False,
    asynchronous: bool = False,
    recorded: dict[str, Any] | None = None,
) -> Rollouts:
    """The rollouts of the run, by the backend that the settings name; Ray must be connected for the others than local.

    Args:
        config: the settings.
        policy: the policy.
        num_iterations: how many rollouts there will be.
        rounds: every rollout starts new episodes, `config.group_size` slots each the same.
        reference: keep the log-probabilities of the policy with its LoRA off.
        asynchronous: see `ReplicaRollouts`.
        recorded: `demonstrator`, `record` and `ask_expert` of `RolloutCollector`, to record trajectories.

    Raises:
        WorkersError: workers find no place, or cannot make environments or policy.
    """
    group_size = config.group_size if rounds else 1
    segment = functools.partial(make_segment, config, group_size)
    if config.rollout_backend == "ray-replica":
        from manako.agent.workers.ray_replica import ReplicaRollouts
        from manako.agent.workers.replica_worker import ReplicaSettings

        spec, options = policy.spec, worker_options(config)
        settings = ReplicaSettings(
            make_env=segment,
            make_policy=functools.partial(make_policy, config, spec.action_names, spec.frame_shape),
            num_steps=config.num_steps,
            seed=config.seed,
            reference=reference,
            batch_size=config.rollout_batch_size,
            bf16=config.bf16,
            rounds=rounds,
            recorded=recorded or {},
            threads=options.threads,
        )
        return ReplicaRollouts(settings, policy, config.num_envs, num_iterations, options, asynchronous)
    arguments = {
        "reference": policy if reference else None,
        "batch_size": config.rollout_batch_size,
        "rounds": rounds,
        **(recorded or {}),
    }
    if config.rollout_backend == "ray-env":
        from manako.agent.workers.ray_env import CentralRollouts, RayVectorEnv

        central = RayVectorEnv(segment, config.num_envs, policy.spec.action_names, worker_options(config))
        return CentralRollouts(central, policy, config.num_steps, config.seed, **arguments)
    return RolloutCollector(segment(0, config.num_envs), policy, config.num_steps, config.seed, **arguments)


def play(source: Rollouts, episodes: int, env: str, first: int = 0) -> list[Rollout]:
    """Rollouts from number `first` on, until as many episodes have ended.

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


def worker_options(config: RolloutConfig) -> "WorkerOptions":
    """What the settings give to rollout workers."""
    from manako.agent.workers.options import WorkerOptions

    return WorkerOptions(
        num_workers=config.num_workers or 1,
        cpus=config.worker_cpus,
        gpus=config.worker_gpus,
        timeout=config.worker_timeout,
        placement_timeout=config.placement_timeout,
    )
