"""Trains for minutes in an environment that breaks in one step of a hundred, and accounts for every episode.

    python experiments/benchmarks/soak.py                      30 minutes on two workers
    python experiments/benchmarks/soak.py --minutes 2 --kind die --rate 0.001

The environment writes down itself what it has started, ended and broken (`soak_env.py`). In the end each episode that
the learner has seen is ended once, lost once or still running, with the length and return that the environment wrote,
and the memory of learner and workers is compared with that after the first minute. Exit code 1 where something differs.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run as a file: `manako` is this checkout
    sys.path[:] = [str(ROOT), *(path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent)]
    import manako  # noqa: F401

    del sys.path[0]

from manako.agent.rollout import Rollout  # noqa: E402
from manako.experiments.common.command_line import run_main  # noqa: E402

WARM_UP = 60.0  # seconds after which memory is compared
GROWTH = 0.05


class Ledger:
    """Every episode that a learner was shown, from the records of consecutive rollouts.

    Attributes:
        ended: (seed, length, return) of the ended ones.
        failed: seeds of the lost ones.
        running: seeds of those that go on.
    """

    def __init__(self) -> None:
        self.ended: list[tuple[int, int, float]] = []
        self.failed: list[int] = []
        self.running: dict[int, tuple[int, int, float]] = {}  # slot -> seed, steps, paid

    def take(self, rollout: Rollout) -> None:
        """Reads a rollout's record."""
        record = rollout.record
        assert record is not None, "it was asked for"
        over = rollout.terminated | rollout.truncated
        for t in range(len(over)):
            for slot in range(over.shape[1]):
                seed, step = int(record.seeds[t, slot]), int(record.steps[t, slot])
                if rollout.failed is not None and rollout.failed[t, slot]:
                    self.running.pop(slot, None)
                    self.failed.append(seed)
                    continue
                before = self.running.get(slot, (seed, 0, 0.0))
                if before[:2] != (seed, step):
                    raise AssertionError(f"slot {slot} goes on with step {step} of {seed} after {before}")
                now = (seed, step + 1, before[2] + float(record.rewards[t, slot]))
                if over[t, slot]:
                    self.running.pop(slot, None)
                    self.ended.append(now)
                else:
                    self.running[slot] = now

    def faults_against(self, log: Path) -> list[str]:
        """Returns what differs from what the environments have written themselves; empty where nothing does."""
        lines = [line.split() for path in log.glob("*.log") for line in path.read_text(encoding="utf-8").splitlines()]
        written: dict[str, set[tuple[int, int, float]]] = {"start": set(), "end": set(), "break": set()}
        for kind, seed, steps, paid in lines:
            if seed != "None":
                written[kind].add((int(seed), int(steps), float(paid)))
        found = []
        for name, seeds in (("ended", [seed for seed, _, _ in self.ended]), ("lost", self.failed)):
            twice = [seed for seed, count in Counter(seeds).items() if count > 1]
            if twice:
                found.append(f"{len(twice)} episodes {name} twice, such as {twice[0]}")
        ended, failed = {seed for seed, _, _ in self.ended}, set(self.failed)
        running = {seed for seed, _, _ in self.running.values()}
        if both := (ended & failed) | (ended & running) | (failed & running):
            found.append(f"{len(both)} episodes are two of ended, lost and running, such as {min(both)}")
        if unknown := set(self.ended) - written["end"]:
            found.append(f"{len(unknown)} ended episodes that no environment wrote, such as {min(unknown)}")
        started = {seed for seed, _, _ in written["start"]}
        if strange := (ended | failed | running) - started:
            found.append(f"{len(strange)} episodes that no environment started, such as {min(strange)}")
        if strange := {seed for seed, _, _ in written["end"]} - ended - failed - running:
            found.append(f"{len(strange)} episodes were ended and never counted, such as {min(strange)}")
        return found


def rss(pid: int) -> float:
    """Returns a process' resident memory in MiB; 0 where it is gone."""
    with contextlib.suppress(psutil.Error):
        return float(psutil.Process(pid).memory_info().rss) / 2**20
    return 0.0


