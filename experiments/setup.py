"""From settings to objects: environments, policy, trainer arguments, held-out seeds. Shared by the runners."""

import json
import math
from pathlib import Path
from typing import Any

from agent.ppo_trainer import PPOConfig
from envs import HELD_OUT, TRAINING, EpisodeVectorEnv, episode_seed
from experiments.command_line import UsageError
from experiments.settings import RunConfig
from policies import PolicySource, VLMPolicy, load_policy
from policies.prompts import SYSTEM

# settings of a run that are PPOConfig's by the same name
SHARED = (
    "num_steps",
    "num_ppo_epochs",
    "minibatch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
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


def make_env(config: RunConfig, num_envs: int, held_out: bool = False) -> EpisodeVectorEnv:
    """`num_envs` environments of the run, for training or for held-out episodes."""
    names = None if config.action_names is None else [name.strip() for name in config.action_names.split(",")]
    return EpisodeVectorEnv(
        config.env,
        num_envs,
        seed=config.seed,
        stream=HELD_OUT if held_out else TRAINING,
        instruction=config.instruction,
        action_names=names,
        env_kwargs=_json_object(config.env_kwargs),
        image_source=config.image_source,  # type: ignore[arg-type]
        success_return=config.success_return,
    )


def held_out_seeds(config: RunConfig) -> list[int]:
    """The evaluation's episode seeds, none of which a training episode has."""
    return [
        episode_seed(config.seed, HELD_OUT, 0, episode)
        for episode in range(max(config.eval_episodes, config.gif_episodes))
    ]


def make_policy(config: RunConfig, env: EpisodeVectorEnv) -> VLMPolicy:
    """The policy of the run, on the GPU where there is one."""
    import torch

    source = PolicySource(
        policy=config.policy,
        vision_encoder=config.vision_encoder,
        adapter=config.adapter,
        language_model=config.language_model,
        image_size=config.image_size,
        patch_size=config.patch_size,
        trainable=config.trainable,  # type: ignore[arg-type]
        lora_rank=config.lora_rank,
        lora_alpha=config.lora_alpha,
        dtype=config.dtype,
        action_format=config.action_format,  # type: ignore[arg-type]
        system=SYSTEM if config.system is None else config.system,
        seed=config.seed,
    )
    policy = load_policy(source, env.action_names, env.frame_shape)
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


def try_out(config: RunConfig, policy: VLMPolicy) -> None:
    """Plays one step of a held-out episode: what is wrong with environment, prompt or model shows before a run begins.

    Raises:
        EnvError: the environment breaks.
        PolicyError: the policy cannot read what the environment shows.
    """
    import numpy as np

    env = make_env(config, 1, held_out=True)
    observations = env.reset()
    with policy.frozen_weights():
        policy(policy.prepare(observations.images, observations.instructions).to(policy.device))
    env.step(np.zeros(1, dtype=np.int64))
    env.close()


def make_trainer_args(config: RunConfig, output_dir: Path) -> PPOConfig:
    """Arguments of PPOTrainer; the Trainer writes its checkpoints into `output_dir`."""
    return PPOConfig(
        output_dir=str(output_dir),
        num_iterations=math.ceil(config.total_steps / (config.num_envs * config.num_steps)),
        report_to="none",
        **{name: getattr(config, name) for name in SHARED},
    )


def _json_object(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f"--env_kwargs {text!r} is no JSON ({error}): expected an object such as '{{\"size\": 4}}'."
        ) from error
    if not isinstance(value, dict):
        raise UsageError(f"--env_kwargs is {text!r}: expected a JSON object such as '{{\"size\": 4}}'.")
    return value
