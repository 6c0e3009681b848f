"""Stable-Baselines3's PPO on an environment that names a colour: a small CNN on the frame and a one-hot of the colour.

The baseline of compare_sb3.py, which imports this module late: it needs stable-baselines3 (extra: compare). It is given
more than our policy gets: the colour, in place of a sentence to read.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from rich.console import Console
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from manako.envs import TRAINING, episode_seed, held_out_seeds, make_vlm_env
from manako.envs.tiles import COLORS
from manako.experiments.benchmarks.settings import RUN, CompareSettings
from manako.experiments.benchmarks.steps_to_success import Curve, Judge, print_comparison, train_ours
from manako.experiments.common.settings import PPOCommand

Seen = dict[str, np.ndarray]  # {"image": (H, W, 3) uint8, "color": (colours,) float32}, or a batch of them
OURS, SB3 = "VLM policy, tiny", "Stable-Baselines3 CNN"
FEATURES = 128


class NamedColor(gym.Wrapper):
    """The frame, and the colour that the instruction names as a one-hot; every episode's seed is ours.

    Args:
        env_id: an environment whose instructions name one of `envs.tiles.COLORS`.
        seed: the run's seed.
        slot: number of this environment among those of the run.
    """

    def __init__(self, env_id: str, seed: int, slot: int) -> None:
        env = make_vlm_env(env_id)
        super().__init__(env)
        self.observation_space = gym.spaces.Dict(
            image=env.observation_space["image"],  # type: ignore[index]
            color=gym.spaces.Box(0.0, 1.0, (len(COLORS),), np.float32),
        )
        self._seed, self._slot, self._episode = seed, slot, 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Seen, dict[str, Any]]:
        """Starts the next episode of this slot, or that of `seed`."""
        if seed is None:
            seed = episode_seed(self._seed, TRAINING, self._slot, self._episode)
            self._episode += 1
        observation, info = self.env.reset(seed=seed)
        return self._translate(observation), info

    def step(self, action: Any) -> tuple[Seen, float, bool, bool, dict[str, Any]]:
        """Takes one step of the environment."""
        observation, reward, terminated, truncated, info = self.env.step(int(action))
        return self._translate(observation), float(reward), terminated, truncated, info

    def _translate(self, observation: dict[str, Any]) -> Seen:
        named = [float(color in observation["instruction"].split()) for color in COLORS]
        return {"image": observation["image"], "color": np.array(named, np.float32)}


class ImageAndColor(BaseFeaturesExtractor):
    """Three convolutions over the frame; their output beside the colour through one matrix: features (B, 128)."""

    def __init__(self, observation_space: gym.spaces.Dict) -> None:
        super().__init__(observation_space, FEATURES)
        self.convolutions = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=2, padding=1),  # (B, 32, H/2, W/2)
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2, padding=1),  # (B, 64, H/4, W/4)
            nn.ReLU(),
            nn.Conv2d(64, 64, 3),  # (B, 64, H/4 - 2, W/4 - 2)
            nn.ReLU(),
            nn.Flatten(),
        )
        with torch.no_grad():
            pixels = torch.zeros(1, *observation_space["image"].shape)  # type: ignore[misc]  # (1, 3, H, W)
            width = self.convolutions(pixels).shape[1]
        self.joined = nn.Sequential(nn.Linear(width + len(COLORS), FEATURES), nn.ReLU())

    def forward(self, observations: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns features (B, 128) of {"image": (B, 3, H, W) in [0, 1], "color": (B, colours)}."""
        return self.joined(torch.cat([self.convolutions(observations["image"]), observations["color"]], dim=1))


def success_rate(model: PPO, envs: Sequence[NamedColor], seeds: Sequence[int]) -> float:
    """Returns the share of the episodes, one an environment, that the greedy policy ends with success."""
    seen = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds, strict=True)]
    playing, successes = list(range(len(seeds))), 0
    while playing:
        batch = {key: np.stack([seen[i][key] for i in playing]) for key in ("image", "color")}
        actions, _ = model.predict(batch, deterministic=True)
        for i, action in zip(list(playing), actions, strict=True):
            seen[i], _, terminated, truncated, info = envs[i].step(action)
            if terminated or truncated:
                playing.remove(i)
                successes += bool(info["success"])
    return successes / len(seeds)


