"""The checker finds each fault of a small bad environment, says it in a sentence, and says nothing of good ones."""

import re
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from manako import envs
from manako.envs.check import WARNING
from manako.envs.settings import EnvSettings
from manako.experiments import check_env

SCRIPT = Path(__file__).parents[2] / "experiments" / "check_env.py"


class Good(gym.Env):
    """A dot that each action moves by another distance; each bad environment below breaks one thing of it."""

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gym.spaces.Discrete(1)
    action_space = gym.spaces.Discrete(3)
    instruction = "move the dot"
    action_names = ("one", "two", "three")

    def __init__(self, render_mode=None):
        self.render_mode = render_mode
        self.at = self.steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at, self.steps = int(self.np_random.integers(256)), 0
        return 0, {}

    def step(self, action):
        self.at, self.steps = (self.at + int(action) + 1) % 256, self.steps + 1
        return 0, 0.0, self.steps == 9, False, {}

    def render(self):
        frame = np.zeros((16, 16, 3), np.uint8)
        frame.reshape(256, 3)[self.at] = 255
        return frame


def changed(**attributes):
    """`Good` with some attributes or methods replaced."""
    return type("Bad", (Good,), attributes)


def after(step):
    """`Good` whose step result goes through `step(env, result)`."""
    return changed(step=lambda env, action: step(env, Good.step(env, action)))


def raises(*args, **kwargs):
    raise RuntimeError("out of order")


def bad_init(self, render_mode=None):
    raise OSError("no disk")


def chance(env, *, seed=None, options=None):
    result = Good.reset(env, seed=seed)
    env.at = int(np.random.default_rng().integers(256))
    return result


class Leaks(Good):
    """What one object did shows in its later episodes."""

    played = 0

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed)
        self.played += 1
        self.at = (self.at + self.played) % 256
        return result


class Differs(Good):
    """Each object has a dot of its own."""

    made = 0

    def __init__(self, render_mode=None):
        super().__init__(render_mode)
        Differs.made += 1
        self.shift = Differs.made

    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed)
        self.at = (self.at + self.shift) % 256
        return result


def growing(env):
    frame = Good.render(env)
    return frame if env.steps < 3 else np.pad(frame, ((0, 1), (0, 0), (0, 0)))


BAD = {
    "constructor raises": (changed(__init__=bad_init), "could not be made .*OSError: no disk"),
    "no rgb_array": (changed(metadata={"render_modes": ["human"]}), "no picture to show: .*add 'rgb_array'"),
    "render gives None": (changed(render=lambda env: None), "gave a NoneType as its image"),
    "render gives a list": (changed(render=lambda env: [Good.render(env)]), "gave a list as its image"),
    "render gives floats": (changed(render=lambda env: Good.render(env) / 255), "gave an array of float64"),
    "render gives alpha": (changed(render=lambda env: np.zeros((16, 16, 4), np.uint8)), r"shape \(16, 16, 4\)"),
    "render changes size": (changed(render=growing), r"shape \(17, 16, 3\) after frames of shape \(16, 16, 3\)"),
    "render raises": (changed(render=raises), r"broke in its image from render\(\) with RuntimeError: out of order"),
    "no instruction": (changed(instruction=None), "says nowhere what to do"),
    "empty instruction": (changed(instruction=" "), "gives an empty instruction"),
    "number as instruction": (changed(instruction=5), "gives 5 as its instruction, expected a string"),
    "reward is another text each time": (after(lambda env, r: (0, str(env.at), *r[2:])), "gives the reward '"),
    "endless instruction": (changed(instruction="x" * 70_000), "instruction of 70000 characters"),
    "instruction raises": (changed(instruction=property(raises)), "broke in its instruction with RuntimeError"),
    "no action names": (changed(action_names=None), "does not name its 3 actions"),
    "too few action names": (changed(action_names=("a", "b")), "has 3 actions, and .* gives 2 names"),
    "equal action names": (changed(action_names=("a", "b", "a")), "a name of its own"),
    "action names raise": (
        changed(action_names=None, get_action_meanings=raises),
        "broke in its action names with RuntimeError",
    ),
    "unbounded actions": (changed(action_space=gym.spaces.Box(-np.inf, 1, (3,))), "expected finite bounds"),
    "actions of several kinds": (
        changed(action_space=gym.spaces.Tuple([gym.spaces.Discrete(3)])),
        "only Discrete, MultiDiscrete, MultiBinary, bounded Box and Text spaces can be played",
    ),
    "reset raises": (changed(reset=raises), r"broke in reset\(seed=0\) with RuntimeError: out of order"),
    "reset gives no info": (changed(reset=lambda env, **kwargs: 0), r"returns a value of type int from reset\(\)"),
    "step raises": (changed(step=raises), r"broke in step\(\), action '(one|two|three)', with RuntimeError"),
    "step gives 4 values": (
        after(lambda env, r: (r[0], r[1], r[2], {})),
        r"returns a tuple of 4 from step\(\), expected \(observation, reward, terminated, truncated, info\)",
    ),
    "reward is NaN": (after(lambda env, r: (0, float("nan"), *r[2:])), "gives the reward nan, expected a finite"),
    "reward is text": (after(lambda env, r: (0, "much", *r[2:])), "gives the reward 'much' of type str"),
    "reward is True": (after(lambda env, r: (0, True, *r[2:])), "gives the reward True of type bool"),
    "terminated is no bool": (
        after(lambda env, r: (*r[:2], int(r[2]), *r[3:])),
        "gives [01] as terminated, expected True or False",
    ),
    "truncated is no bool": (after(lambda env, r: (*r[:3], None, r[4])), "gives None as truncated"),
    "info is no dict": (after(lambda env, r: (*r[:4], None)), r"as info from step\(\), expected a dict"),
    "chance without the seed": (changed(reset=chance), "does not respect its seed: the frame of step 0 .*one object"),
    "episodes leak": (Leaks, "does not respect its seed: the frame of step 0 of the episode with seed 0 .*one object"),
    "objects differ": (Differs, "does not respect its seed: the frame of step 0 .* in a new object"),
    "reward by chance": (
        after(lambda env, r: (0, float(np.random.default_rng().random()), *r[2:])),
        "does not respect its seed: the reward of step 1",
    ),
    "close raises": (changed(close=raises), r"broke in close\(\) with RuntimeError: out of order"),
}
ODD = {
    "control characters": (changed(instruction="a\x07b"), r"gives an instruction with control characters, 'a\\x07b'"),
    "blank frames": (
        changed(render=lambda env: np.full((16, 16, 3), env.at, np.uint8)),
        r"shows a single colour in \d+ of \d+ frames",
    ),
    "nothing moves": (
        changed(render=lambda env: np.arange(768, dtype=np.uint8).reshape(16, 16, 3)),
        "changes neither its frame nor its instruction in 200 steps",
    ),
    "no end": (after(lambda env, r: (*r[:2], False, *r[3:])), "ends no episode in 200 steps"),
}