def main() -> int:
    """Soaks; returns the exit code."""
    parser = argparse.ArgumentParser(description="Soaks training on ray-env in an environment that breaks.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=0.01, help="share of the steps that break")
    parser.add_argument("--kind", choices=("raise", "exit", "die"), default="raise")
    parser.add_argument("--always", type=int, default=7, help="seeds that it divides break always; 0 for none")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return soak(Path(folder), given.minutes * 60, given.rate, given.kind, given.always)


def soak(folder: Path, seconds: float, rate: float, kind: str, always: int) -> int:
    """Trains for so long; prints the figures and returns the exit code."""
    import torch

    from manako.agent.backends import make_rollouts
    from manako.agent.faults import FaultLog
    from manako.agent.ppo_config import PPOConfig
    from manako.agent.ppo_trainer import PPOTrainer
    from manako.agent.workers.settings import WorkerSettings
    from manako.envs.settings import EnvSettings
    from manako.experiments.benchmarks.soak_env import ENV_ID
    from manako.experiments.common.building import connected, copy_maker, make_plan, policy_of_run, quiet_libraries
    from manako.policies import PolicySource

    quiet_libraries()
    log = folder / "log"
    log.mkdir()
    kwargs = {"log": str(log), "rate": rate, "kind": kind, "always": always}
    environment = EnvSettings(env=f"manako.experiments.benchmarks.soak_env:{ENV_ID}", env_kwargs=kwargs, num_envs=8)
    calm = EnvSettings(env=environment.env, env_kwargs={"rate": 0.0}, num_envs=8)
    workers = WorkerSettings("ray-env", num_workers=2, worker_cpus=0.5)
    source, ledger, memory = PolicySource(), Ledger(), dict[str, list[float]]()
    start = time.monotonic()
    with connected(workers):
        policy, _ = policy_of_run(calm, source, 0, 1)
        copy = copy_maker(source, policy, 0, 1)
        steps: dict[str, Any] = {"num_steps": 32, "num_iterations": 1_000_000, "seed": 0, "record": True}
        plan = make_plan(environment, workers, policy, copy, **steps)
        with contextlib.closing(make_rollouts("ray-env", plan)) as rollouts:
            collect, env = rollouts.collect, rollouts.env  # type: ignore[attr-defined]

            def counted(iteration: int) -> Rollout:
                rollout = collect(iteration)
                ledger.take(rollout)
                if iteration % 10 == 0:
                    note(memory, os.getpid(), env.supervisor.pids(), time.monotonic() - start)
                if time.monotonic() - start > seconds:
                    trainer.state.max_steps = trainer.state.global_step + 1
                return rollout._replace(record=None)

            rollouts.collect = counted  # type: ignore[method-assign]
            args = PPOConfig(str(folder / "run"), num_iterations=1_000_000, num_steps=32, minibatch_size=64, seed=0)
            args.use_cpu = not torch.cuda.is_available()
            args.report_to = []
            args.disable_tqdm = True
            trainer = PPOTrainer(policy, args, rollouts=rollouts)
            trainer.faults = FaultLog(0.5, folder / "errors.jsonl")
            trainer.train()
            restarts = env.supervisor.restarts
    found = ledger.faults_against(log)
    growth = {name: values[-1] / values[0] - 1 for name, values in memory.items() if len(values) > 1}
    print(
        f"soak         {time.monotonic() - start:.0f} s, {trainer.iteration} updates, "
        f"{trainer.iteration * trainer.num_samples:,} steps, {trainer.faults.faults} faults, {restarts} restarts"
    )
    print(
        f"episodes     {len(ledger.ended):,} ended, {len(ledger.failed):,} lost, {len(ledger.running)} running; "
        f"{'; '.join(found) or 'none lost or counted twice'}"
    )
    for name, share in growth.items():
        print(f"memory       {name}: {memory[name][-1]:.0f} MiB, {share:+.1%} since the first minute")
    if trainer.failure is not None:
        raise trainer.failure
    return int(bool(found) or any(share > GROWTH for share in growth.values()))


def note(memory: dict[str, list[float]], learner: int, workers: list[int], seconds: float) -> None:
    """Keeps the memory of each process once the first minute is over."""
    if seconds >= WARM_UP:
        for name, pid in (("learner", learner), *((f"worker {pid}", pid) for pid in workers)):
            memory.setdefault(name, []).append(rss(pid))


if __name__ == "__main__":
    run_main(main)
