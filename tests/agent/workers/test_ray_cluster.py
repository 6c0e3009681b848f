"""Several nodes and whole runs: nodes that come and go, jobs on a real cluster, what is left behind."""

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers import users_folder
from tests.helpers.ray_segments import local, make_policy, replica_settings
from tests.helpers.rollout_equality import same_bits
from tests.helpers.words import last_of_each

ROOT = Path(__file__).parents[3]
RUNNER, SUBMIT = ROOT / "experiments/run_ppo.py", ROOT / "experiments/submit_ray_job.py"
SMALL = ["--num_envs", "4", "--num_steps", "4", "--minibatch_size", "8", "--total_steps", "48", "--eval_episodes", "4"]
SMALL += ["--gif_episodes", "0", "--rollout_batch_size", "2", "--save_every", "100"]
PLUGIN = """
import pathlib, gymnasium as gym, numpy as np

class Lamp(gym.Env):
    metadata = {"render_modes": ["rgb_array"]}
    action_names, instruction = ("on", "off"), "switch the lamp"
    observation_space = action_space = gym.spaces.Discrete(2)

    def __init__(self, fault="", render_mode=None):
        self.fault, self.render_mode = fault, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.lit = int(self.np_random.integers(2))
        return self.lit, {}

    def step(self, action):
        if self.fault and pathlib.Path(self.fault).exists():
            raise RuntimeError("the fuse is gone")
        return self.lit, float(action == self.lit), True, False, {}

    def render(self):
        return np.full((16, 16, 3), 255 * self.lit, np.uint8)

gym.register("Lamp-v0", Lamp)
"""
pytestmark = pytest.mark.timeout(280)


@pytest.fixture
def folder(tmp_path):
    """A user's folder, outside the project, with an environment in it."""
    (tmp_path / "lamp_plugin.py").write_text(PLUGIN)
    return tmp_path


