"""The heavy part of ray_workers.py: rollouts of every backend and an update in turns, the terms of `throughput`."""

import os
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from manako.agent.backends import make_rollouts
from manako.agent.interfaces import Rollouts
from manako.agent.ppo_settings import PPOSettings
from manako.agent.workers.cluster import cluster
from manako.agent.workers.ray_env import call_seconds
from manako.agent.workers.settings import Backend, WorkerSettings
from manako.envs.settings import EnvSettings
from manako.experiments.benchmarks.settings import RayBenchmarkSettings
from manako.experiments.benchmarks.throughput import Terms
from manako.experiments.benchmarks.updating import LoopUpdates
from manako.experiments.common.building import ROOT, copy_maker, make_plan, make_trainer_args, policy_of_run
from manako.experiments.common.environments import make_vector_env, random_actions
from manako.experiments.common.settings import PPOCommand
from manako.policies import PolicySource

KINDS: dict[str, tuple[Backend, int | None]] = {
    "local": ("local", None),
    "ray-env, 1 worker": ("ray-env", 1),
    "ray-replica, 1 worker": ("ray-replica", 1),
    "ray-replica, 2 workers": ("ray-replica", 2),
}


def measure(given: RayBenchmarkSettings) -> tuple[dict[str, list[float]], Terms, str]:
    """Measures rollouts and updates in turns.

    Args:
        given: what is played.

    Returns:
        Seconds of each kind of rollout and of the update, the first turn a warm-up; the terms; torch's version.
    """
    samples = given.num_envs * given.num_steps
    environment = EnvSettings(given.env, given.num_envs, env_kwargs=given.env_kwargs)
    source = PolicySource(given.policy, trainable=given.trainable)
    ppo = PPOSettings(num_steps=given.num_steps, num_ppo_epochs=3, minibatch_size=min(128, samples))
    policy, _ = policy_of_run(environment, source, seed=0, torch_threads=1)
    args = make_trainer_args(PPOCommand(environment, source, ppo), Path("unused"))
    seconds: dict[str, list[float]] = {name: [] for name in [*KINDS, "update"]}
    sources: dict[str, Rollouts] = {}
    with cluster(paths=[str(ROOT), os.getcwd()]):
        for name, (backend, count) in KINDS.items():
            # half a core each, of what Ray counts: all the workers of this script are there, one works at a time
            workers = WorkerSettings(rollout_backend=backend, num_workers=count, worker_cpus=0.5)
            plan = make_plan(
                environment,
                workers,
                policy,
                copy_maker(source, policy, seed=0, torch_threads=1),
                num_steps=given.num_steps,
                num_iterations=given.repeats + 1,
                seed=0,
            )
            sources[name] = make_rollouts(backend, plan)
        loop = LoopUpdates(policy, args, given.num_envs)
        for iteration in range(given.repeats + 1):  # the first warms up
            for name, rollouts in sources.items():
                start = time.perf_counter()
                rollout = rollouts.collect(iteration)
                seconds[name].append(time.perf_counter() - start)
            start = time.perf_counter()
            loop.update(rollout)
            seconds["update"].append(time.perf_counter() - start)
        sent = sources["ray-replica, 1 worker"].metrics()["broadcast_bytes"]
        for rollouts in sources.values():
            rollouts.close()
        call = call_seconds()
    stored = [rollout.logprobs, rollout.values, rollout.next_values, rollout.rewards]
    stored_bytes = rollout.inputs.nbytes + rollout.actions.nbytes + sum(tensor.nbytes for tensor in stored)
    env_step = _seconds_of_env_steps(environment, given.num_steps) / samples
    terms = Terms(
        env_step=env_step,
        forward=max(0.0, statistics.median(seconds["local"][1:]) / samples - env_step),
        update=statistics.median(seconds["update"][1:]) / samples,
        call=call,
        sample_bytes=stored_bytes / samples,
        weight_bytes=sent,
    )
    return seconds, terms, torch.__version__


def _seconds_of_env_steps(environment: EnvSettings, num_steps: int) -> float:
    """The environments' part of a rollout: random actions, no policy."""
    env = make_vector_env(environment, environment.num_envs, seed=0)
    env.reset()
    generator = np.random.default_rng(0)
    start = time.perf_counter()
    for _ in range(num_steps):
        result = env.step(random_actions(env, generator))
        env.reset_done(result.terminated | result.truncated)
    took = time.perf_counter() - start
    env.close()
    return took
