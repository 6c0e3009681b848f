"""What a benchmark runs and how much of it: no torch here."""

from dataclasses import dataclass
from typing import Any

from manako.experiments.benchmarks.settings import RUN, SpeedSettings
from manako.experiments.common.command_line import UsageError

PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "trainable": RUN.policy.trainable,
        "num_steps": RUN.ppo.num_steps,
        "minibatch_size": RUN.ppo.minibatch_size,
        "overhead_steps": RUN.ppo.num_steps,
        "overhead_epochs": RUN.ppo.num_ppo_epochs,
        "answer": "{action}",
        "repeats": 5,
    },
    "smollm2": {
        "trainable": "lora",
        "num_steps": 8,
        "minibatch_size": 32,
        "overhead_steps": 1,
        "overhead_epochs": 2,
        "answer": '{"action": "{action}"}',
        "repeats": 3,
    },
}
QUICK = {"num_steps": 2, "minibatch_size": 16, "overhead_steps": 4, "overhead_epochs": 1}


@dataclass(frozen=True)
class Workload:
    """What is run, and how much of it.

    Args:
        policy: a preset.
        trainable: what of it learns.
        env: Gymnasium id.
        num_envs: environments side by side, N.
        num_steps: env steps of a rollout, T.
        minibatch_size: samples of an optimizer step, B.
        overhead_steps: T of the rollouts that the trainer and the bare loop learn from.
        overhead_epochs: their PPO epochs.
        answer: what the model writes in `generate per env`, around `{action}`.
        gemm_sizes: sides of the square matrices among which the machine's best rate is sought.
        repeats: rounds.
        seconds: least duration of one measurement.
        threads: CPU threads of torch; None for its own choice.
        seed: of everything random.
        vision_encoder: in place of the preset's.
        image_size: side that it sees.
    """

    policy: str
    trainable: str
    env: str
    num_envs: int
    num_steps: int
    minibatch_size: int
    overhead_steps: int
    overhead_epochs: int
    answer: str
    gemm_sizes: tuple[int, ...]
    repeats: int
    seconds: float
    threads: int | None
    seed: int = 0
    vision_encoder: str | None = None
    image_size: int | None = None


def make_workload(config: SpeedSettings) -> Workload:
    """Returns what is run.

    Raises:
        UsageError: the sizes do not fit.
    """
    values: dict[str, Any] = {
        "policy": config.policy,
        "env": config.env,
        "num_envs": config.num_envs,
        "seconds": config.seconds,
        "threads": config.threads,
        "gemm_sizes": (512, 1024, 2048, 4096),
        **PRESETS[config.policy],
    }
    if config.quick:
        values |= {**QUICK, "num_envs": min(config.num_envs, 4), "repeats": 1, "seconds": 0.01, "gemm_sizes": (256,)}
    if config.repeats:
        values["repeats"] = config.repeats
    if values["num_envs"] * values["overhead_steps"] % values["minibatch_size"]:
        raise UsageError(
            f"num_envs is {values['num_envs']}: expected one for which num_envs x {values['overhead_steps']} is a "
            f"multiple of {values['minibatch_size']}, since the trainer's overhead is measured on whole minibatches."
        )
    return Workload(**values)