def command(*words, folder, timeout=200, **environment):
    inherited = {name: os.environ[name] for name in os.environ if name not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [str(word) for word in words],
        cwd=folder,
        env={**inherited, "PATH": paths, "PYTHONPATH": "", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def ray_processes():
    found = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return {
        line.split()[0] for line in found.splitlines() if "raylet" in line or "gcs_server" in line or "ray::" in line
    }


def test_a_run_in_workers_from_a_users_folder_leaves_nothing_behind(folder):
    """Plugin, three kinds of files, and the processes."""
    before = ray_processes()
    run = [sys.executable, RUNNER, "--env", "lamp_plugin:Lamp-v0", *SMALL]
    done = command(*run, "--output_dir", "b", "--rollout_backend", "ray-replica", "--num_workers", "2", folder=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "b/final/model.safetensors").is_file() and (folder / "b/evaluation.json").is_file()
    rows = [json.loads(line) for line in (folder / "b/metrics.jsonl").read_text().splitlines()]
    assert all(row["restarts"] == 0 and row["broadcast_bytes"] > 1e5 for row in rows)
    assert f"{rows[0]['broadcast_bytes']:,} bytes" in done.stdout
    until = time.monotonic() + 10
    while ray_processes() - before and time.monotonic() < until:
        time.sleep(0.2)
    assert not ray_processes() - before


@pytest.mark.slow
@pytest.mark.fault
def test_an_environment_that_breaks_in_workers_stops_the_run_with_a_checkpoint(folder):
    """One sentence, exit code 1; --resume may go on with another backend (test_ray_workers.py compares the weights)."""
    fault = folder / "fuse"
    run = [sys.executable, RUNNER, "--env", "lamp_plugin:Lamp-v0", "--env_kwargs", json.dumps({"fault": str(fault)})]
    run += last_of_each([*SMALL, "--total_steps", "400"])

    def break_later():
        while not (folder / "b/metrics.jsonl").exists():
            time.sleep(0.02)
        fault.touch()

    breaker = threading.Thread(target=break_later, daemon=True)
    breaker.start()
    done = command(*run, "--output_dir", "b", "--rollout_backend", "ray-env", folder=folder)
    assert done.returncode == 1, done.stderr
    error = done.stderr.strip().splitlines()[-1]
    assert (
        error.startswith("error: ") and "Lamp-v0" in error and "the fuse is gone" in error and "episode seed" in error
    )
    assert "Traceback" not in done.stderr and "--resume b" in done.stdout
    assert list((folder / "b/checkpoints").glob("checkpoint-*"))
    fault.unlink()
    done = command(sys.executable, RUNNER, "--resume", "b", "--rollout_backend", "local", folder=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "b/evaluation.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_workers", "-1"], "--num_workers is -1: expected a whole number from 1 on"),
        (["--num_workers", "3"], "--num_envs 4 cannot be divided among --num_workers 3"),
        pytest.param(
            ["--worker_gpus", "99", "--placement_timeout", "5"],
            "asked for 2 x (1 CPU, 99 GPU), and the cluster has",
            marks=pytest.mark.slow,
        ),
        (["--ray_address", "127.0.0.1:9"], "Nobody answers at --ray_address '127.0.0.1:9'"),
        (["--rollout_backend", "ray-env", "--async_rollouts", "true"], "expected ray-replica"),
        (["--rollout_backend", "local", "--num_workers", "2"], "--num_workers is for rollout workers"),
        (["--rollout_batch_size", "4"], "--rollout_batch_size is 4: expected a divisor of the 2 environments"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_bad_input(words, message, folder):
    start = time.monotonic()
    words = last_of_each([*SMALL, "--output_dir", "a", "--rollout_backend", "ray-replica", *words])
    run = [sys.executable, RUNNER, *words]
    done = command(*run, folder=folder)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (folder / "a").exists()
    assert time.monotonic() - start < 40


# ---- several nodes ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault
def test_a_node_lost_in_mid_rollout_is_survived_and_a_new_one_is_used(tmp_path):
    import ray
    from ray.cluster_utils import Cluster

    from manako.agent.workers.options import WorkerOptions
    from manako.agent.workers.ray_replica import ReplicaRollouts

    policy = make_policy()
    plain = local(4, policy, batch_size=2)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second = nodes.add_node(num_cpus=1)
        ray.init(address=nodes.address, log_to_driver=False)
        options = WorkerOptions(num_workers=2, cpus=1.0, placement_timeout=20.0, timeout=30.0)
        with contextlib.closing(ReplicaRollouts(replica_settings(batch_size=2), policy, 4, 100, options)) as rollouts:
            same_bits(rollouts.collect(0), plain.collect(0))
            assert len({node["NodeID"] for node in ray.nodes() if node["Alive"]}) == 2
            threading.Timer(0.02, nodes.remove_node, [second], {"allow_graceful": False}).start()
            start = time.monotonic()
            for iteration in range(1, 4):
                same_bits(rollouts.collect(iteration), plain.collect(iteration))
            assert rollouts.supervisor.restarts == 1
            assert time.monotonic() - start < 30
            nodes.add_node(num_cpus=1)
            until = time.monotonic() + 30
            iteration = 4
            while len(set(rollouts.supervisor.owners())) < 2 and time.monotonic() < until:
                same_bits(rollouts.collect(iteration), plain.collect(iteration))
                iteration += 1
            assert len(set(rollouts.supervisor.owners())) == 2  # the new node's worker has its segment
    finally:
        ray.shutdown()
        nodes.shutdown()
        del os.environ["PYTHONPATH"]


# ---- jobs ------------------------------------------------------------------------------------------------------------


def free_port():
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


class Head(NamedTuple):
    """A cluster's dashboard, and what lets its users in."""

    address: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A cluster as `ray start --head` makes it, for who has the token."""
    port, ray_port = free_port(), free_port()
    token = tmp_path_factory.mktemp("token") / "token"
    token.write_text(secrets.token_hex(32))
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    ray_command = Path(sys.executable).with_name("ray")
    temporary = f"/tmp/ray-{os.getpid()}"
    words = [ray_command, "start", "--head", f"--port={ray_port}", f"--dashboard-port={port}", "--num-cpus=4"]
    words += ["--dashboard-host=127.0.0.1", "--disable-usage-stats", f"--temp-dir={temporary}"]
    done = command(*words, folder="/", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    yield Head(f"http://127.0.0.1:{port}", environment)
    # not `ray stop`, which ends every cluster on the machine
    subprocess.run(["pkill", "-KILL", "-f", f"{temporary}/"], check=False)
    shutil.rmtree(temporary, ignore_errors=True)


def test_a_submitted_job_trains_with_a_plugin_and_writes_its_run(head, folder):
    words = ["--job_address", head.address, "--env", "lamp_plugin:Lamp-v0", *SMALL, "--output_dir", "run"]
    words += ["--rollout_backend", "ray-env", "--num_workers", "2", "--worker_cpus", "0.5"]
    done = command(sys.executable, SUBMIT, *words, folder=folder, **head.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "iteration    3/3" in done.stdout and "succeeded" in done.stdout  # the log was followed
    assert set(json.loads((folder / "run/evaluation.json").read_text())["policy"]) >= {"success", "episodes"}
    assert "ray-env" in (folder / "run/config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ray-env", "ray-replica"])
def test_a_submitted_job_finds_the_users_own_envs(head, backend, tmp_path):
    folder = users_folder.fill(tmp_path)
    words = ["--job_address", head.address, "--env", "envs.mine:Corridor-v0", *SMALL, "--output_dir", "run"]
    words += ["--rollout_backend", backend, "--num_workers", "2", "--worker_cpus", "0.5"]
    done = command(sys.executable, SUBMIT, *words, folder=folder, **head.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "run/evaluation.json").is_file()


@pytest.mark.slow
def test_a_job_of_the_plain_command_trains_and_a_relative_folder_is_refused(head, folder):
    ray_command = Path(sys.executable).with_name("ray")
    job = [ray_command, "job", "submit", "--address", head.address, "--working-dir", ".", "--", "python"]
    job += ["experiments/run_ppo.py", *SMALL, "--rollout_backend", "ray-env", "--worker_cpus", "0.5"]
    done = command(*job, "--output_dir", folder / "run", folder=ROOT, **head.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "run/evaluation.json").is_file()
    done = command(*job, "--output_dir", "run", folder=ROOT, **head.environment)
    assert done.returncode != 0
    assert "is relative, and this is a Ray job" in done.stdout and "Traceback" not in done.stdout.split("error:")[0]


def test_a_cluster_refuses_who_has_no_token(head, folder):
    words = [sys.executable, SUBMIT, "--job_address", head.address, *SMALL]
    other = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": str(folder / "none")}
    done = command(*words, folder=folder, **other)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert "Authentication required" in done.stderr and "RAY_AUTH_MODE=token" in done.stderr


@pytest.mark.slow
def test_a_job_that_fails_gives_its_exit_code(head, folder):
    (folder / "fuse").touch()
    fault = json.dumps({"fault": str(folder / "fuse")})
    words = ["--env", "lamp_plugin:Lamp-v0", "--env_kwargs", fault, *SMALL, "--output_dir", "run"]
    done = command(sys.executable, SUBMIT, "--job_address", head.address, *words, folder=folder, **head.environment)
    assert done.returncode == 2
    assert "the fuse is gone" in done.stdout and "failed" in done.stdout
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--job_address", "http://127.0.0.1:9"], "No Ray dashboard at 'http://127.0.0.1:9'"),
        (["--env", "nowhere:Lamp-v0"], "The module 'nowhere' of --env 'nowhere:Lamp-v0' is not here"),
        (["--num_envs", "many"], "--num_envs is 'many': expected a whole number"),
    ],
    ids=lambda value: "" if isinstance(value, str) else value[0],
)
def test_bad_submissions(words, message, folder):
    done = command(sys.executable, SUBMIT, *words, folder=folder)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_ray_that_does_not_start_is_a_sentence_and_leaves_nothing(tmp_path):
    """Its folder cannot be made; a machine with no room for its processes comes the same way, after Ray's 30 s."""
    start = "from manako.agent.workers.cluster import cluster\nwith cluster(num_cpus=1): pass"
    code = (
        "import os\nfrom manako.errors import ManakoError\nbefore = os.environ.get('PYTHONPATH')\n"
        f"try: exec({start!r})\nexcept ManakoError as error: print(error)\n"
        "assert os.environ.get('PYTHONPATH') == before"
    )
    environment = {**os.environ, "RAY_TMPDIR": "/dev/null/ray", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (
        done.stdout.startswith("Ray did not start on this machine (NotADirectoryError") and done.stdout.count("\n") == 1
    )
    assert "--rollout_backend local" in done.stdout
