"""The model of many workers: an iteration's seconds from measured terms, and the tables of ray_workers.py. No torch."""

import functools
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace

from manako.experiments.benchmarks.settings import RayBenchmarkSettings

WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)


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
    """Returns env steps a second of the whole loop, rollout and update in turn, and where its time goes.

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


def print_throughput(
    given: RayBenchmarkSettings, seconds: dict[str, list[float]], terms: Terms, load: tuple[float, float, float]
) -> None:
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
    for workers, row in throughput_table(terms, given.num_envs, given.num_steps, given.core_price, given.learner_price):
        print(f"{workers:>8}" + "".join(f"{f'{rate:,.0f} ({price:.2f})':>20}" for rate, price in row))


def throughput_table(
    terms: Terms, envs_per_worker: int, num_steps: int, core_price: float, learner_price: float
) -> list[tuple[int, list[tuple[float, float]]]]:
    """Returns, by number of workers, (steps/s, price of a million steps) of ray-env, ray-replica, a fast learner."""
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
