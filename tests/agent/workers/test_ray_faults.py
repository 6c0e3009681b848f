"""Environments that break, leave or hang in workers again and again: the run goes on, and counts what it has lost."""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manako.agent.errors import WorkersError
from manako.agent.workers.cluster import cluster
from manako.agent.workers.options import WorkerOptions
from manako.agent.workers.ray_env import CentralRollouts, RayVectorEnv
from manako.agent.workers.ray_replica import ReplicaRollouts
from manako.agent.workers.replica_worker import ReplicaSettings
from manako.experiments.benchmarks.soak import Ledger
from tests.helpers import ray_segments

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module", autouse=True)
def session():
    with cluster(paths=[str(ROOT), str(ROOT / "tests")], num_cpus=4):
        yield


@contextlib.contextmanager
def rollouts_of(backend, folder, timeout=30.0, step_timeout=None, **kwargs):
    """Rollouts of chance in Soak, 2 workers with 2 slots each."""
    maker = ray_segments.soak_maker(str(folder), step_timeout, **kwargs)
    options = WorkerOptions(2, cpus=0.5, timeout=timeout, placement_timeout=30.0)
    player = ray_segments.soak_player()
    if backend == "ray-env":
        env = RayVectorEnv(maker, 4, player.spec.action_names, options)
        rollouts = CentralRollouts(env, player, 16, seed=3, record=True)
    else:
        settings = ReplicaSettings(maker, ray_segments.soak_player, 16, seed=3, record=True)
        rollouts = ReplicaRollouts(settings, player, 4, 100, options)
    with contextlib.closing(rollouts):
        yield rollouts


@pytest.mark.parametrize(
    ("backend", "kind", "always"),
    [
        ("ray-env", "raise", 3),
        ("ray-env", "exit", 0),
        pytest.param("ray-env", "die", 0, marks=[pytest.mark.slow, pytest.mark.fault]),
        pytest.param("ray-replica", "raise", 3, marks=[pytest.mark.slow, pytest.mark.fault]),
    ],
)
def test_chance_breaks_lose_and_repeat_no_episode(backend, kind, always, tmp_path):
    """Each episode that an environment has started is ended once, lost once, or running, as its own log says."""
    rate = 0.004 if kind == "die" else 0.02
    with rollouts_of(backend, tmp_path, rate=rate, kind=kind, always=always) as rollouts:
        ledger = Ledger()
        for iteration in range(6 if kind == "die" else 12):
            ledger.take(rollouts.collect(iteration))
    assert ledger.ended and (ledger.failed or not always)
    assert ledger.faults_against(tmp_path) == []


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.fault
def test_workers_that_die_always_at_one_step_cost_its_episodes_and_not_the_run(tmp_path):
    """The replay dies as well: the segment's episodes are given up, with what was seen before, and new ones begin."""
    with rollouts_of("ray-env", tmp_path, rate=0.0, kind="die", always=5) as rollouts:
        ledger, faults = Ledger(), []
        for iteration in range(4):
            rollout = rollouts.collect(iteration)
            ledger.take(rollout)
            faults += rollout.faults
            assert rollout.failed is None or rollout.failed.sum() == len(rollout.faults)
    assert faults and len(faults) == len(ledger.failed) and all(fault.given_up for fault in faults)
    assert any(fault.seed % 5 == 0 and fault.step == 2 for fault in faults)
    assert ledger.faults_against(tmp_path) == []


def test_a_step_that_hangs_is_broken_off(tmp_path):
    """In place, by an exception in the environment's own code; where that is not heard the worker ends."""
    with rollouts_of("ray-env", tmp_path, step_timeout=1.0, rate=0.0, kind="wait", always=3) as rollouts:
        start = time.monotonic()
        rollout = rollouts.collect(0)
    assert rollout.faults and "did not return in time" in rollout.faults[0].sentence
    assert rollout.failed.any() and time.monotonic() - start < 60


HEAD_LOST = """
import os, psutil, subprocess, sys, time
words = ["--num_envs", "4", "--num_steps", "8", "--minibatch_size", "16", "--total_steps", "100000"]
words += ["--gif_episodes", "0", "--rollout_backend", "ray-env", "--num_workers", "2", "--output_dir", sys.argv[1]]
run = subprocess.Popen([sys.executable, sys.argv[3], *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
until = time.monotonic() + 100
while not os.path.exists(sys.argv[1] + "/metrics.jsonl") and time.monotonic() < until:
    time.sleep(0.2)
time.sleep(1)
mine = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
for process in mine:
    name = process.cmdline()[0].rsplit("/", 1)[-1]
    if name == sys.argv[2]:
        process.kill()
        print("killed", name)
start = time.monotonic()
out, err = run.communicate(timeout=90)
print("SECONDS", time.monotonic() - start, "RC", run.returncode)
time.sleep(3)
print("LEFT", [process.pid for process in mine if process.is_running()])
print("ERR", err.strip())
print("OUT", out[-400:])
"""


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("process", ["gcs_server", "raylet"])
def test_a_lost_head_ends_the_run_soon_with_a_checkpoint_and_no_orphans(process, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HEAD_LOST, str(tmp_path / "run"), process, str(ROOT / "experiments/run_ppo.py")],
        capture_output=True,
        text=True,
        timeout=230,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert f"killed {process}" in done.stdout, done.stdout + done.stderr
    seconds, code = done.stdout.split("SECONDS ")[1].split()[0], done.stdout.split("RC ")[1].split()[0]
    assert float(seconds) < 30 and code in ("1", "2"), done.stdout
    assert "LEFT []" in done.stdout, done.stdout
    error = done.stdout.split("ERR ")[1].split("\nOUT")[0]
    assert error.startswith("error: ") and "\n" not in error and "Traceback" not in error, done.stdout
    assert list((tmp_path / "run/checkpoints").glob("checkpoint-*")) and "--resume" in done.stdout


def test_a_value_outside_the_contract_ends_it_with_its_sentence_and_is_never_given_up(tmp_path):
    message = "gave the reward '1.0' of type str.*slot .*episode seed .*step 2"
    with (
        rollouts_of("ray-env", tmp_path, rate=0.0, kind="text", always=2) as rollouts,
        pytest.raises(WorkersError, match=message),
    ):
        rollouts.collect(0)


@pytest.mark.fault
@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize("kind", ["raise", "die"])
def test_a_minute_of_soaking_accounts_for_every_episode(kind):
    """`soak.py` trains; its 30 minutes are a command."""
    words = ["--minutes", "1", "--kind", kind, "--rate", "0.01" if kind == "raise" else "0.001"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "experiments/benchmarks/soak.py"), *words],
        capture_output=True,
        text=True,
        timeout=230,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none lost or counted twice" in done.stdout
