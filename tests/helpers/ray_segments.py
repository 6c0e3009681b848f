"""What the tests of the Ray backends run in workers: environments that break in chosen ways, and their makers.

Workers import this module, so it stands alone; `FAULT` names a folder in which a file `<kind>` says what shall break.
"""

import functools
import os
import time
from pathlib import Path
from typing import Any

import gymnasium as gym

from manako.agent.workers.env_worker import EnvWorker
from manako.agent.workers.replica_worker import ReplicaSettings, ReplicaWorker
from manako.agent.workers.segments import History, Segment

NUM_STEPS = 5
SETTINGS = {"length": 7, "limit": 3}


class Faulty(gym.Wrapper):
    """Breaks once for each file that it finds, or as long as the file says `always`.

    Args:
        env: the environment.
        folder: where the files lie: `raise`, `hang`, `exit` at a step; `make` in the constructor.
    """

    def __init__(self, env: gym.Env, folder: str) -> None:
        super().__init__(env)
        self.folder = Path(folder)
        if self._wanted("make"):
            raise RuntimeError("the simulator did not start")

    def step(self, action: Any) -> Any:
        if self._wanted("hang"):
            time.sleep(3600)
        if self._wanted("exit"):
            os._exit(1)
        if self._wanted("raise"):
            raise RuntimeError("the simulator broke")
        return self.env.step(action)

    def _wanted(self, kind: str) -> bool:
        file = self.folder / kind
        try:
            lasting = file.read_text() == "always"
            if not lasting:
                file.unlink()
        except FileNotFoundError:  # none, or another worker was faster
            return False
        return True


def register() -> None:
    """The environments of this module, and small_envs' Corridor."""
    from tests.helpers import small_envs  # registers tests/Corridor-v0

    def faulty(folder: str, render_mode: str | None = None, **settings: Any) -> gym.Env:
        env = Faulty(small_envs.Corridor(**settings, render_mode=render_mode), folder)
        env.action_names, env.instruction = small_envs.NAMES, "walk right"  # type: ignore[attr-defined]
        return env

    if "tests/Faulty-v0" not in gym.registry:
        gym.register("tests/Faulty-v0", entry_point=faulty)


def make_env(env_id: str, kwargs: dict, seed: int, first_slot: int, num_slots: int) -> Any:
    """A segment's environments."""
    from manako.envs import EpisodeVectorEnv

    register()
    return EpisodeVectorEnv(env_id, num_slots, seed=seed, first_slot=first_slot, env_kwargs=kwargs)


def env_maker(env_id: str = "tests/Corridor-v0", seed: int = 3, **kwargs: Any) -> Any:
    """For workers: (first slot, number of slots) -> environments."""
    return functools.partial(make_env, env_id, {**SETTINGS, **kwargs}, seed)


def make_policy(trainable: str = "full", dtype: str = "float32", **source: Any) -> Any:
    """The tiny policy for Corridor, with a value head that is not zero."""
    import torch

    from tests.helpers.small_envs import tiny_policy

    torch.set_num_threads(1)
    register()
    return tiny_policy(make_env("tests/Corridor-v0", SETTINGS, 3, 0, 1), trainable=trainable, dtype=dtype, **source)


def gates_maker() -> Any:
    """For workers: (first slot, number of slots) -> environments that give action masks."""
    return functools.partial(make_env, "tests/Gates-v0", {"limit": 6}, 3)


def vectors_maker() -> Any:
    """For workers: (first slot, number of slots) -> environments whose actions are vectors of floats."""
    return functools.partial(make_env, "manako/Pendulum-v0", {"max_episode_steps": 6}, 3)


def texts_maker() -> Any:
    """For workers: (first slot, number of slots) -> environments whose actions are texts."""
    return functools.partial(make_env, "manako/Spell-v0", {}, 3)


def make_policy_for(maker: Any) -> Any:
    """The tiny policy for what such a maker makes."""
    import torch

    from tests.helpers.small_envs import tiny_policy

    torch.set_num_threads(1)
    return tiny_policy(maker(0, 1))


def local(num_envs: int, policy: Any, batch_size: int | None = None, maker: Any = None) -> Any:
    """The local backend that the others are held against."""
    from manako.agent.collector import RolloutCollector

    return RolloutCollector(
        (maker or env_maker())(0, num_envs), policy, NUM_STEPS, seed=3, batch_size=batch_size, record=True
    )


def replica_settings(maker: Any = None, batch_size: int | None = None, **policy: Any) -> ReplicaSettings:
    """What workers with a copy of the tiny policy are made from."""
    return ReplicaSettings(
        make_segment=maker or env_maker(),
        make_policy=functools.partial(make_policy, **policy),
        num_steps=NUM_STEPS,
        seed=3,
        batch_size=batch_size,
        record=True,
    )


def random_player() -> Any:
    """Chance in Drift."""
    from manako.agent.data.demonstrators import RandomPlayer
    from manako.policies.interface import PolicySpec

    return RandomPlayer(PolicySpec(("left", "right"), (8, 64, 3)))


class Curious(EnvWorker):
    """An EnvWorker that says what it has imported."""

    def imported(self, name: str) -> bool:
        import sys

        self.observe(Segment(0, 1), History(None, ()))
        return name in sys.modules


class Outdated(ReplicaWorker):
    """A worker that answers with the rollout of other weights."""

    def collect(self, segment: Any, iteration: int, version: int, weights: Any, state: Any) -> Any:
        packed, *others = super().collect(segment, iteration, version, weights, state)
        return packed._replace(version=version - 1), *others


class Unready:
    """A worker whose constructor fails."""

    def __init__(self, *_: Any) -> None:
        raise RuntimeError("no such device")

    def ready(self) -> dict[str, Any]:
        return {}


def make_folder_policy(folder: str, shape: tuple[int, int, int], names: tuple[str, ...]) -> Any:
    """The policy of a model's folder, whose adapter learns with LoRA."""
    import torch

    from manako.policies import PolicySource, load_policy

    torch.set_num_threads(1)
    return load_policy(PolicySource(policy=folder, trainable="lora", lora_rank=2), names, shape)


class Host:
    """A process that is a worker of one policy after the other: what is imported once need not be imported again."""

    def play(self, settings: ReplicaSettings, segment: Segment, weights: Any) -> Any:
        """Returns what a new worker makes of the weights."""
        return ReplicaWorker(settings).collect(segment, 0, 1, weights, None)[0]


def soak_maker(folder: str, step_timeout: float | None = None, **kwargs: Any) -> Any:
    """Makes segments of environments that break by chance, and give episodes up."""
    import functools

    from manako.envs.settings import EnvSettings
    from manako.experiments.benchmarks.soak_env import ENV_ID
    from manako.experiments.common.environments import make_segment

    module = "manako.experiments.benchmarks.soak_env"
    settings = EnvSettings(env=f"{module}:{ENV_ID}", env_kwargs={"log": folder, **kwargs})
    return functools.partial(make_segment, settings, 3, 1, step_timeout=step_timeout)


def soak_player() -> Any:
    """Chance in Soak."""
    from types import SimpleNamespace
    from typing import cast

    import gymnasium as gym

    from manako.agent.data.demonstrators import RandomPlayer

    shape, space = (16, 48, 3), gym.spaces.Discrete(2)
    names = {"action_names": ("left", "right"), "frame_shape": shape, "action_space": space}
    return RandomPlayer(cast("Any", SimpleNamespace(**names, history=0, frames=1)))