@pytest.fixture
def check():
    """Register a class and check it."""

    def run(env_class, **kwargs):
        gym.register("Checked-v0", env_class, **kwargs)
        try:
            return envs.check_vlm_env("Checked-v0")
        finally:
            del gym.registry["Checked-v0"]

    return run


def test_a_good_environment_has_no_faults(check):
    assert check(Good) == []


@pytest.mark.parametrize("fault", BAD)
def test_each_fault_is_found(check, fault):
    env_class, says = BAD[fault]
    faults = check(env_class)
    assert len(faults) == 1 and not faults[0].startswith(WARNING)
    assert re.search(rf"^Checked-v0\b.*{says}", faults[0]), faults[0]


@pytest.mark.parametrize("oddity", ODD)
def test_what_is_rarely_meant_is_a_warning(check, oddity):
    env_class, says = ODD[oddity]
    faults = check(env_class)
    assert len(faults) == 1
    assert re.search(f"^warning: Checked-v0 {says}", faults[0]), faults[0]


def test_every_fault_is_found_at_once(check):
    bad = changed(
        instruction=5,
        action_names=("a", "a", "b"),
        render=lambda env: None,
        step=lambda env, action: (0, float("inf"), 1, False, {}),
    )
    faults = check(bad)
    for says in ("a name of its own", "gives 5 as its instruction", "NoneType", "reward inf", "1 as terminated"):
        assert sum(says in fault for fault in faults) == 1, says
    assert len(faults) == 5


@pytest.mark.parametrize("action", range(3))
def test_every_action_is_tried(action):
    class Trap(Good):
        def step(self, number):
            return raises() if number == action else super().step(number)

    gym.register("Checked-v0", Trap)
    try:
        assert f"action '{Good.action_names[action]}'" in envs.check_vlm_env("Checked-v0", steps=3)[0]
    finally:
        del gym.registry["Checked-v0"]


def test_an_old_step_is_found_through_a_time_limit(check):
    """TimeLimit stumbles over the four values first."""
    faults = check(after(lambda env, r: (r[0], r[1], r[2], {})), max_episode_steps=5)
    assert any("returns a tuple of 4 from step()" in fault for fault in faults)


def test_a_step_limit_needs_no_warning(check):
    assert check(after(lambda env, r: (*r[:2], False, *r[3:])), max_episode_steps=50) == []


def test_an_environment_of_one_step_need_not_change_its_frame():
    assert envs.check_vlm_env("manako/ColorMatch-v0") == []


