"""Any environment as an image, an instruction and named actions: where each comes from, and what happens without it."""

import enum
import itertools
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from manako import envs
from manako.envs.observation import InstructionText, VLMObservation, as_frame, is_picture
from manako.envs.tasks import success_rule, task_of
from manako.plain import holds_control_characters, written_out

ROOT = Path(__file__).parents[2]


class Screen(gym.Env):
    """A picture whose first pixel counts the steps; tests replace what they need."""

    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"
    observation_space = gym.spaces.Discrete(1)
    action_space = gym.spaces.Discrete(2)
    instruction = "count"
    action_names = ("one", "two")

    def __init__(self, **attributes):
        self.steps = 0
        self.reward = 0.0
        self.played = []
        self.canvas = np.zeros((16, 20, 3), np.uint8)
        for name, value in attributes.items():
            setattr(self, name, value)

    def observe(self):
        return 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        self.played.append(action)
        return self.observe(), self.reward, False, False, {}

    def render(self):
        self.canvas[0, 0, 0] = self.steps
        return self.canvas


def run_python(code: str, **kwargs) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, **kwargs
    ).stdout


# What the package costs to import


def test_import_is_quick_and_light():
    code = (
        "import time, sys; start = time.process_time(); import manako.envs; print(time.process_time() - start); "
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'pygame', 'minigrid', 'ale_py', 'ray') "
        "if m in sys.modules])"
    )
    seconds = []
    for _ in range(5):
        first, second = run_python(code).splitlines()
        assert second == "[]"
        seconds.append(float(first))
        if seconds[-1] < 0.5:
            return
    pytest.fail(f"import envs took {min(seconds):.2f} s of processor time, expected less than 0.5")


def test_own_ids_are_registered_once_and_again():
    import importlib

    importlib.reload(envs)
    assert {"manako/GoTo-v0", "manako/ColorMatch-v0"} <= set(gym.registry)


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "CartPole-v1"])
def test_sigterm_still_ends_a_process_that_has_drawn(env_id):
    pytest.importorskip("pygame")
    code = (
        f"import time; from manako import envs; env = envs.make_vlm_env({env_id!r}); env.reset(seed=0); env.step(0); "
        "print('drawn', flush=True); time.sleep(30)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**{k: v for k, v in os.environ.items() if not k.startswith("SDL_")}, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert any(line.strip() == "drawn" for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=5) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


# Environments of others


@pytest.mark.parametrize(
    "env_id",
    [
        "FrozenLake-v1",
        "FrozenLake8x8-v1",
        "Taxi-v4",
        "CliffWalking-v1",
        "CliffWalkingSlippery-v1",
        "Blackjack-v1",
        "CartPole-v1",
        "MountainCar-v0",
        "Acrobot-v1",
    ],
)
def test_gymnasium_classics(env_id):
    pytest.importorskip("pygame")
    env = envs.make_vlm_env(env_id)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert observation["image"].shape == env.frame_shape and observation["image"].std() > 0
    assert observation["instruction"] == envs.TASKS[env_id].instruction
    assert env.action_names == envs.TASKS[env_id].action_names
    last_allowed = int(np.flatnonzero(env.action_mask)[-1])  # Taxi says what is
    assert env.observation_space.contains(env.step(last_allowed)[0])
    env.close()


@pytest.mark.parametrize(
    ("env_id", "mission"),
    [
        ("MiniGrid-Empty-5x5-v0", "get to the green goal square"),
        ("MiniGrid-GoToDoor-5x5-v0", r"go to the \w+ door"),
        ("BabyAI-GoToRedBallGrey-v0", "go to the red ball"),
    ],
)
def test_minigrid_shows_pixels_and_not_object_codes(env_id, mission):
    pytest.importorskip("minigrid")
    env = envs.make_vlm_env(env_id, env_kwargs={"tile_size": 8})
    observation, _ = env.reset(seed=1)
    assert env.unwrapped.observation_space["image"].shape == (7, 7, 3)  # the codes
    assert env.image_from == "render()"
    assert observation["image"].shape == (env.unwrapped.height * 8, env.unwrapped.width * 8, 3)
    assert env.observation_space.contains(observation)
    assert re.fullmatch(mission, observation["instruction"])
    assert env.instruction_from == "observation['mission']"
    assert env.action_names == ("left", "right", "forward", "pickup", "drop", "toggle", "done")
    assert env.step(0)[0]["image"].tobytes() != observation["image"].tobytes()


def test_minigrid_mission_follows_the_episode():
    pytest.importorskip("minigrid")
    env = envs.make_vlm_env("MiniGrid-GoToDoor-5x5-v0", env_kwargs={"tile_size": 8})
    assert len({env.reset(seed=seed)[0]["instruction"] for seed in range(12)}) > 1


def test_atari_shows_its_own_observation():
    pytest.importorskip("ale_py")
    env = envs.make_vlm_env("ALE/Pong-v5")
    observation, _ = env.reset(seed=2**31 - 1)
    assert env.image_from == "observation"
    assert env.observation_space.contains(observation)
    assert np.array_equal(observation["image"], env.unwrapped.ale.getScreenRGB())
    assert env.action_names == ("NOOP", "FIRE", "RIGHT", "LEFT", "RIGHTFIRE", "LEFTFIRE")
    assert env.action_names_from == "get_action_meanings()"
    grey = envs.make_vlm_env("ALE/Pong-v5", env_kwargs={"obs_type": "grayscale"})
    image = grey.reset(seed=0)[0]["image"]
    assert image.shape == (210, 160, 3)
    assert np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 0], image[..., 2])


