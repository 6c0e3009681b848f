"""Action vectors: every kind of space laid flat and given back, bounds, names, faults with their place."""

import functools
import json

import gymnasium as gym
import numpy as np
import pytest

from manako.envs import EnvError, EpisodeVectorEnv, check_vlm_env, held_out_seeds, make_vlm_env
from manako.envs.action_vectors import FlatActions
from manako.envs.check import measure_speed
from manako.envs.observation import VLMObservation
from manako.spaces import (
    actions_in_words,
    random_vectors,
    shares,
    space_from_json,
    space_to_json,
)
from tests.envs.test_contract import Screen

Box, MultiDiscrete = gym.spaces.Box, gym.spaces.MultiDiscrete
SLIDE, PENDULUM = "manako/Slide-v0", "manako/Pendulum-v0"

SPACES = [  # the env's own, the flat one, a flat action, what the env is given
    (gym.spaces.Discrete(3, start=-1), gym.spaces.Discrete(3), 2, 1),
    (MultiDiscrete([3, 2], start=[1, -1]), MultiDiscrete([3, 2]), [2, 0], np.array([3, -1])),
    (MultiDiscrete([[3, 2], [4, 1]]), MultiDiscrete([3, 2, 4, 1]), [2, 1, 3, 0], np.array([[2, 1], [3, 0]])),
    (gym.spaces.MultiBinary(3), MultiDiscrete([2, 2, 2]), [1, 0, 1], np.array([1, 0, 1], np.int8)),
    (gym.spaces.MultiBinary([2, 1]), MultiDiscrete([2, 2]), [1, 0], np.array([[1], [0]], np.int8)),
    (Box(-1, 2, (2, 2), np.float32), Box(-1, 2, (4,), np.float32), [-1, 2, 0, 1], np.float32([[-1, 2], [0, 1]])),
    (Box(-2, 5, (2,), np.int16), MultiDiscrete([8, 8]), [0, 7], np.array([-2, 5], np.int16)),
]


@pytest.mark.parametrize(("own", "flat", "action", "given"), SPACES)
def test_each_kind_of_space_is_laid_flat_and_back(own, flat, action, given):
    actions = FlatActions(own, "Env-v0")
    assert actions.space == flat
    made = actions.to_env(np.array(action) if np.ndim(action) else action)
    assert np.array_equal(made, given) and own.contains(made)
    assert np.array_equal(actions.from_env(made), action)
    if np.ndim(given):
        assert made.dtype == own.dtype


def test_bounds_survive_the_way_through_float32():
    own = Box(np.array([-0.1, 1 / 3]), np.array([0.1, 0.7]), dtype=np.float64)
    actions = FlatActions(own, "Env-v0")
    for end in (actions.space.low, actions.space.high):
        assert own.contains(actions.to_env(end))  # float32(0.1) is more than 0.1


@pytest.mark.parametrize(
    ("space", "says"),
    [
        (Box(-np.inf, np.inf, (2,)), "entry 0 goes from -inf to inf: expected finite bounds"),
        (Box(np.float32([0, 0]), np.float32([1, np.inf])), "entry 1 goes from 0 to inf: expected finite bounds"),
        (Box(-3e38, 3e38, (1,)), "expected finite bounds"),
        (gym.spaces.Dict(a=gym.spaces.Discrete(2)), "only Discrete, MultiDiscrete, MultiBinary, bounded Box and Text"),
        (Box(0, 10_000, (2,), np.int32), "with up to 10,001 values an entry: expected 256 at most"),
        (Box(np.zeros(0, np.float32), np.ones(0, np.float32)), "without a number in it"),
    ],
)
def test_what_cannot_be_said_in_bins(space, says):
    with pytest.raises(EnvError) as error:
        FlatActions(space, "Env-v0")
    assert str(error.value).startswith("Env-v0 ") and says in str(error.value)


def test_bounds_that_are_not_numbers_or_the_wrong_way_round():
    space = Box(-1, 1, (2,), np.float32)
    space.low, space.high = np.float32([np.nan, 0]), np.float32([1, 1])
    with pytest.raises(EnvError, match="entry 0 goes from nan to 1"):
        FlatActions(space, "Env-v0")
    space.low = np.float32([0, 2])
    with pytest.raises(EnvError, match="entry 1 goes from 2 to 1"):
        FlatActions(space, "Env-v0")


