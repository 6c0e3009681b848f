"""Small real runs for the tests of agent/ and experiments/: the tiny policy, this project's environments, no mocks.

The environments `Corridor` and `Poison` are in small_envs.py, which rollout workers can import in an instant.
"""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from manako.agent.collector import RolloutCollector
from manako.agent.data.demonstrators import ScriptedPlayer
from manako.agent.data.trajectories import to_dataset
from manako.agent.ppo_config import PPOConfig
from manako.agent.ppo_trainer import PPOTrainer
from manako.agent.rollout import Rollout
from manako.envs import EpisodeVectorEnv
from manako.policies import PolicySource, VLMPolicy, load_policy
from tests.helpers.small_envs import tiny_policy

GOTO = "manako/GoTo-v0"


def color_env(num_envs: int = 8, **options: Any) -> EpisodeVectorEnv:
    return EpisodeVectorEnv("manako/ColorMatch-v0", num_envs, **options)


def corridor_env(num_envs: int = 4, env_kwargs: dict | None = None, **options: Any) -> EpisodeVectorEnv:
    return EpisodeVectorEnv("tests/Corridor-v0", num_envs, env_kwargs=env_kwargs, **options)


def goto_policy(**source: Any) -> VLMPolicy:
    """The preset `tiny` for GoTo, or what the arguments of `PolicySource` make of it."""
    env = EpisodeVectorEnv(GOTO, 1)
    return load_policy(PolicySource(**source), env.action_names, env.frame_shape)


def ppo_config(folder: Path, **settings: Any) -> PPOConfig:
    """Two iterations of 4 steps; tests say what they need otherwise."""
    defaults = {"num_iterations": 2, "num_steps": 4, "num_ppo_epochs": 2, "minibatch_size": 16, "learning_rate": 1e-3}
    return PPOConfig(output_dir=str(folder), report_to="none", **{**defaults, **settings})


def make_trainer(folder: Path, env: EpisodeVectorEnv | None = None, **settings: Any) -> PPOTrainer:
    """A trainer of the tiny policy on ColorMatch with 8 environments."""
    env = env or color_env()
    return PPOTrainer(tiny_policy(env), ppo_config(folder, **settings), env)


def indices(rollout: Rollout) -> torch.Tensor:
    """The actions (T, N) of a closed set."""
    return rollout.actions["index"].view(rollout.rewards.shape)


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all parameters."""
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def expert_trajectories(num_envs: int, num_steps: int, error_rate: float, player: str) -> Dataset:
    """What GoTo's scripted expert plays in one rollout."""
    policy, env = goto_policy(), EpisodeVectorEnv(GOTO, num_envs)
    expert = ScriptedPlayer(policy.spec, error_rate)
    collector = RolloutCollector(env, expert, num_steps, seed=0, record=True, ask_expert=True)
    return to_dataset([collector.collect(0)], policy, GOTO, player, {})
