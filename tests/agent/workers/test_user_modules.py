"""A user's own `envs` and `agent` packages beside ours: in this process, in Ray workers, in a script."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import users_folder

ROOT = Path(__file__).parents[3]
SMALL = ["--num_envs", "4", "--num_steps", "4", "--minibatch_size", "8", "--total_steps", "16", "--eval_episodes", "2"]
SMALL += ["--gif_episodes", "0"]
SCRIPT = """
import agent, envs.mine
from manako.envs import make_vlm_env

env = make_vlm_env("Corridor-v0")
print(agent.OWNER, *env.action_names, env.reset(seed=0)[0]["instruction"])
"""
pytestmark = pytest.mark.timeout(240)


@pytest.fixture
def folder(tmp_path):
    return users_folder.fill(tmp_path)


def python(*words, folder, path=""):
    """Python in the user's folder; what it wrote."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_MODE", "RAY_ADDRESS")}
    command = [sys.executable, *map(str, words)]
    environment = {**inherited, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "backend",
    [pytest.param("local", marks=pytest.mark.slow), "ray-env", pytest.param("ray-replica", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("module", ["envs.mine", pytest.param("envs.with_agent", marks=pytest.mark.slow)])
def test_a_run_plays_the_environment_of_the_users_own_envs(module, backend, folder):
    words = ["--env", f"{module}:Corridor-v0", *SMALL, "--rollout_backend", backend, "--output_dir", "run"]
    python(ROOT / "experiments/run_ppo.py", *words, folder=folder)
    assert "episodes" in json.loads((folder / "run/evaluation.json").read_text())["policy"]


def test_a_script_imports_its_own_envs_and_ours_as_manako(folder):
    (folder / "script.py").write_text(SCRIPT)
    assert python("script.py", folder=folder, path=str(ROOT)) == "the user left right go to the green end\n"