# The image


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((16, 16, 3), True),
        ((84, 84, 1), True),
        ((84, 84), True),
        ((210, 160, 3), True),
        ((7, 7, 3), False),  # MiniGrid's codes
        ((15, 64, 3), False),
        ((64, 64, 4), False),
        ((4, 84, 84), False),  # a stack
        ((128,), False),
    ],
)
def test_what_counts_as_a_picture(shape, expected):
    assert is_picture(gym.spaces.Box(0, 255, shape, np.uint8)) is expected


def test_other_numbers_are_no_picture():
    assert not is_picture(gym.spaces.Box(0, 1, (64, 64, 3), np.float32))
    assert not is_picture(gym.spaces.Box(0, 10, (64, 64, 3), np.uint8))
    assert not is_picture(gym.spaces.Discrete(4))


@pytest.mark.parametrize("key", [None, "image"])
def test_the_observation_goes_before_render(key):
    picture = np.full((32, 32, 3), 70, np.uint8)
    box = gym.spaces.Box(0, 255, (32, 32, 3), np.uint8)
    env = Screen(observation_space=gym.spaces.Dict({key: box}) if key else box)
    env.observe = lambda: {key: picture} if key else picture
    assert VLMObservation(env).reset()[0]["image"].shape == (32, 32, 3)
    assert VLMObservation(env, image_source="observation").reset()[0]["image"].shape == (32, 32, 3)
    assert VLMObservation(env, image_source="render").reset()[0]["image"].shape == (16, 20, 3)


def test_frames_are_fresh_although_the_environment_draws_over_its_own():
    env = VLMObservation(Screen())
    frames = [env.reset()[0]["image"]] + [env.step(0)[0]["image"] for _ in range(3)]
    assert [frame[0, 0, 0] for frame in frames] == [0, 1, 2, 3]
    assert all(frame.flags.c_contiguous and frame.flags.owndata for frame in frames)


def test_grey_pictures_fill_three_channels():
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for picture in (grey, grey[:, :, None]):
        assert np.array_equal(as_frame(picture), np.stack([grey] * 3, axis=2))


