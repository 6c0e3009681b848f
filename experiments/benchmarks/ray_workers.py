"""What rollout workers bring and cost on this machine, side by side in one run, and what that means for many of them.

    python experiments/benchmark_ray.py
    python experiments/benchmark_ray.py --env FrozenLake-v1 --env_kwargs '{"is_slippery": false}'
    python experiments/benchmark_ray.py --policy smollm2 --trainable lora --num_envs 8 --num_steps 2 --repeats 3

Measured in turns: a rollout by one worker and by two (each on one core), a local rollout on one core, the same through
ray-env, an update. Then the terms of `throughput` are printed (env step, forward, transfer, update) and its table for 1
to 1,000 workers, which docs/scaling.md discusses.
"""

import functools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a file: `manako` is this checkout, and `import` finds the user's modules, not ours
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.experiments.common.command_line import UsageError, parse, run_main, setting  # noqa: E402
from manako.experiments.common.settings import RunConfig  # noqa: E402

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)


@dataclass
class RayBenchmarkConfig:
    """Settings of benchmark_ray.py."""

    env: str = setting("manako/GoTo-v0", "Gymnasium id")
    env_kwargs: str | None = setting(None, "arguments of the env's constructor, a JSON object")
    policy: str = setting("tiny", "preset or folder")
    trainable: str = setting("full", "what learns")
    num_envs: int = setting(64, "environments, an even number", ge=2)
    num_steps: int = setting(16, "env steps of a rollout", ge=1)
    core_price: float = setting(0.04, "price of a CPU core for an hour", ge=0)
    learner_price: float = setting(0.08, "price of the learner's machine for an hour", ge=0)
    repeats: int = setting(7, "turns", ge=2)
    output: str | None = setting(None, "JSON file for the results, must not exist")


@dataclass(frozen=True)
class Terms:
    """The measured parts of an iteration, for `throughput`.

    Args:
        env_step: seconds of one env step and its rendering, on one core.
        forward: seconds of the policy's forward for one sample, on one core.
        update: seconds of the update for one sample, all PPO epochs, on the learner.
        call: seconds of a round trip to a worker.
        sample_bytes: bytes of one stored sample.
        weight_bytes: bytes that learn.
        bandwidth: bytes a second that the learner sends or receives.
    """

    env_step: float
    forward: float
    update: float
    call: float
    sample_bytes: float
    weight_bytes: float
    bandwidth: float = 1e9


def throughput(terms: Terms, backend: str, workers: int, envs_per_worker: int, num_steps: int) -> dict[str, float]:
    """Env steps a second of the whole loop, rollout and update in turn, and where its time goes.

    local        one process does everything
    ray-env      T times: the workers step side by side, then the learner acts for all of them
    ray-replica  the weights go out in a tree, the workers play T steps each, the samples come in one after another

    Args:
        terms: measured.
        backend: local, ray-env or ray-replica.
        workers: W, one core each.
        envs_per_worker: n.
        num_steps: T.

    Returns:
        seconds of `rollout`, `broadcast`, `gather`, `update`, and `steps_per_second`.
    """
    samples = workers * envs_per_worker * num_steps
    broadcast = gather = 0.0
    if backend == "local":
        rollout = samples * (terms.env_step + terms.forward)
    elif backend == "ray-env":
        gather = samples * terms.sample_bytes / terms.bandwidth + num_steps * workers * terms.call
        rollout = num_steps * envs_per_worker * terms.env_step + samples * terms.forward
    else:
        rollout = num_steps * envs_per_worker * (terms.env_step + terms.forward)
        broadcast = terms.weight_bytes / terms.bandwidth * math.ceil(math.log2(workers + 1)) + workers * terms.call
        gather = samples * terms.sample_bytes / terms.bandwidth
    update = samples * terms.update
    seconds = rollout + broadcast + gather + update
    return {
        "rollout": rollout,
        "broadcast": broadcast,
        "gather": gather,
        "update": update,
        "steps_per_second": samples / seconds,
    }


