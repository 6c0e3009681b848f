"""Small real runs for the tests of agent/ and experiments/: the tiny policy, this project's environments, no mocks.

Two short environments are registered here for what the project's own do not do: `Corridor` truncates quickly and
changes its instruction (and with it the prompt's length) at every step, `Poison` pays NaN.
"""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from agent.ppo_trainer import PPOConfig, PPOTrainer
from envs import EpisodeVectorEnv
from policies import PolicySource, VLMPolicy, load_policy

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


gym.register("tests/Corridor-v0", entry_point=Corridor)
gym.register("tests/Poison-v0", entry_point=Poison)


def tiny_policy(env: EpisodeVectorEnv, **source: Any) -> VLMPolicy:
    """The `tiny` preset for this environment; its value head starts at random, so that values differ."""
    policy = load_policy(PolicySource(**source), env.action_names, env.frame_shape)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        policy.value_head.out.weight.normal_(std=0.3)
    return policy


def color_env(num_envs: int = 8, **options: Any) -> EpisodeVectorEnv:
    return EpisodeVectorEnv("manako/ColorMatch-v0", num_envs, **options)


def corridor_env(num_envs: int = 4, env_kwargs: dict | None = None, **options: Any) -> EpisodeVectorEnv:
    return EpisodeVectorEnv("tests/Corridor-v0", num_envs, env_kwargs=env_kwargs, **options)


def ppo_config(folder: Path, **settings: Any) -> PPOConfig:
    """Two iterations of 4 steps; tests say what they need otherwise."""
    defaults = {"num_iterations": 2, "num_steps": 4, "num_ppo_epochs": 2, "minibatch_size": 16, "learning_rate": 1e-3}
    return PPOConfig(output_dir=str(folder), report_to="none", **{**defaults, **settings})


def make_trainer(folder: Path, env: EpisodeVectorEnv | None = None, **settings: Any) -> PPOTrainer:
    """A trainer of the tiny policy on ColorMatch with 8 environments."""
    env = env or color_env()
    return PPOTrainer(tiny_policy(env), ppo_config(folder, **settings), env)


def weights(policy: VLMPolicy) -> dict[str, torch.Tensor]:
    """Copies of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in policy.named_parameters()}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