@pytest.mark.parametrize(
    ("picture", "says"),
    [
        (None, "a NoneType as its image"),
        ([np.zeros((16, 20, 3), np.uint8)], "a list as its image"),
        (np.zeros((16, 20, 3), np.float64), "an array of float64"),
        (np.zeros((16, 20, 4), np.uint8), r"an image of shape \(16, 20, 4\), expected \(H, W, 3\)"),
        (np.zeros((0, 20, 3), np.uint8), r"an image of shape \(0, 20, 3\)"),
    ],
)
def test_a_render_that_gives_no_frame(picture, says):
    env = Screen()
    env.render = lambda: picture
    with pytest.raises(envs.EnvError, match=rf"^Screen gave {says}.*, from render\(\) \(unseeded episode, step 0\)$"):
        VLMObservation(env)


def test_frames_keep_one_size():
    inner = Screen()
    env = VLMObservation(inner)
    env.reset(seed=5)
    env.step(0)
    inner.canvas = np.zeros((16, 24, 3), np.uint8)
    with pytest.raises(
        envs.EnvError,
        match=r"shape \(16, 24, 3\) after frames of shape \(16, 20, 3\).*\(episode seed 5, step 2, action 'two'\)",
    ):
        env.step(1)


def test_nothing_to_see():
    with pytest.raises(envs.EnvError, match="no picture to show: .*render mode is None"):
        VLMObservation(Screen(render_mode=None))
    with pytest.raises(envs.EnvError, match="asked for the image in its observation"):
        VLMObservation(Screen(), image_source="observation")
    with pytest.raises(envs.EnvError, match="image_source is 'screen', expected one of auto, observation, render"):
        VLMObservation(Screen(), image_source="screen")


# The instruction


def test_instruction_order(monkeypatch):
    """Each source is taken away in turn, and the next one speaks."""
    monkeypatch.setitem(envs.TASKS, "Screen", envs.Task("from the table", None))
    inner = Screen(mission="attribute mission", instruction="attribute instruction")
    inner.observation_space = gym.spaces.Dict()
    said = {"mission": "key mission", "instruction": "key instruction"}
    inner.observe = lambda: dict(said)

    def read(argument=None):
        env = VLMObservation(inner, instruction=argument)
        return env.reset()[0]["instruction"], env.instruction_from

    assert read("argument") == ("argument", "the instruction argument")
    assert read() == ("key mission", "observation['mission']")
    del said["mission"]
    assert read() == ("key instruction", "observation['instruction']")
    del said["instruction"]
    assert read() == ("attribute mission", "the 'mission' attribute")
    inner.mission = None
    assert read() == ("attribute instruction", "the 'instruction' attribute")
    inner.instruction = None
    assert read() == ("from the table", "the task description")
    monkeypatch.delitem(envs.TASKS, "Screen")
    with pytest.raises(envs.EnvError, match="Screen says nowhere what to do: give an instruction on the command line"):
        read()


def test_an_instruction_attribute_is_read_again_at_every_step():
    inner = Screen()
    env = VLMObservation(inner)
    seen = [env.reset()[0]["instruction"]]
    for text in ("two to go", "one to go"):
        inner.instruction = text
        seen.append(env.step(0)[0]["instruction"])
    inner.instruction = "again"
    seen.append(env.reset()[0]["instruction"])
    assert seen == ["count", "two to go", "one to go", "again"]


def test_control_characters_of_an_instruction_are_written_out_and_nothing_is_lost():
    env = VLMObservation(Screen(instruction="red\x00 \x1b[31mball\x7f\ud800\r\n\tärger 眼 🟥"))
    observation, _ = env.reset()
    assert observation["instruction"] == "red\\x00 \\x1b[31mball\\x7f\\ud800\r\n\tärger 眼 🟥"
    assert env.observation_space.contains(observation)