def main() -> int:
    """One benchmark; returns the exit code."""
    given = parse(RayBenchmarkConfig, description="Measures rollout workers against one process.")
    if given.num_envs % 2:
        raise UsageError(f"--num_envs is {given.num_envs}: expected an even number, for one worker and for two.")
    if given.output and Path(given.output).exists():
        raise UsageError(f"{given.output!r} exists and is not overwritten: give another file.")
    import torch

    from manako.agent.rollout import with_advantages
    from manako.agent.workers.cluster import cluster
    from manako.agent.workers.ray_env import call_seconds
    from manako.experiments.benchmarks.measuring import BareLoop
    from manako.experiments.common.building import make_policy, make_rollouts, make_trainer_args, quiet_libraries
    from manako.experiments.common.environments import make_env

    quiet_libraries()
    config = RunConfig(
        env=given.env,
        env_kwargs=given.env_kwargs,
        policy=given.policy,
        trainable=given.trainable,
        num_envs=given.num_envs,
        num_steps=given.num_steps,
        minibatch_size=min(128, given.num_envs * given.num_steps),
        torch_threads=1,
    )
    env = make_env(config, 1)
    policy = make_policy(config, env.action_names, env.frame_shape)
    args = make_trainer_args(config, Path("unused"))
    samples = config.num_envs * config.num_steps
    load = os.getloadavg()
    with cluster(paths=[os.getcwd()]):
        kinds = {
            "local": ("local", None),
            "ray-env, 1 worker": ("ray-env", 1),
            "ray-replica, 1 worker": ("ray-replica", 1),
            "ray-replica, 2 workers": ("ray-replica", 2),
        }
        seconds: dict[str, list[float]] = {name: [] for name in [*kinds, "update"]}
        sources = {}
        for name, (backend, workers) in kinds.items():
            config.rollout_backend, config.num_workers = backend, workers
            config.worker_cpus = (
                0.5  # of what Ray counts: all the workers of this script are there, one works at a time
            )
            sources[name] = make_rollouts(config, policy, given.repeats + 1)
        bare = BareLoop(policy, args, samples)
        for iteration in range(given.repeats + 1):  # the first warms up
            for name, source in sources.items():
                start = time.perf_counter()
                rollout = source.collect(iteration)
                seconds[name].append(time.perf_counter() - start)
            start = time.perf_counter()
            bare.update(rollout, iteration)
            seconds["update"].append(time.perf_counter() - start)
        sent = sources["ray-replica, 1 worker"].metrics()["broadcast_bytes"]
        for source in sources.values():
            source.close()
        call = call_seconds()
    stored = with_advantages(rollout, args.gamma, args.gae_lambda)
    sample_bytes = sum(t.numel() * t.element_size() for t in [*stored.inputs, *stored[1:6]]) / samples
    terms = Terms(
        env_step=_seconds_of_env_steps(config) / samples,
        forward=0.0,
        update=statistics.median(seconds["update"][1:]) / samples,
        call=call,
        sample_bytes=sample_bytes,
        weight_bytes=sent,
    )
    forward = statistics.median(seconds["local"][1:]) / samples - terms.env_step
    terms = replace(terms, forward=max(0.0, forward))
    report(given, seconds, terms, load)
    if given.output:
        results: dict[str, Any] = {"settings": vars(given), "seconds": seconds, "terms": vars(terms)}
        results["load_average"] = [load, os.getloadavg()]
        results["torch"] = torch.__version__
        Path(given.output).write_text(json.dumps(results, indent=2))
    env.close()
    return 0


def report(given: RayBenchmarkConfig, seconds: dict[str, list[float]], terms: Terms, load: Any) -> None:
    """Prints what was measured, as ratios within each turn, and the model's table."""

    def show(label: str, compute: Callable[[dict[str, float]], float], unit: str = "") -> None:
        turns = [
            compute({name: times[turn] for name, times in seconds.items()}) for turn in range(1, given.repeats + 1)
        ]
        print(f"{label:<52}{statistics.median(turns):9.2f}{unit} ({min(turns):.2f} to {max(turns):.2f})")

    samples = given.num_envs * given.num_steps
    print(f"{given.policy} on {given.env}, {given.num_envs} envs x {given.num_steps} steps; median (range) of turns")
    for name in seconds:
        show(f"{name}, samples/s", functools.partial(_rate, name, samples))
    show("two workers against one", lambda t: t["ray-replica, 1 worker"] / t["ray-replica, 2 workers"], "x")
    for kind in ("ray-env", "ray-replica"):
        show(f"overhead of {kind} in an iteration with update", functools.partial(_overhead, kind), " %")
    print(f"bytes broadcast an update: {terms.weight_bytes:,.0f}, all that learns")
    print(f"load average {load[0]:.1f} before, {os.getloadavg()[0]:.1f} after, {os.cpu_count()} cores\n")
    print(
        f"terms: env step {1e3 * terms.env_step:.3f} ms, forward {1e3 * terms.forward:.3f} ms and update "
        f"{1e3 * terms.update:.3f} ms a sample, call {1e3 * terms.call:.2f} ms, {terms.sample_bytes:,.0f} bytes each"
    )
    print(f"model: steps/s of rollout and update together, {given.num_envs} envs a worker, an update as measured")
    print("in brackets the price of a million steps; the last column has a learner that updates 100 times as fast")
    print(f"{'workers':>8}{'ray-env':>20}{'ray-replica':>20}{'ray-replica, fast':>20}")
    for workers, row in table(terms, given.num_envs, given.num_steps, given.core_price, given.learner_price):
        print(f"{workers:>8}" + "".join(f"{f'{rate:,.0f} ({price:.2f})':>20}" for rate, price in row))


def table(
    terms: Terms, envs_per_worker: int, num_steps: int, core_price: float, learner_price: float
) -> list[tuple[int, list[tuple[float, float]]]]:
    """For each number of workers: (steps/s, price of a million steps) of ray-env, ray-replica, and a fast learner."""
    fast = replace(terms, update=terms.update / 100)
    rows = []
    for workers in WORKERS:
        row = []
        for parts, kind in ((terms, "ray-env"), (terms, "ray-replica"), (fast, "ray-replica")):
            rate = throughput(parts, kind, workers, envs_per_worker, num_steps)["steps_per_second"]
            row.append((rate, 1e6 / rate / 3600 * (workers * core_price + learner_price)))
        rows.append((workers, row))
    return rows


def _rate(name: str, samples: int, turn: dict[str, float]) -> float:
    return samples / turn[name]


def _overhead(kind: str, turn: dict[str, float]) -> float:
    return 100 * (turn[f"{kind}, 1 worker"] - turn["local"]) / (turn["local"] + turn["update"])


def _seconds_of_env_steps(config: RunConfig) -> float:
    """The environments' part of a rollout: random actions, no policy."""
    import numpy as np

    from manako.experiments.common.environments import make_env

    env = make_env(config, config.num_envs)
    env.reset()
    generator = np.random.default_rng(0)
    start = time.perf_counter()
    for _ in range(config.num_steps):
        result = env.step(generator.integers(len(env.action_names), size=config.num_envs))
        env.reset_done(result.terminated | result.truncated)
    took = time.perf_counter() - start
    env.close()
    return took


if __name__ == "__main__":
    run_main(main)
