"""Two short environments for what the project's own do not do, and the tiny policy; light, for rollout workers.

`Corridor` truncates quickly and changes its instruction (and with it the prompt's length) at every step, `Poison` pays
NaN.
"""

from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

if TYPE_CHECKING:
    from manako.envs import EpisodeVectorEnv
    from manako.policies import VLMPolicy

NAMES = ("left", "right")


class Corridor(gym.Env):
    """A bright column that moves; the instruction counts the steps left, in words of different lengths.

    An episode terminates at either end, with success at the right one, and is truncated after `limit` steps; with
    `both` it does both at once where they meet.
    """

    metadata = {"render_modes": ["rgb_array"]}
    action_space = gym.spaces.Discrete(2)
    action_names = NAMES

    def __init__(self, length: int = 7, limit: int = 3, both: bool = False, render_mode: str | None = None) -> None:
        self.length, self.limit, self.both, self.render_mode = length, limit, both, render_mode
        self.observation_space = gym.spaces.Discrete(length)
        self.place = self.steps = 0

    @property
    def instruction(self) -> str:
        return "walk right " + "and on " * (self.limit - self.steps)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[int, dict]:
        super().reset(seed=seed)
        self.steps, self.place = 0, int(self.np_random.integers(1, self.length - 1))
        self.shade = int(self.np_random.integers(100, 256))
        return self.place, {}

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        self.steps += 1
        self.place += 1 if action else -1
        terminated = self.place in (0, self.length - 1)
        truncated = self.steps >= self.limit and (self.both or not terminated)
        success = self.place == self.length - 1
        return self.place, float(success) - 0.1 * self.steps, terminated, truncated, {"success": success}

    def render(self) -> np.ndarray:
        frame = np.zeros((16, 4 * self.length, 3), np.uint8)
        frame[:, 4 * self.place : 4 * self.place + 4] = (self.shade, 80, self.steps)
        return frame


class Poison(Corridor):
    """Pays NaN at step `at` of an episode."""

    def __init__(self, at: int = 2, render_mode: str | None = None) -> None:
        super().__init__(length=9, limit=4, render_mode=render_mode)
        self.at = at

    def step(self, action: int) -> tuple[int, float, bool, bool, dict]:
        place, reward, terminated, truncated, info = super().step(action)
        return place, float("nan") if self.steps == self.at else reward, terminated, truncated, info


for _id, _kind in (("tests/Corridor-v0", Corridor), ("tests/Poison-v0", Poison)):
    if _id not in gym.registry:  # this file is imported under two names
        gym.register(_id, entry_point=_kind)


def tiny_policy(env: "EpisodeVectorEnv", **source: Any) -> "VLMPolicy":
    """The `tiny` preset for this environment; its value head starts at random, so that values differ."""
    import torch

    from manako.policies import PolicySource, load_policy

    policy = load_policy(PolicySource(**source), env.action_names, env.frame_shape)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        policy.value_head.out.weight.normal_(std=0.3)
    return policy