def test_frozen_lakes_own_map_keeps_the_place_of_the_player():
    """Gymnasium marks the player's cell by an escape sequence for terminals."""
    lake = gym.make("FrozenLake-v1", render_mode="ansi", is_slippery=False)
    lake.reset(seed=0)
    maps = [lake.render()]
    for action in (1, 1):
        lake.step(action)
        maps.append(lake.render().split("\n", 1)[1])
    read = [VLMObservation(Screen(instruction=text)).reset()[0]["instruction"] for text in maps]
    assert len(set(read)) == 3 and all("\\x1b[41m" in text for text in read)


def test_no_two_texts_are_written_alike():
    """All texts of up to six of these pieces, some of which look like what control characters are written as."""
    pieces = ["\x1b", "\\", "x1b", "\ud800", "ud800", "a"]
    texts = {"".join(chosen) for size in range(6) for chosen in itertools.product(pieces, repeat=size)}
    written = {written_out(text) for text in texts}
    assert len(written) == len(texts) > 5_000
    assert not any(holds_control_characters(text) for text in written)
    assert written_out("C:\\new\\table") == "C:\\new\\table"


def test_instruction_space():
    space = InstructionText(seed=0)
    assert all(space.contains(text) for text in ("", "go\nto", "眼 🟥 « é »", "x" * 65_536))
    assert not any(space.contains(text) for text in ("a\x00b", "x" * 65_537, 3, None, b"go"))
    assert all(space.contains(space.sample()) for _ in range(50))
    assert space == InstructionText() and space != gym.spaces.Text(4)


def test_an_instruction_that_is_no_text():
    inner = Screen(instruction=7)
    with pytest.raises(envs.EnvError, match="gave 7 as the instruction from the 'instruction' attribute"):
        VLMObservation(inner)
    inner.instruction = "x" * 65_537
    with pytest.raises(envs.EnvError, match="65537 characters, expected at most 65536"):
        VLMObservation(inner)


# The actions


def test_action_name_order(monkeypatch):
    """Each source is taken away in turn, and the next one speaks."""
    monkeypatch.setitem(envs.TASKS, "Screen", envs.Task("x", ("t0", "t1")))
    inner = Screen(
        get_action_meanings=lambda: ["M0", "M1"],
        actions=enum.IntEnum("actions", {"e1": 1, "e0": 0}),
        action_names=["a0 ", "a1"],
    )

    def names(argument=None):
        env = VLMObservation(inner, action_names=argument)
        return env.action_names, env.action_names_from

    assert names(["c0", "c1"]) == (("c0", "c1"), "the action_names argument")
    assert names() == (("a0", "a1"), "the 'action_names' attribute")
    inner.action_names = None
    assert names() == (("M0", "M1"), "get_action_meanings()")
    del inner.get_action_meanings
    assert names() == (("e0", "e1"), "the 'actions' enum")
    del inner.actions
    assert names() == (("t0", "t1"), "the task description")
    monkeypatch.delitem(envs.TASKS, "Screen")
    with pytest.raises(envs.EnvError, match="Screen does not name its 2 actions: give them on the command line"):
        names()


class Says(gym.Wrapper):
    """A wrapper with words of its own."""

    def __init__(self, env, **words):
        super().__init__(env)
        for name, value in words.items():
            setattr(self, name, value)


def test_a_wrappers_own_words_go_before_those_below_it():
    inner = Screen(mission="below", action_names=["a0", "a1"], caption=lambda: "below", expert_action=lambda: 0)
    inner.observe, inner.observation_space = lambda: {"mission": "key below"}, gym.spaces.Dict()
    middle = Says(inner, mission="middle", action_names=["m0", "m1"], caption=lambda: "middle")
    outer = Says(middle, instruction="outer", expert_action=lambda: 1, alternative_instruction=lambda: "another")
    env = VLMObservation(gym.wrappers.OrderEnforcing(outer))
    assert env.reset()[0]["instruction"] == "outer" and env.instruction_from == "Says's 'instruction' attribute"
    assert env.action_names == ("m0", "m1") and env.caption() == "middle" and env.expert()(None) == 1
    assert env.alternative_instruction() == "another"
    outer.instruction = "outer, changed"
    assert env.step(0)[0]["instruction"] == "outer, changed"
    env = VLMObservation(Says(inner))
    assert env.reset()[0]["instruction"] == "key below" and env.action_names == ("a0", "a1")


