"""The settings of the benchmarks; light to import."""

from dataclasses import dataclass
from typing import Any, Literal

from manako.experiments.common.command_line import build, read_settings, section
from manako.experiments.common.settings import GOTO, PPOCommand
from manako.settings import setting

RUN = build(PPOCommand, read_settings(PPOCommand, str(GOTO)))  # as run_ppo.py trains without flags


@dataclass(frozen=True)
class SpeedSettings:
    """What is measured, and how long."""

    policy: Literal["tiny", "smollm2"] = setting("tiny", "preset", is_path=True)
    env: str = setting("manako/GoTo-v0", "Gymnasium id with one-token action names")
    num_envs: int = setting(32, "environments side by side", ge=1)
    repeats: int | None = setting(None, "turns; by default 5 for tiny, 3 for smollm2", ge=1)
    seconds: float = setting(1.0, "least duration of one measurement", gt=0)
    threads: int | None = setting(None, "CPU threads of torch; by default torch's own choice", ge=1)
    output: str | None = setting(None, "JSON file for the results, must not exist", is_path=True)
    quick: bool = setting(False, "small sizes and one short turn, to see that everything runs")


@dataclass(frozen=True)
class SpeedCommand:
    """Settings of speed.py."""

    speed: SpeedSettings = section(SpeedSettings, "benchmark")


@dataclass(frozen=True)
class CompareSettings:
    """What is compared."""

    env: str = setting("manako/GoTo-v0", "Gymnasium id of an environment whose instructions name a colour")
    seeds: int = setting(3, "how many seeds, from 0 on", ge=1)
    total_steps: int = setting(RUN.run.total_steps, "env steps of ours at most", ge=1)
    total_steps_sb3: int = setting(600_000, "env steps of Stable-Baselines3 at most", ge=1)
    success: float = setting(0.95, "share of held-out episodes to reach", gt=0, le=1)
    episodes: int = setting(200, "held-out episodes of an evaluation", ge=1)
    eval_every: int = setting(4, "updates between evaluations", ge=1)
    torch_threads: int | None = setting(
        None, "CPU threads of torch; by default 1 for ours, torch's own choice for the CNN", ge=1
    )
    output: str | None = setting(None, "JSON file for the results, must not exist", is_path=True)


@dataclass(frozen=True)
class CompareCommand:
    """Settings of compare_sb3.py."""

    comparison: CompareSettings = section(CompareSettings, "comparison")


@dataclass(frozen=True)
class RayBenchmarkSettings:
    """What ray_workers.py measures."""

    env: str = setting("manako/GoTo-v0", "Gymnasium id")
    env_kwargs: dict[str, Any] | None = setting(None, "arguments of the env's constructor")
    policy: str = setting("tiny", "preset or folder", is_path=True)
    trainable: str = setting("full", "what learns")
    num_envs: int = setting(64, "environments, an even number", ge=2)
    num_steps: int = setting(16, "env steps of a rollout", ge=1)
    core_price: float = setting(0.04, "price of a CPU core for an hour", ge=0)
    learner_price: float = setting(0.08, "price of the learner's machine for an hour", ge=0)
    repeats: int = setting(7, "turns", ge=2)
    output: str | None = setting(None, "JSON file for the results, must not exist", is_path=True)


@dataclass(frozen=True)
class RayBenchmarkCommand:
    """Settings of ray_workers.py."""

    benchmark: RayBenchmarkSettings = section(RayBenchmarkSettings, "benchmark")


@dataclass(frozen=True)
class FeatureCacheSettings:
    """What feature_cache.py measures."""

    env: str = setting("manako/GoTo-v0", "Gymnasium id")
    policy: str = setting("tiny", "preset", is_path=True)
    vision_encoder: str | None = setting(None, "in place of the preset's")
    image_size: int | None = setting(None, "side in pixels that it sees", ge=8)
    trainable: str = setting("adapter", "what learns; not the encoder")
    num_envs: int = setting(32, "environments side by side", ge=1)
    num_steps: int = setting(8, "env steps of a rollout", ge=1)
    minibatch_size: int = setting(128, "samples of an optimizer step", ge=1)
    repeats: int = setting(5, "turns", ge=1)
    seconds: float = setting(1.0, "least duration of one measurement", gt=0)
    threads: int | None = setting(None, "CPU threads of torch; by default torch's own choice", ge=1)
    output: str | None = setting(None, "JSON file for the results, must not exist", is_path=True)


@dataclass(frozen=True)
class FeatureCacheCommand:
    """Settings of feature_cache.py."""

    benchmark: FeatureCacheSettings = section(FeatureCacheSettings, "benchmark")


@dataclass(frozen=True)
class WritingSettings:
    """What writing.py measures."""

    env: str = setting("manako/Relay-v0", "Gymnasium id")
    policy: str = setting("tiny", "preset, model folder or run", is_path=True)
    num_envs: int = setting(32, "environments side by side", ge=1)
    answer_tokens: int = setting(24, "tokens of each answer", ge=2)
    repeats: int = setting(5, "turns", ge=1)
    seconds: float = setting(1.0, "least duration of one measurement", gt=0)
    threads: int | None = setting(None, "CPU threads of torch; by default torch's own choice", ge=1)
    output: str | None = setting(None, "JSON file for the results, must not exist", is_path=True)


@dataclass(frozen=True)
class WritingCommand:
    """Settings of writing.py."""

    benchmark: WritingSettings = section(WritingSettings, "benchmark")


@dataclass(frozen=True)
class RewardScaleSettings:
    """What reward_scale.py compares."""

    env: str = setting("manako/ColorMatch-v0", "Gymnasium id of an environment that says success")
    seeds: int = setting(3, "how many seeds, from 0 on", ge=1)
    total_steps: int = setting(9_728, "env steps of a training", ge=1)
    num_envs: int = setting(32, "environments side by side", ge=1)
    chart: str | None = setting(None, "PNG file for the curves", is_path=True)
    output: str | None = setting(None, "JSON file for the results, must not exist", is_path=True)


@dataclass(frozen=True)
class RewardScaleCommand:
    """Settings of reward_scale.py."""

    benchmark: RewardScaleSettings = section(RewardScaleSettings, "benchmark")
