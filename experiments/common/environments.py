"""From settings to environments and their held-out seeds. No torch here: rollout workers import this."""

import contextlib
from collections.abc import Sequence

import numpy as np

from manako.agent.interfaces import NOT_FIXED
from manako.envs import HELD_OUT, TRAINING, EnvError, EpisodeVectorEnv
from manako.envs.observation import is_blank
from manako.envs.settings import EnvSettings
from manako.envs.vector import OnFault
from manako.spaces import is_vector


def make_vector_env(
    settings: EnvSettings,
    num_envs: int,
    seed: int,
    held_out: bool = False,
    first_slot: int = 0,
    group_size: int = 1,
    seed_lists: Sequence[Sequence[int]] | None = None,
    on_fault: OnFault = "replay",
    step_timeout: float | None = None,
    split: int | None = None,
) -> EpisodeVectorEnv:
    """Returns `num_envs` environments of the run, for training, for held-out episodes or for those of given seeds.

    `split` is another one than these two, such as `VALIDATION`.
    """
    return EpisodeVectorEnv(
        settings.env,
        num_envs,
        seed=seed,
        split=split or (HELD_OUT if held_out else TRAINING),
        first_slot=first_slot,
        group_size=group_size,
        seed_lists=seed_lists,
        on_fault=on_fault,
        step_timeout=step_timeout,
        **settings.options(),
    )


def make_segment(
    settings: EnvSettings,
    seed: int,
    group_size: int,
    first_slot: int,
    num_slots: int,
    seed_lists: Sequence[Sequence[int]] | None = None,
    step_timeout: float | None = None,
) -> EpisodeVectorEnv:
    """Returns the training environments of a range of slots, for a rollout worker; `seed_lists` are those of all."""
    own = None if seed_lists is None else seed_lists[first_slot : first_slot + num_slots]
    return make_vector_env(
        settings,
        num_slots,
        seed,
        first_slot=first_slot,
        group_size=group_size,
        seed_lists=own,
        on_fault="give up",
        step_timeout=step_timeout,
    )


def ignored_seeds(settings: EnvSettings, seed: int, needed_for: str | None = None) -> str | None:
    """Returns a sentence where the environment's episodes are not fixed by their seeds, else None.

    Args:
        settings: the environment.
        seed: the run's.
        needed_for: what cannot be done with such an environment, and what to do instead.

    Raises:
        EnvError: they are not, and `needed_for` says what for they have to be.
    """
    with contextlib.closing(make_vector_env(settings, 1, seed, held_out=True)) as env:
        return ignored_seeds_of(env, needed_for)


def ignored_seeds_of(env: EpisodeVectorEnv, needed_for: str | None = None) -> str | None:
    """Returns and raises the same for an environment that is there; an episode of it is started."""
    if env.follows_seeds():
        return None
    sentence = f"{NOT_FIXED}: two resets of {env.env_id} to one seed begin with another frame or instruction"
    if needed_for is not None:
        raise EnvError(f"{sentence}, {needed_for}")
    return sentence


def dead_frames(environment: EnvSettings, frames: np.ndarray, instructions: Sequence[str]) -> str | None:
    """Returns a warning where frames (B, H, W, 3) of an environment are all of one colour, or all the same; else None.

    Args:
        environment: its settings; where these ask for black frames, none is dead.
        frames: what it showed, of several steps or episodes.
        instructions: B texts.
    """
    env_id = environment.env
    if environment.image_source == "blank":
        return None
    if all(map(is_blank, frames)):
        return f"{env_id} showed a single colour in all of {len(frames)} frames: look at its renderer"
    if len(frames) > 1 and len(set(instructions)) == 1 and all(np.array_equal(frame, frames[0]) for frame in frames):
        return f"{env_id} showed one frame and instruction {len(frames)} times: look at its renderer"
    return None


def warn_of(warning: str | None) -> None:
    """Prints a warning, if there is one."""
    if warning is not None:
        print(f"warning: {warning}", flush=True)


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


def random_actions(env: EpisodeVectorEnv, generator: np.random.Generator) -> np.ndarray:
    """Returns an action for each slot, of those allowed each alike."""
    if env.gives_masks or is_vector(env.action_space):
        return env.random_actions(lambda: generator.random(env.num_envs))
    return generator.integers(len(env.action_names), size=env.num_envs)


def sights(settings: EnvSettings, seed: int, count: int = 6, steps: int = 32) -> tuple[np.ndarray, list[str]]:
    """Returns what held-out episodes begin with, for a look at a policy before it is trained.

    Args:
        settings: the environment.
        seed: the run's.
        count: of episodes.
        steps: where all of them begin with the same frame, so many steps of random play are taken from instead.

    Returns:
        Frames (count, H, W, 3) uint8 and as many instructions.
    """
    with contextlib.closing(make_vector_env(settings, 1, seed, held_out=True)) as env:
        seen = [env.reset()]
        while len(seen) < count:
            seen.append(env.reset_done(np.array([True])))
        if len({episode.images.tobytes() for episode in seen}) == 1:
            generator = np.random.default_rng(seed)
            walked = {seen[0].images.tobytes(): seen[0]}
            for _ in range(steps):
                result = env.step(random_actions(env, generator))
                now = env.reset_done(result.terminated | result.truncated)
                walked.setdefault(now.images.tobytes(), now)
            seen = list(walked.values())[:count]
    return np.concatenate([now.images for now in seen]), [now.instructions[0] for now in seen]