def test_a_wrapper_that_hands_everything_on_says_nothing_of_its_own():
    class HandsOn(Says):
        def __getattr__(self, name):
            return getattr(self.env, name)

    inner = Screen(mission="below", action_names=["a0", "a1"], expert_action=lambda: 0)
    inner.observe, inner.observation_space = lambda: {"mission": "key below"}, gym.spaces.Dict()
    env = VLMObservation(HandsOn(inner))
    assert env.reset()[0]["instruction"] == "key below"
    fewer = gym.wrappers.TransformAction(inner, lambda action: 1, gym.spaces.Discrete(1))
    env = VLMObservation(Says(HandsOn(fewer), action_names=["only"]))
    env.reset()
    with pytest.raises(envs.EnvError, match="no expert for the actions"):
        env.expert()


def test_an_experts_actions_that_a_wrapper_changed_are_refused():
    inner = Screen(action_names=["a0", "a1"], expert_action=lambda: 0)
    fewer = gym.wrappers.TransformAction(inner, lambda action: 1, gym.spaces.Discrete(1))
    env = VLMObservation(Says(fewer, action_names=["only"]))
    env.reset()
    with pytest.raises(envs.EnvError, match=r"no expert for the actions Discrete\(1\): its own knows Discrete\(2\)"):
        env.expert()


def test_actions_that_start_elsewhere_are_numbered_from_0():
    inner = Screen(action_space=gym.spaces.Discrete(2, start=5))
    env = VLMObservation(inner)
    env.reset()
    assert env.action_space == gym.spaces.Discrete(2)
    env.step(0)
    env.step(np.int64(1))
    assert inner.played == [5, 6]
    with pytest.raises(envs.EnvError, match="got the action 2, expected 0 to 1"):
        env.step(2)


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"action_names": ("one",)}, "has 2 actions, and the 'action_names' attribute gives 1 names"),
        ({"action_names": ("one", "one ")}, "a name of its own"),
        ({"action_names": ("one", "\n")}, "a name of its own that is not empty"),
        ({"action_names": "ab"}, "expected a sequence of 2 strings"),
        ({"action_names": (1, 2)}, "expected a sequence of 2 strings"),
        (
            {"action_names": None, "actions": enum.IntEnum("actions", {"a": 1, "b": 2})},
            r"values \[1, 2\], and its action space runs from 0 to 1",
        ),
        ({"action_space": gym.spaces.Box(-np.inf, 1, (2,))}, "expected finite bounds"),
        (
            {"action_space": gym.spaces.Tuple([gym.spaces.Discrete(2)])},
            "only Discrete, MultiDiscrete, MultiBinary, bounded Box and",
        ),
    ],
)
def test_actions_that_cannot_be_named(attributes, says):
    with pytest.raises(envs.EnvError, match=says):
        VLMObservation(Screen(**attributes))


# Rewards, exceptions, success


@pytest.mark.parametrize("reward", [float("nan"), float("inf"), np.float32("nan")])
def test_a_reward_that_is_no_number(reward):
    env = VLMObservation(Screen(reward=reward))
    env.reset(seed=11)
    with pytest.raises(envs.EnvError, match=r"^Screen gave the reward .*\(episode seed 11, step 1, action 'one'\)$"):
        env.step(0)


