"""From settings to environments and their held-out seeds. No torch here: rollout workers import this."""

import json
from collections.abc import Sequence
from typing import Any

from manako.envs import HELD_OUT, TRAINING, EnvError, EpisodeVectorEnv, episode_seed
from manako.experiments.common.command_line import UsageError
from manako.experiments.common.settings import EnvConfig, RolloutConfig


def make_env(
    config: EnvConfig,
    num_envs: int,
    held_out: bool = False,
    first_slot: int = 0,
    group_size: int = 1,
    seed_lists: Sequence[Sequence[int]] | None = None,
) -> EpisodeVectorEnv:
    """`num_envs` environments of the run, for training, for held-out episodes or for those of given seeds."""
    names = None if config.action_names is None else [name.strip() for name in config.action_names.split(",")]
    return EpisodeVectorEnv(
        config.env,
        num_envs,
        seed=config.seed,
        stream=HELD_OUT if held_out else TRAINING,
        first_slot=first_slot,
        group_size=group_size,
        seed_lists=seed_lists,
        instruction=config.instruction,
        action_names=names,
        env_kwargs=json_object(config.env_kwargs),
        image_source=config.image_source,  # type: ignore[arg-type]
        success_return=config.success_return,
    )


def knows_expert(env: EpisodeVectorEnv, needed: bool = False) -> bool:
    """Starts the environments, and says whether they have a scripted expert.

    Raises:
        EnvError: they have none, and one is needed.
    """
    env.reset()
    try:
        env.expert_actions()
    except EnvError:
        if needed:
            raise
        return False
    return True


def held_out_seeds(seed: int, count: int) -> list[int]:
    """The evaluation's episode seeds, none of which a training episode has."""
    return [episode_seed(seed, HELD_OUT, 0, episode) for episode in range(count)]


def make_segment(config: RolloutConfig, group_size: int, first_slot: int, num_slots: int) -> EpisodeVectorEnv:
    """The training environments of a range of slots, for a rollout worker."""
    return make_env(config, num_slots, first_slot=first_slot, group_size=group_size)


def json_object(text: str | None) -> dict[str, Any] | None:
    """The object of --env_kwargs.

    Raises:
        UsageError: it is no JSON, or no object.
    """
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