class Vectors(Screen):
    action_space = Box(np.float32([[-1, 0]]), np.float32([[1, 2]]))
    action_names = ("turn", "push")


def test_the_env_is_given_its_own_shape_and_what_does_not_fit_is_refused():
    env = VLMObservation(Vectors())
    env.reset(seed=3)
    env.step(np.float32([0.5, 2]))
    assert np.array_equal(env.unwrapped.played[-1], np.float32([[0.5, 2]]))
    for wrong in ([0.5, 2.1], [np.nan, 0], [0.0], [[0.5, 1.0]]):
        with pytest.raises(EnvError, match=r"got the action .*not in Box.*\(episode seed 3, step \d, action \["):
            env.step(np.array(wrong, np.float32))
    one, other = VLMObservation(Vectors(action_names=None)), VLMObservation(Vectors(), action_names=["a", "b"])
    assert (one.action_names, one.action_names_from) == (("action 1", "action 2"), "their numbers")
    assert other.action_names == ("a", "b")
    with pytest.raises(EnvError, match="has 2 actions, and the 'action_names' attribute gives 1 names"):
        VLMObservation(Vectors(action_names=("turn",)))


def test_a_task_with_the_names_of_another_form_says_nothing():
    from manako.envs.tasks import TASKS

    assert len(TASKS["LunarLander-v3"].action_names) == 4
    env = Vectors(action_names=None, spec=gym.envs.registration.EnvSpec("LunarLander-v3", lambda: None))
    assert VLMObservation(env).action_names == ("action 1", "action 2")


def test_masks_are_for_single_choices():
    class Masked(Vectors):
        def reset(self, *, seed=None, options=None):
            return super().reset(seed=seed)[0], {"action_mask": np.ones(2, np.int8)}

    with pytest.raises(EnvError, match="can be obeyed where the action is one choice, and here it is a vector"):
        VLMObservation(Masked()).reset(seed=0)
    VLMObservation(Masked(), action_masks=False).reset(seed=0)


def test_an_expert_outside_the_space_is_a_fault():
    class Strong(Vectors):
        def expert_action(self):
            return np.float32([[5, 0]])

    env = VLMObservation(Strong())
    env.reset(seed=0)
    with pytest.raises(EnvError, match=r"has an expert that wants \[5, 0\], expected Box"):
        env.expert()(None)


@pytest.mark.parametrize("env_id", [SLIDE, PENDULUM])
def test_slots_play_vectors_and_are_brought_back_to_the_bit(env_id):
    env, other = (EpisodeVectorEnv(env_id, 3, seed=2) for _ in range(2))
    env.reset()
    generator = np.random.default_rng(0)
    for _ in range(4):
        actions = env.random_actions(lambda: generator.random(3))
        assert all(env.action_space.contains(action) for action in actions)
        result = env.step(actions)
        env.reset_done(result.terminated | result.truncated)
    other.load_state_dict(json.loads(json.dumps(env.state_dict())))
    assert other.given_up == 0 and other.digests == env.digests
    assert np.array_equal(other.expert_actions(), env.expert_actions())
    kind = "floats" if env_id == PENDULUM else "integers"
    size = env.action_space.shape[0]
    for wrong in (np.zeros(3), np.zeros((3, size + 1)), np.zeros((3, size), np.int64 if kind == "floats" else float)):
        with pytest.raises(EnvError, match=rf"got actions of shape .* expected \(3, {size}\) {kind}"):
            env.step(wrong)


def test_chance_covers_every_entry_evenly():
    generator = np.random.default_rng(0)
    counts = random_vectors(MultiDiscrete([3, 2]), lambda: generator.random(6000))
    assert np.allclose(np.bincount(counts[:, 0]) / 6000, 1 / 3, atol=0.03) and counts[:, 1].max() == 1
    space = Box(np.float32([-2, 5]), np.float32([2, 5]))
    numbers = random_vectors(space, lambda: generator.random(6000))
    assert numbers.dtype == np.float32 and all(map(space.contains, numbers[:50]))
    assert abs(numbers[:, 0].mean()) < 0.1 and numbers[:, 0].min() < -1.99 and (numbers[:, 1] == 5).all()
    assert shares(space, np.float32([[1, 5]])).tolist() == [[0.75, 0]]