@pytest.mark.parametrize("method", ["reset", "step", "render", "close"])
def test_what_an_environment_raises_names_its_place(method):
    inner = Screen()
    env = VLMObservation(inner)
    env.reset(seed=3)

    def broken(*args, **kwargs):
        raise KeyError("lost")

    setattr(inner, method, broken)
    calls = {"reset": lambda: env.reset(seed=3), "close": env.close}
    with pytest.raises(
        envs.EnvError, match=rf"Screen broke in .*{method}\(\) with KeyError: 'lost' \(episode seed 3"
    ) as caught:
        calls.get(method, lambda: env.step(1))()
    assert isinstance(caught.value.__cause__, KeyError)


def test_what_breaks_while_it_is_read_names_its_place():
    said = {"image": np.zeros((32, 32, 3), np.uint8), "mission": "look"}
    space = gym.spaces.Dict(image=gym.spaces.Box(0, 255, (32, 32, 3), np.uint8))
    inner = Screen(observation_space=space, alternative_instruction=lambda: 1 / 0)
    inner.observe = lambda: dict(said)
    env = VLMObservation(inner)
    env.reset(seed=3)
    with pytest.raises(envs.EnvError, match=r"broke in alternative_instruction\(\) with ZeroDivisionError"):
        env.alternative_instruction()
    del said["mission"]
    with pytest.raises(envs.EnvError, match=r"its instruction from observation\['mission'\] with KeyError.*step 1"):
        env.step(0)
    del said["image"]
    with pytest.raises(envs.EnvError, match=r"outside its observation_space: it lacks 'image'.*step 2"):
        env.step(0)


@pytest.mark.parametrize(
    ("task", "threshold", "argument", "episode", "expected"),
    [
        # episode: return, terminated, info
        (None, None, None, (0.1, True, {}), None),  # nobody says it
        (None, None, None, (-20.0, False, {}), None),
        (None, None, None, (5.0, True, {"success": None}), None),
        (envs.Task("go", ("left",)), None, None, (1.0, True, {}), None),
        (None, None, None, (5.0, True, {"success": False}), False),
        (None, None, None, (-5.0, True, {"success": np.True_}), True),
        (None, None, None, (5.0, True, {"success": True, "is_success": False}), False),
        (None, 3.0, None, (2.9, True, {}), False),
        (None, 3.0, None, (3.0, False, {}), True),
        (envs.Task("", None, 9.0), 3.0, None, (5.0, True, {}), False),
        (envs.Task("", None, None, True), 3.0, None, (-5.0, True, {}), True),
        (envs.Task("", None, None, True), 3.0, None, (5.0, False, {}), False),
        (envs.Task("", None, -99.0, True), None, None, (-13.0, True, {}), True),
        (envs.Task("", None, -99.0, True), None, None, (-113.0, True, {}), False),
        (envs.Task("", None, -99.0, True), None, None, (-13.0, False, {}), False),
        (envs.Task("", None, None, True), None, 4.0, (4.0, False, {"success": False}), True),
        (None, None, 4.0, (3.0, True, {"success": True}), False),
    ],
)
def test_success(task, threshold, argument, episode, expected):
    assert success_rule(task, threshold, argument)(*episode) is expected


def test_success_is_said_in_words():
    assert success_rule(None, None, None).sentence.endswith("(--success_return defines it)")
    assert success_rule(None, None, 2).sentence == "the episode's return is at least 2"
    env = envs.make_vlm_env("manako/GoTo-v0", success_return=1.5)
    assert env.success_return == 1.5
    pytest.importorskip("pygame")
    assert envs.make_vlm_env("CartPole-v1").success_return == 475
    assert "terminates by itself with a return of at least -99" in envs.make_vlm_env("CliffWalking-v1").success.sentence


# From an id to an environment