class _EvaluateEvery(BaseCallback):
    """Evaluates after every `every` updates; the clock stands still meanwhile."""

    def __init__(self, every: int, evaluate: Callable[[PPO], float], judge: Judge) -> None:
        super().__init__()
        self.every, self.evaluate, self.judge = every, evaluate, judge
        self._updates = -1  # the first rollout has no update before it
        self._resumed, self._seconds = time.perf_counter(), 0.0
        self._enough = False

    def _on_rollout_start(self) -> None:
        self._updates += 1
        if self._updates > 0 and self._updates % self.every == 0:
            self.look()

    def look(self) -> None:
        """Evaluates once."""
        self._seconds += time.perf_counter() - self._resumed
        assert isinstance(self.model, PPO)
        self._enough = self.judge(self.num_timesteps, self._seconds, self.evaluate(self.model))
        self._resumed = time.perf_counter()

    def _on_step(self) -> bool:
        return not self._enough

    def _on_training_end(self) -> None:
        if not self._enough:
            self.look()


def train(command: PPOCommand, seeds: Sequence[int], every: int, judge: Judge) -> None:
    """Trains until `judge` is content or all steps are played, with the settings of our own run.

    Args:
        command: the environment and PPO's settings.
        seeds: of the held-out episodes.
        every: updates between evaluations.
        judge: hears env steps, seconds of training and the success rate after each evaluation; True ends it.
    """
    ppo, env, seed = command.ppo, command.environment.env, command.run.seed
    held_out = [NamedColor(env, seed, slot) for slot in range(len(seeds))]
    makers = [functools.partial(NamedColor, env, seed, slot) for slot in range(command.environment.num_envs)]
    model = PPO(
        "MultiInputPolicy",
        DummyVecEnv(list[Callable[[], gym.Env]](makers)),
        learning_rate=lambda remaining: ppo.learning_rate * remaining,
        n_steps=ppo.num_steps,
        batch_size=ppo.minibatch_size,
        n_epochs=ppo.num_ppo_epochs,
        gamma=ppo.gamma,
        gae_lambda=ppo.gae_lambda,
        clip_range=ppo.clip_range,
        clip_range_vf=ppo.clip_range_vf,
        ent_coef=ppo.ent_coef,
        vf_coef=ppo.vf_coef,
        max_grad_norm=ppo.max_grad_norm,
        policy_kwargs={"features_extractor_class": ImageAndColor},
        seed=seed,
        device="cpu",
    )
    evaluation = _EvaluateEvery(every, lambda it: success_rate(it, held_out, seeds), judge)
    model.learn(command.run.total_steps, callback=evaluation)
    for played in held_out:
        played.close()


def compare(given: CompareSettings) -> dict[str, list[dict[str, Any]]]:
    """Trains both with every seed and prints the table.

    Args:
        given: what is compared.

    Returns:
        The results of each method, one a seed.
    """
    threads = given.torch_threads or torch.get_num_threads()
    runs: dict[str, list[dict[str, Any]]] = {OURS: [], SB3: []}
    environment = dataclasses.replace(RUN.environment, env=given.env)
    for seed in range(given.seeds):
        run = dataclasses.replace(RUN.run, seed=seed, total_steps=given.total_steps, torch_threads=given.torch_threads)
        command = dataclasses.replace(RUN, environment=environment, run=run)
        longer = dataclasses.replace(command, run=dataclasses.replace(run, total_steps=given.total_steps_sb3))
        episodes = held_out_seeds(given.episodes, seed)
        ours, sb3 = Curve(given.success), Curve(given.success)
        train_ours(command, episodes, given.eval_every, ours)
        print(f"{OURS}, seed {seed}: {ours}", flush=True)
        torch.set_num_threads(threads)
        train(longer, episodes, given.eval_every, sb3)
        print(f"{SB3}, seed {seed}: {sb3}", flush=True)
        runs[OURS].append(ours.result(seed))
        runs[SB3].append(sb3.result(seed))
    print_comparison(Console(soft_wrap=True, highlight=False), runs, given.success, given.episodes)
    return runs