@pytest.mark.parametrize(
    ("env_id", "package", "kwargs"),
    [
        ("manako/GoTo-v0", "numpy", {"size": 4, "num_objects": 5, "shapes": ["ball", "key"]}),
        ("FrozenLake-v1", "pygame", {}),
        ("Blackjack-v1", "pygame", {}),
        ("MiniGrid-GoToDoor-5x5-v0", "minigrid", {"tile_size": 8}),
        ("BabyAI-GoToRedBallGrey-v0", "minigrid", {"tile_size": 8}),
        ("ALE/Freeway-v5", "ale_py", {}),
    ],
)
def test_environments_of_others_pass(env_id, package, kwargs):
    pytest.importorskip(package)
    faults = envs.check_vlm_env(env_id, env_kwargs=kwargs, steps=100)
    assert [fault for fault in faults if not fault.startswith(WARNING)] == []


def test_an_id_that_does_not_exist_is_one_fault():
    assert "did you mean manako/GoTo-v0" in envs.check_vlm_env("manako/GoTwo-v0")[0]
    assert "there is no module" in envs.check_vlm_env("no_such_plugin:X-v0")[0]


# The command

PLUGIN = """
import gymnasium as gym
import numpy as np

class Switch(gym.Env):
    metadata = {"render_modes": ["rgb_array"]}
    observation_space, action_space = gym.spaces.Discrete(2), gym.spaces.Discrete(2)
    def __init__(self, render_mode=None):
        self.render_mode, self.on = render_mode, 0
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.on = int(self.np_random.integers(2))
        return self.on, {}
    def step(self, action):
        self.on = (self.on + int(action)) % 2
        return self.on, float(self.on), False, False, {}
    def render(self):
        frame = np.zeros((16, 16, 3), np.uint8)
        frame[:8] = 200 if self.on else 40
        return frame

gym.register("Switch-v0", Switch, max_episode_steps=5)
"""


def command(*arguments, folder):
    result = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], cwd=folder, capture_output=True, text=True, timeout=60
    )
    return result.returncode, result.stdout, result.stderr


def test_command_describes_a_plugin_of_the_current_folder(tmp_path):
    (tmp_path / "switches.py").write_text(PLUGIN)
    names = ("--instruction", "switch it on", "--action_names", "leave, flip")
    code, out, _ = command("switches:Switch-v0", *names, folder=tmp_path)
    assert code == 0
    assert "image         (16, 16, 3) uint8, from render()" in out
    assert "instruction   'switch it on', from the instruction argument" in out
    assert "action names  leave, flip (2), from the action_names argument" in out
    assert "success       info" in out and out.endswith("no faults\n")
    code, out, _ = command("switches:Switch-v0", folder=tmp_path)
    assert code == 1
    assert "fault: Switch-v0 says nowhere what to do" in out and "fault: Switch-v0 does not name its 2 actions" in out
    assert out.endswith("2 faults\n")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["manako/GoTo-v0", "--env_kwargs", '{"size": 4}'], 0, "image         (32, 32, 3)"),
        (["manako/GoTo-v0", "--env_kwargs", '{"size": 1}'], 1, "fault: manako/GoTo-v0 could not be made"),
        (["manako/GoTo-v0", "--env_kwargs", "{size: 4}"], 2, "'{size: 4}' is no JSON"),
        (["manako/GoTo-v0", "--env_kwargs", "[4]"], 2, "expected a JSON object"),
        (["manako/GoTo-v0", "--sise", "4"], 2, "There is no flag --sise"),
        (["manako/GoTo-v0", "--success_return", "high"], 2, "--success_return is 'high': expected a number"),
        ([], 2, "required: ENV"),
    ],
)
def test_command_exit_codes(tmp_path, arguments, code, says):
    got, out, err = command(*arguments, folder=tmp_path)
    assert got == code
    assert says in out + err
    assert "Traceback" not in err


# ---- speed -----------------------------------------------------------------------------------------------------------


class Slow(Good):
    """Draws for 5 ms."""

    def render(self):
        time.sleep(0.005)
        return super().render()


def test_a_slow_renderer_is_said(capsys):
    gym.register("Slow-v0", Slow, max_episode_steps=5)
    check_env.describe(EnvSettings(env="Slow-v0"))
    said = capsys.readouterr().out
    assert re.search(r"speed +\d+ steps/s: 0\.\d\d ms a step, [5-9]\.\d\d ms its picture", said), said
    assert re.search("warning: rendering is the cost: (9\\d|100)%", said), said
    check_env.describe(EnvSettings(env="manako/GoTo-v0"))
    said = capsys.readouterr().out
    assert "its picture with it" in said and "warning" not in said


def test_an_instruction_that_a_model_may_not_hold_is_said():
    gym.register("Wordy-v0", changed(instruction="word " * 1000), max_episode_steps=5)
    assert "instruction of 5,000 characters, and a model reads" in "".join(envs.check_vlm_env("Wordy-v0"))