PLUGIN = """
import gymnasium as gym
import numpy as np

class Lamp(gym.Env):
    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gym.spaces.Discrete(2)
    action_space = gym.spaces.Discrete(2)
    instruction, action_names = "switch the lamp on", ("leave", "switch")
    def __init__(self, bright=255, render_mode=None):
        if not 0 < bright < 256:
            raise ValueError(f"bright is {bright}")
        self.bright, self.render_mode, self.on = bright, render_mode, 0
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.on = 0
        return 0, {}
    def step(self, action):
        self.on = int(action)
        return self.on, float(self.on), bool(self.on), False, {}
    def render(self):
        frame = np.zeros((16, 16, 3), np.uint8)
        frame[4:12, 4:12] = self.bright if self.on else 40
        return frame

gym.register("Lamp-v0", Lamp, max_episode_steps=5)
"""


@pytest.fixture
def plugin_folder(tmp_path, monkeypatch):
    """A folder outside the project with a plugin, and the current one; what it changes is undone."""
    (tmp_path / "lamp_plugin.py").write_text(PLUGIN)
    (tmp_path / "torn_plugin.py").write_text("1 / 0")
    (tmp_path / "hungry_plugin.py").write_text("import a_module_that_is_not_there")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    registered = set(gym.registry)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.endswith("_plugin"):
            del sys.modules[name]
    for name in set(gym.registry) - registered:
        del gym.registry[name]


def test_a_plugin_from_the_current_folder(plugin_folder):
    env = envs.make_vlm_env("lamp_plugin:Lamp-v0", env_kwargs={"bright": 200, "max_episode_steps": 2})
    dark = env.reset(seed=0)[0]
    assert dark["instruction"] == "switch the lamp on" and env.action_names == ("leave", "switch")
    assert env.step(0)[3] is False and env.step(0)[3] is True  # truncated
    env.reset(seed=0)
    lit, reward, terminated, _, _ = env.step(1)
    assert (reward, terminated, lit["image"].max()) == (1.0, True, 200)


def test_a_plugin_in_a_process_that_starts_in_its_folder(tmp_path):
    (tmp_path / "lamp_plugin.py").write_text(PLUGIN)
    code = (
        f"import sys; sys.path[:] = [p for p in sys.path if p not in ('', {str(tmp_path)!r})]; "
        "from manako import envs; print(envs.make_vlm_env('lamp_plugin:Lamp-v0').action_names)"
    )
    assert run_python(code, cwd=tmp_path) == "('leave', 'switch')\n"


@pytest.mark.parametrize(
    ("env_id", "env_kwargs", "says"),
    [
        ("FrozenLake-v9", {}, "no environment 'FrozenLake-v9' in Gymnasium's registry: did you mean FrozenLake-v1"),
        ("manako/Goto-v0", {}, "did you mean manako/GoTo-v0"),
        ("qqq", {}, "a plugin's id is written module:EnvId-v0"),
        ("", {}, "no environment ''"),
        (
            "lamp_plugin:Lamp-v1",
            {},
            r"no environment 'Lamp-v1' in the module 'lamp_plugin' \(.*lamp_plugin.py\): .*Lamp-v0",
        ),
        ("no_such_plugin:Lamp-v0", {}, "there is no module 'no_such_plugin' in .* or among the installed packages"),
        ("no_such.plugin:Lamp-v0", {}, "there is no module 'no_such.plugin'"),
        ("hungry_plugin:Lamp-v0", {}, "needs the module 'a_module_that_is_not_there', which is not installed"),
        ("torn_plugin:Lamp-v0", {}, "'torn_plugin' broke while it was imported: ZeroDivisionError: division by zero"),
        ("lamp_plugin:Lamp-v0", {"bulbs": 2}, "Lamp-v0 takes no argument 'bulbs': got env_kwargs {'bulbs': 2}"),
        ("lamp_plugin:Lamp-v0", {"bright": 0}, "with env_kwargs {'bright': 0}: ValueError: bright is 0"),
        ("lamp_plugin:Lamp-v0", {"render_mode": "human"}, "has a render_mode, which is always rgb_array here"),
        ("GymV21Environment-v0", {}, "GymV21Environment-v0 needs a package|GymV21Environment-v0 could not be made"),
    ],
)
def test_what_cannot_be_made(plugin_folder, env_id, env_kwargs, says):
    with pytest.raises(envs.EnvError, match=says) as caught:
        envs.make_vlm_env(env_id, env_kwargs=env_kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("env_id", "package", "extra"),
    [
        ("MiniGrid-Empty-5x5-v0", "minigrid", "minigrid"),
        ("BabyAI-GoToObj-v0", "minigrid", "minigrid"),
        ("ALE/Pong-v5", "ale_py", "atari"),
        ("FrozenLake-v1", "pygame", "toy"),
        ("CartPole-v1", "pygame", "toy"),
    ],
)
def test_a_missing_extra_is_named(monkeypatch, env_id, package, extra):
    for name in list(sys.modules):
        if name.split(".")[0] == package:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails, as if it were not installed
    with pytest.raises(envs.EnvError, match=rf'pip install "manako\[{extra}\]"'):
        envs.make_vlm_env(env_id)