@pytest.mark.parametrize("space", [MultiDiscrete([3, 2]), Box(np.float32([-1, 0.1]), np.float32([1, 7])), SPACES[0][1]])
def test_spaces_as_json(space):
    assert space_from_json(space_to_json(space)) == space
    with pytest.raises(ValueError, match="of kind 'Tuple'"):
        space_from_json({"kind": "Tuple"})


def test_spaces_in_words():
    words = actions_in_words(Box(np.float32([-1, 0]), np.float32([1, 2.5])), ("turn", "push"))
    assert words == "2 numbers: turn from -1 to 1, push from 0 to 2.5"
    assert actions_in_words(MultiDiscrete([3]), ("gear",)) == "1 whole numbers: gear from 0 to 2"
    assert actions_in_words(gym.spaces.Discrete(2), ("a", "b")) == "a, b"


@pytest.mark.parametrize("env_id", [SLIDE, PENDULUM])
def test_our_own_pass_the_check(env_id):
    assert check_vlm_env(env_id) == []
    assert measure_speed(make_vlm_env(env_id), seconds=0.05).steps_per_second > 0


def test_faults_of_vector_envs_are_found():
    gym.register("tests/NoVectors-v0", lambda render_mode=None: Vectors(action_space=Box(-np.inf, np.inf, (1,))))
    faults = check_vlm_env("tests/NoVectors-v0")
    del gym.registry["tests/NoVectors-v0"]
    assert any("expected finite bounds" in fault for fault in faults)


def test_pendulum_is_gymnasiums_with_another_picture():
    pytest.importorskip("pygame")
    ours, theirs = gym.make(PENDULUM), gym.make("Pendulum-v1")
    one, _ = ours.reset(seed=4)
    other, _ = theirs.reset(seed=4)
    assert np.array_equal(one, other)
    for number in range(200):
        action = np.float32([2 * np.sin(number)])
        left, right = ours.step(action), theirs.step(action)
        assert np.array_equal(left[0], right[0]) and left[1:4] == right[1:4]
    assert left[3]


def test_the_picture_of_a_pendulum_shows_angle_and_speed():
    env = make_vlm_env(PENDULUM).unwrapped
    env.reset(seed=0)

    def look(angle, speed):
        env.state = np.array([angle, speed])
        frame = env.render().astype(float)
        pole, bar = frame[:48, :, 0], frame[48:].sum((0, 2))
        down, across = np.argwhere(pole > 100).mean(0) - 23.5
        return across, -down, bar[:24].sum() - bar[24:].sum()

    across, up, turning = look(0, 0)
    assert abs(across) < 0.5 and up > 8 and turning == 0
    across, up, turning = look(np.pi / 2, 4)  # gymnasium draws a positive angle to the left
    assert across < -8 and abs(up) < 0.5 and turning > 0
    assert look(np.pi, -8)[1] < -8 and -look(0, -8)[2] > -look(0, -4)[2] * 1.5 > 0


def test_car_racing_is_driven_by_what_stands_ahead():
    pytest.importorskip("Box2D")
    env = EpisodeVectorEnv("CarRacing-v3", 1, env_kwargs={"max_episode_steps": 200})
    assert env.action_names == ("steering", "gas", "brake") and env.frame_shape == (96, 96, 3)
    env.reset(seeds=held_out_seeds(1))
    for _ in range(200):
        env.step(env.expert_actions())
    assert env.episode_returns[0] > 60  # by chance it is about -5


def test_the_experts_are_far_better_than_chance():
    for env_id, steps, expert, chance in ((SLIDE, 5, 0.7, 0.2), (PENDULUM, 200, -350, -900)):
        env = EpisodeVectorEnv(env_id, 16)
        found = []
        for scripted in (True, False):
            env.reset(seeds=held_out_seeds(16))
            draw = np.random.default_rng(0).random
            returns, going = np.zeros(16), np.ones(16, bool)
            for _ in range(steps):
                actions = env.expert_actions() if scripted else env.random_actions(functools.partial(draw, 16))
                result = env.step(actions)
                returns = np.where(going, env.episode_returns, returns)
                going &= ~(result.terminated | result.truncated)
                env.reset_done(result.terminated | result.truncated)
            found.append(returns.mean())
        assert found[0] > expert and found[1] < chance, env_id
