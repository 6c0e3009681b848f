"""The import name `manako`: from the wheel, from a bare checkout, and beside a user's own folders of the same names.

The editable install is what this suite runs in; Ray workers are in agent/workers/test_user_modules.py.
"""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN_ENV = """
import gymnasium as gym, numpy as np

class Corridor(gym.Env):
    metadata = {"render_modes": ["rgb_array"]}
    action_names, mission = ("left", "right"), "go right"
    observation_space, action_space = gym.spaces.Discrete(5), gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode, self.place = render_mode, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = 2
        return self.place, {}

    def step(self, action):
        self.place += 2 * int(action) - 1
        return self.place, float(self.place == 4), self.place in (0, 4), False, {}

    def render(self):
        frame = np.zeros((8, 40, 3), np.uint8)
        frame[:, self.place * 8 : self.place * 8 + 8] = 255
        return frame

gym.register("Corridor-v0", Corridor, max_episode_steps=20)
"""


def run(*command, cwd, path=()):
    """The output of a fresh interpreter that finds no checkout by itself."""
    code = f"import sys; sys.path[:0] = {[str(place) for place in path]}\n"
    done = subprocess.run(
        [sys.executable, "-c", code + command[0], *command[1:]], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel, unpacked."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True, timeout=60)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(place), "."]
    subprocess.run(command, cwd=source, check=True, timeout=120, capture_output=True)
    zipfile.ZipFile(next(place.glob("manako-*.whl"))).extractall(place / "site")
    return place / "site"


def test_the_wheel_holds_manako_alone(wheel):
    top = {path.name for path in wheel.iterdir() if not path.name.endswith(".dist-info")}
    assert top == {"manako"}
    inside = {path.name for path in (wheel / "manako").iterdir() if path.is_dir()}
    assert inside == {"agent", "envs", "policies", "experiments"}
    assert (wheel / "manako/experiments/configs/goto.yaml").is_file()
    script = "import manako.envs, manako.agent.ppo_settings; print(manako.__path__, manako.envs.__file__)"
    found = run(script, cwd=wheel.parent, path=[wheel])
    assert found == f"['{wheel}/manako'] {wheel}/manako/envs/__init__.py"


@pytest.fixture
def users_folder(tmp_path):
    """A researcher's repository with an envs/ and an agent/ of its own."""
    for package in ("envs", "agent"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"OWNER = 'the user, {package}'\n")
    (tmp_path / "envs/mine.py").write_text(OWN_ENV)
    return tmp_path


def test_a_users_own_envs_beside_ours(users_folder, wheel):
    script = (
        "import envs.mine, agent, envs\n"
        "from manako.envs import make_vlm_env\n"
        "print(envs.OWNER, agent.OWNER, make_vlm_env('Corridor-v0').action_names)"
    )
    for place in (ROOT, wheel):
        out = run(script, cwd=users_folder, path=[users_folder, place])
        assert out == "the user, envs the user, agent ('left', 'right')"


@pytest.mark.parametrize("runner", ["check_env.py"])
def test_a_plugin_from_the_users_envs(users_folder, runner):
    command = [sys.executable, str(ROOT / "experiments" / runner), "envs.mine:Corridor-v0"]
    done = subprocess.run(command, cwd=users_folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left, right" in done.stdout


def test_the_front_door_names_are_importable():
    script = "from manako import PPOTrainer, evaluate, load_policy, make_env; print(make_env.__name__)"
    assert run(script, cwd=ROOT) == "make_env"