def test_render_mode_goes_only_to_those_who_take_it(plugin_folder):
    class Mute(Screen):
        metadata = {"render_modes": []}
        render_mode = None

        def __init__(self):
            super().__init__(observation_space=gym.spaces.Box(0, 255, (32, 32), np.uint8))

        def observe(self):
            return np.full((32, 32), self.steps, np.uint8)

    class Moody(Screen):
        @property
        def actions(self):
            raise LookupError("not\ntoday")

    class Blind(Screen):
        metadata = {"render_modes": ["ansi"]}
        render_mode = None

    class Deaf(Screen):
        def __init__(self):
            super().__init__()

    gym.register("Mute-v0", Mute)
    gym.register("MuteFunction-v0", lambda: Mute())
    gym.register("Moody-v0", lambda: Moody())
    gym.register("Blind-v0", Blind)
    gym.register("Deaf-v0", Deaf)
    gym.register("Function-v0", lambda render_mode: Screen(render_mode=render_mode))
    assert envs.make_vlm_env("Mute-v0").image_from == "observation"
    assert envs.make_vlm_env("MuteFunction-v0").image_from == "observation"
    assert envs.make_vlm_env("Function-v0").image_from == "render()"
    with pytest.raises(envs.EnvError, match="Moody-v0 broke while .*: LookupError: not today"):
        envs.make_vlm_env("Moody-v0")
    with pytest.raises(envs.EnvError, match="Blind-v0 has no picture to show"):
        envs.make_vlm_env("Blind-v0")
    with pytest.raises(envs.EnvError, match="Deaf-v0 declares the render mode 'rgb_array', .* takes no render_mode"):
        envs.make_vlm_env("Deaf-v0")


@pytest.mark.parametrize(
    ("env_id", "won", "lost"),  # returns
    [
        ("MiniGrid-Empty-5x5-v0", 0.1 - 1e-9, 0.0),  # 1 - 0.9 at the limit of steps
        ("BabyAI-GoToRedBall-v0", 0.955, 0.0),
        ("MiniGrid-Dynamic-Obstacles-5x5-v0", 0.5, -1.0),
        ("FrozenLake-v1", 1.0, 0.0),
        ("Blackjack-v1", 1.5, 0.0),
        ("CartPole-v1", 500.0, 22.0),
    ],
)
def test_a_task_description_says_what_a_success_is(env_id, won, lost):
    rule = success_rule(task_of(env_id), None, None)
    assert rule(won, True, {}) is True and rule(lost, True, {}) is False


@pytest.mark.parametrize("env_id", ["ALE/Pong-v5", "Mine-v0", "Pendulum-v1"])
def test_an_id_of_which_nobody_says_it(env_id):
    assert success_rule(task_of(env_id), None, None)(21.0, True, {}) is None
