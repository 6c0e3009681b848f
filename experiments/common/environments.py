"""From settings to environments and their held-out seeds. No torch here: rollout workers import this."""

from collections.abc import Sequence

from manako.envs import HELD_OUT, TRAINING, EnvError, EpisodeVectorEnv
from manako.envs.settings import EnvSettings


def make_vector_env(
    settings: EnvSettings,
    num_envs: int,
    seed: int,
    held_out: bool = False,
    first_slot: int = 0,
    group_size: int = 1,
    seed_lists: Sequence[Sequence[int]] | None = None,
) -> EpisodeVectorEnv:
    """Returns `num_envs` environments of the run, for training, for held-out episodes or for those of given seeds."""
    return EpisodeVectorEnv(
        settings.env,
        num_envs,
        seed=seed,
        split=HELD_OUT if held_out else TRAINING,
        first_slot=first_slot,
        group_size=group_size,
        seed_lists=seed_lists,
        **settings.options(),
    )


def make_segment(
    settings: EnvSettings, seed: int, group_size: int, first_slot: int, num_slots: int
) -> EpisodeVectorEnv:
    """Returns the training environments of a range of slots, for a rollout worker."""
    return make_vector_env(settings, num_slots, seed, first_slot=first_slot, group_size=group_size)


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
