"""N slots of episodes: whose seeds they have, what they return where one ends, and how a run takes them up again."""

import itertools
import json

import gymnasium as gym
import numpy as np
import pytest

from manako import envs
from manako.envs import HELD_OUT, TRAINING, EpisodeVectorEnv, episode_seed, held_out_seeds, validation_seeds

GOTO = "manako/GoTo-v0"


class Walk(gym.Env):
    """A bright column that walks right; the episode ends after ``length`` steps, drawn from the seed.

    Its ``info`` holds an array of another shape at every step, which ``SyncVectorEnv`` alone cannot merge.
    """

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = gym.spaces.Discrete(1)
    action_space = gym.spaces.Discrete(2)
    action_names = ("walk", "trip")

    def __init__(self, render_mode=None, trap=False, forgetful=False, sizes=()):
        self.render_mode, self.trap, self.forgetful = render_mode, trap, forgetful
        self.width = sizes.pop() if sizes else 16
        self.mission = ""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0
        self.length = int(self.np_random.integers(2, 7))
        chance = np.random.default_rng() if self.forgetful else self.np_random
        self.color = chance.integers(50, 255, 3)
        self.mission = f"walk {self.length} steps"
        return 0, {}

    def step(self, action):
        if self.trap and action == 1:
            raise OSError("tripped")
        self.at += 1
        return 0, 0.5, self.at == self.length, False, {"trace": np.zeros(self.at)}

    def render(self):
        frame = np.zeros((16, self.width, 3), np.uint8)
        frame[:, self.at] = self.color
        return frame


@pytest.fixture(autouse=True)
def walk_is_registered():
    gym.register("Walk-v0", Walk)
    yield
    del gym.registry["Walk-v0"]


def play(vector, steps, seed=0):
    """Play random actions; return everything that was seen, as bytes and lists."""
    draw = np.random.default_rng(seed)
    trace = []
    for _ in range(steps):
        result = vector.step(draw.integers(0, len(vector.action_names), vector.num_envs))
        trace.append(
            (
                result.observations.images.tobytes(),
                result.observations.instructions,
                result.rewards.tolist(),
                result.terminated.tolist(),
                result.truncated.tolist(),
                result.success.tolist(),
                vector.episode_returns.tolist(),
                vector.episode_lengths.tolist(),
            )
        )
        ended = result.terminated | result.truncated
        if ended.any():
            after = vector.reset_done(ended)
            trace.append((after.images.tobytes(), after.instructions, list(vector.episode_seeds)))
    return trace


# Seeds


def test_episode_seeds_are_a_fixed_function():
    """A run of tomorrow plays the episodes of today."""
    assert episode_seed(0, TRAINING, 0, 0) == 1839233790
    assert episode_seed(7, HELD_OUT, 3, 12) == 874233361
    assert episode_seed(2**40, 5, 1, 0) == 1835862554


def test_episode_seeds_differ_in_every_argument_and_keep_held_out_apart():
    training = {episode_seed(s, TRAINING, k, e) for s in range(5) for k in range(10) for e in range(20)}
    held_out = {episode_seed(s, HELD_OUT, k, e) for s in range(5) for k in range(10) for e in range(20)}
    assert len(training) == len(held_out) == 1000
    assert all(seed % 2 == 0 for seed in training) and all(seed % 2 == 1 for seed in held_out)
    assert all(0 <= seed < 2**31 for seed in training | held_out)
    assert max(training) > 2**30


def test_validation_has_no_seed_of_training_or_of_the_test(monkeypatch):
    for seed in (0, 7):
        chosen = validation_seeds(2_000, seed)
        tests = held_out_seeds(envs.vector.TEST_SEEDS, seed)
        assert len(set(chosen)) == 2_000 and not set(chosen) & set(tests)
        assert all(each % 2 == 1 and each < 2**31 for each in chosen)  # those of training are even
        assert chosen[:5] == validation_seeds(5, seed)
    assert validation_seeds(5, 0) != validation_seeds(5, 1)
    # of 40 numbers that can be drawn 12 are the test's: chance alone would take them, and take some twice
    monkeypatch.setattr(envs.vector, "TEST_SEEDS", 12)
    monkeypatch.setattr(envs.vector, "episode_seed", lambda *key: int(np.random.default_rng(key).integers(40)))
    few = validation_seeds(25, 0)
    assert len(set(few)) == 25 and not set(few) & set(held_out_seeds(12, 0))


def test_slots_play_the_same_episodes_under_any_split():
    together = EpisodeVectorEnv(GOTO, 4, seed=5)
    apart = [EpisodeVectorEnv(GOTO, 2, seed=5, first_slot=first) for first in (0, 2)]
    together.reset()
    for part in apart:
        part.reset()
    draw = np.random.default_rng(0)
    for _ in range(60):
        actions = draw.integers(0, 4, 4)
        whole = together.step(actions)
        halves = [part.step(actions[2 * i : 2 * i + 2]) for i, part in enumerate(apart)]
        for i, half in enumerate(halves):
            rows = slice(2 * i, 2 * i + 2)
            assert np.array_equal(whole.observations.images[rows], half.observations.images)
            assert whole.observations.instructions[rows] == half.observations.instructions
            assert np.array_equal(whole.rewards[rows], half.rewards)
            ended = half.terminated | half.truncated
            if ended.any():
                apart[i].reset_done(ended)
        ended = whole.terminated | whole.truncated
        if ended.any():
            together.reset_done(ended)
    assert together.episode_seeds == apart[0].episode_seeds + apart[1].episode_seeds


def test_each_slot_walks_through_its_own_seeds():
    vector = EpisodeVectorEnv("manako/ColorMatch-v0", 3, seed=9, split=HELD_OUT, first_slot=4)
    vector.reset()
    for episode in range(5):
        assert vector.episode_seeds == [episode_seed(9, HELD_OUT, 4 + slot, episode) for slot in range(3)]
        alone = [
            envs.make_vlm_env("manako/ColorMatch-v0").reset(seed=seed)[0]["image"] for seed in vector.episode_seeds
        ]
        result = vector.step(np.zeros(3, np.int64))
        assert np.array_equal(result.observations.images, np.stack(alone))
        vector.reset_done(result.terminated)


def test_explicit_seeds_for_evaluation():
    vector = EpisodeVectorEnv(GOTO, 3)
    seen = vector.reset(seeds=[10, 11, 12])
    for slot, seed in enumerate((10, 11, 12)):
        assert np.array_equal(seen.images[slot], envs.make_vlm_env(GOTO).reset(seed=seed)[0]["image"])
    again = vector.reset_done(np.array([False, True, True]), seeds=[10, 13])
    assert vector.episode_seeds == [10, 10, 13]
    assert np.array_equal(again.images[1], seen.images[0])
    with pytest.raises(envs.EnvError, match="got 1 seeds for 2 episodes"):
        vector.reset_done(np.array([False, True, True]), seeds=[1])


# Episodes


def test_the_last_frame_is_returned_and_no_step_is_a_dummy():
    vector = EpisodeVectorEnv("Walk-v0", 4)
    seen = vector.reset()
    lengths = [int(text.split()[1]) for text in seen.instructions]
    at = np.zeros(4, int)
    finished = []
    for _ in range(40):
        result = vector.step(np.zeros(4, np.int64))
        at += 1
        bright = [int(np.flatnonzero(image[0].any(axis=1))[0]) for image in result.observations.images]
        assert bright == at.tolist()  # the frame after this very step, the last one included
        assert result.rewards.tolist() == [0.5] * 4
        assert result.terminated.tolist() == [a == n for a, n in zip(at, lengths, strict=True)]
        assert vector.episode_lengths.tolist() == at.tolist()
        assert vector.episode_returns.tolist() == (at * 0.5).tolist()
        if result.terminated.any():
            finished += [lengths[slot] for slot in np.flatnonzero(result.terminated)]
            after = vector.reset_done(result.terminated)
            for slot in range(4):
                if result.terminated[slot]:
                    at[slot], lengths[slot] = 0, int(after.instructions[slot].split()[1])
                    assert after.images[slot][0, 0].any()
                else:
                    assert np.array_equal(after.images[slot], result.observations.images[slot])
                    assert after.instructions[slot] == result.observations.instructions[slot]
            assert vector.episode_lengths.tolist() == at.tolist()
            assert vector.episode_returns.tolist() == (at * 0.5).tolist()
    assert sum(finished) + at.sum() == 4 * 40


def test_returned_arrays_are_never_written_again():
    vector = EpisodeVectorEnv(GOTO, 3)
    draw = np.random.default_rng(0)
    kept = [vector.reset()]
    rewards = []
    for _ in range(20):
        result = vector.step(draw.integers(0, 4, 3))
        kept.append(result.observations)
        rewards.append((result.rewards, vector.episode_returns))
        ended = result.terminated | result.truncated
        if ended.any():
            kept.append(vector.reset_done(ended))
        if len(kept) < 6:
            copies = [seen.images.copy() for seen in kept]
            numbers = [(a.copy(), b.copy()) for a, b in rewards]
    for seen, copy in zip(kept, copies, strict=False):
        assert np.array_equal(seen.images, copy)
    for pair, copy in zip(rewards, numbers, strict=False):
        assert np.array_equal(pair, copy)
    assert len({seen.images.__array_interface__["data"][0] for seen in kept}) == len(kept)


def test_success_is_judged_where_an_episode_ends():
    vector = EpisodeVectorEnv("manako/ColorMatch-v0", 8)
    vector.reset()
    assert vector.success_rule == envs.make_vlm_env("manako/ColorMatch-v0").success.sentence
    wins = 0
    for _ in range(10):
        result = vector.step(np.zeros(8, np.int64))
        assert result.success.tolist() == (result.rewards > 0).tolist()
        wins += result.success.sum()
        vector.reset_done(result.terminated)
    assert 0 < wins < 80
    lenient = EpisodeVectorEnv("Walk-v0", 2, success_return=2.0)  # half a point a step
    seen = lenient.reset()
    judged = {}
    for _ in range(30):
        result = lenient.step(np.zeros(2, np.int64))
        for slot in np.flatnonzero(result.terminated):
            judged[int(seen.instructions[slot].split()[1])] = bool(result.success[slot])
        assert not result.success[~result.terminated].any()
        if result.terminated.any():
            seen = lenient.reset_done(result.terminated)
    assert judged == {length: length >= 4 for length in judged} and len(judged) >= 3


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "MiniGrid-Empty-5x5-v0", "ALE/Pong-v5"])
def test_environments_of_others_in_slots(env_id):
    pytest.importorskip({"F": "pygame", "M": "minigrid", "A": "ale_py"}[env_id[0]])
    traces = []
    for _ in range(2):
        vector = EpisodeVectorEnv(env_id, 2, seed=1)
        vector.reset()
        traces.append(play(vector, 12))
        vector.close()
        vector.close()
    assert traces[0] == traces[1]


# Faults


def test_a_fault_names_its_place():
    vector = EpisodeVectorEnv("Walk-v0", 3, first_slot=6, env_kwargs={"trap": True})
    vector.reset(seeds=[20, 21, 22])
    vector.step(np.array([0, 0, 0]))
    with pytest.raises(
        envs.EnvError,
        match=r"^Walk-v0 broke in step\(\) with OSError: tripped \(slot 7, episode seed 21, step 2, action 'trip'\)$",
    ) as caught:
        vector.step(np.array([0, 1, 0]))
    assert isinstance(caught.value.__cause__, OSError)


def test_misuse_is_refused():
    vector = EpisodeVectorEnv("manako/ColorMatch-v0", 2)
    with pytest.raises(envs.EnvError, match="call reset first"):
        vector.step(np.zeros(2, np.int64))
    with pytest.raises(envs.EnvError, match="call reset first"):
        vector.reset_done(np.array([True, False]))
    with pytest.raises(envs.EnvError, match="before reset"):
        vector.replaced_instructions()
    vector.reset()
    with pytest.raises(envs.EnvError, match=r"actions of shape \(3,\) and dtype int64, expected \(2,\) integers"):
        vector.step(np.zeros(3, np.int64))
    with pytest.raises(envs.EnvError, match="dtype float64, expected"):
        vector.step(np.zeros(2))
    with pytest.raises(envs.EnvError, match=r"got the action 4, expected 0 to 3 \(slot 1"):
        vector.step(np.array([0, 4]))
    vector.reset()
    vector.step(np.zeros(2, np.int64))
    with pytest.raises(envs.EnvError, match=r"slots \[0, 1\] have ended: call reset_done before the next step"):
        vector.step(np.zeros(2, np.int64))
    with pytest.raises(envs.EnvError, match=r"mask of shape \(2,\) and dtype int64"):
        vector.reset_done(np.array([1, 0]))
    unchanged = vector.reset_done(np.zeros(2, bool))
    assert unchanged.images.shape == (2, 24, 24, 3)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"num_envs": 0}, "num_envs is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"first_slot": -1}, "first_slot is -1"),
        ({"env_id": "manako/Goto-v0"}, "did you mean manako/GoTo-v0"),
        ({"action_names": ["a", "b"]}, "has 4 actions"),
    ],
)
def test_what_cannot_be_built(kwargs, says):
    with pytest.raises(envs.EnvError, match=says):
        EpisodeVectorEnv(**{"env_id": GOTO, "num_envs": 2, **kwargs})


def test_frames_of_several_sizes_cannot_share_an_array():
    gym.register("Uneven-v0", lambda render_mode, sizes=[16, 20]: Walk(render_mode, sizes=sizes))
    try:
        with pytest.raises(
            envs.EnvError, match=r"differ \(frames of \(16, 16, 3\), 2 actions; frames of \(16, 20, 3\), 2 actions\)"
        ):
            EpisodeVectorEnv("Uneven-v0", 2)
    finally:
        del gym.registry["Uneven-v0"]


# State


@pytest.mark.parametrize("env_id", [GOTO, "Walk-v0", "FrozenLake-v1"])
def test_a_state_takes_up_every_slot_in_mid_episode(env_id):
    if env_id == "FrozenLake-v1":
        pytest.importorskip("pygame")
    original = EpisodeVectorEnv(env_id, 3, seed=2)
    original.reset()
    play(original, 7)
    state = json.loads(json.dumps(original.state_dict()))
    assert len({len(slot["actions"]) for slot in state["slots"]}) > 1
    resumed = EpisodeVectorEnv(env_id, 3, seed=2)
    seen = resumed.load_state_dict(state)
    assert np.array_equal(seen.images, original.observations.images)
    assert seen.instructions == original.observations.instructions
    assert resumed.episode_returns.tolist() == original.episode_returns.tolist()
    assert resumed.state_dict() == original.state_dict()
    assert resumed.replaced_instructions() == original.replaced_instructions()
    assert play(resumed, 15, seed=1) == play(original, 15, seed=1)
    # A used object goes back just as well.
    again = resumed.load_state_dict(state)
    assert np.array_equal(again.images, seen.images)


def test_a_state_between_an_end_and_the_restart():
    original = EpisodeVectorEnv("Walk-v0", 3, seed=2)
    original.reset()
    result = original.step(np.zeros(3, np.int64))
    while not result.terminated.any():
        result = original.step(np.zeros(3, np.int64))
    assert not result.terminated.all()
    resumed = EpisodeVectorEnv("Walk-v0", 3, seed=2)
    resumed.load_state_dict(original.state_dict())
    with pytest.raises(envs.EnvError, match="have ended"):
        resumed.step(np.zeros(3, np.int64))
    one, other = original.reset_done(result.terminated), resumed.reset_done(result.terminated)
    assert np.array_equal(one.images, other.images) and one.instructions == other.instructions
    assert play(resumed, 10) == play(original, 10)


def test_success_survives_a_resume():
    """The return that decides it began before the save."""
    steps = int(envs.make_vlm_env("Walk-v0").reset(seed=4)[0]["instruction"].split()[1])
    original = EpisodeVectorEnv("Walk-v0", 1, success_return=0.5 * steps)
    original.reset(seeds=[4])
    original.step(np.zeros(1, np.int64))
    resumed = EpisodeVectorEnv("Walk-v0", 1, success_return=0.5 * steps)
    resumed.load_state_dict(original.state_dict())
    result = resumed.step(np.zeros(1, np.int64))
    while not result.terminated[0]:
        result = resumed.step(np.zeros(1, np.int64))
    assert result.success[0]


def test_a_state_before_the_first_reset():
    state = EpisodeVectorEnv(GOTO, 2, seed=3).state_dict()
    vector = EpisodeVectorEnv(GOTO, 2, seed=3)
    assert vector.load_state_dict(state) is None
    vector.reset()
    assert vector.episode_seeds == [episode_seed(3, TRAINING, slot, 0) for slot in range(2)]


def test_a_state_that_does_not_fit_is_refused():
    original = EpisodeVectorEnv(GOTO, 2)
    original.reset()
    state = original.state_dict()
    with pytest.raises(envs.EnvError, match="2 slots, and there are 3: resume with the number"):
        EpisodeVectorEnv(GOTO, 3).load_state_dict(state)
    with pytest.raises(envs.EnvError, match="has the env_id 'manako/GoTo-v0', expected 'Walk-v0'"):
        EpisodeVectorEnv("Walk-v0", 2).load_state_dict(state)
    with pytest.raises(envs.EnvError, match="has the seed 0, expected 1: resume with the settings"):
        EpisodeVectorEnv(GOTO, 2, seed=1).load_state_dict(state)
    with pytest.raises(envs.EnvError, match="has the first_slot 0, expected 2"):
        EpisodeVectorEnv(GOTO, 2, first_slot=2).load_state_dict(state)
    with pytest.raises(envs.EnvError, match="has the format 99, expected 1"):
        original.load_state_dict({**state, "format": 99})


def started_anew(vector, state):
    """Loads a state; returns the slots whose episode begins again, from the same seed and the frame it begins with."""
    seen = vector.load_state_dict(json.loads(json.dumps(state)))
    assert vector.episode_seeds == [slot["seed"] for slot in state["slots"]]
    anew = [index for index, slot in enumerate(state["slots"]) if slot["actions"] and not vector.episode_lengths[index]]
    assert vector.given_up == len(anew) and all(vector.episode_returns[index] == 0 for index in anew)
    assert np.array_equal(seen.images, vector.observations.images)
    return anew


def test_a_state_of_other_episodes_is_started_anew():
    """Other env_kwargs, another instruction, a seed that is forgotten: what was learned is not refused for it."""
    original = EpisodeVectorEnv(GOTO, 2)
    original.reset()
    original.step(np.zeros(2, np.int64))
    assert started_anew(EpisodeVectorEnv(GOTO, 2), original.state_dict()) == []
    assert started_anew(EpisodeVectorEnv(GOTO, 2, env_kwargs={"shapes": ["box"]}), original.state_dict()) == [0, 1]
    assert started_anew(EpisodeVectorEnv(GOTO, 2, instruction="go"), original.state_dict()) == [0, 1]
    forgetful = EpisodeVectorEnv("Walk-v0", 2, env_kwargs={"forgetful": True})
    forgetful.reset()
    forgetful.step(np.zeros(2, np.int64))
    assert started_anew(forgetful, forgetful.state_dict()) == [0, 1]


def test_a_replay_is_compared_at_every_step_and_not_at_its_end_alone():
    """The frame and the reward of one step in the middle are others, and all that follows is as it was."""
    for change in ("frame", "reward", "end"):
        original = EpisodeVectorEnv("Walk-v0", 3, seed=2)
        original.reset()
        while min(original.episode_lengths) < 3:
            ended = original.step(np.zeros(3, np.int64)).terminated
            if ended.any():
                original.reset_done(ended)
        state = original.state_dict()
        assert started_anew(EpisodeVectorEnv("Walk-v0", 3, seed=2), state) == []
        resumed = EpisodeVectorEnv("Walk-v0", 3, seed=2)
        whole = Walk.step

        def step(self, action, whole=whole, change=change):
            observation, reward, terminated, truncated, info = whole(self, action)
            if self.at == 2 and change == "reward":
                reward += 1e-9
            if self.at == 2 and change == "end":
                truncated = True
            return observation, reward, terminated, truncated, info

        def render(self, whole=Walk.render, change=change):
            frame = whole(self)
            frame[0, 0] += self.at == 2 and change == "frame"
            return frame

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Walk, "step", step)
            patch.setattr(Walk, "render", render)
            assert started_anew(resumed, state) == [0, 1, 2], change


def test_the_slots_that_replay_go_on_and_the_others_begin_again():
    original = EpisodeVectorEnv("Walk-v0", 3, seed=2)
    original.reset()
    original.step(np.zeros(3, np.int64))
    state = original.state_dict()
    state["slots"][1]["actions"] = [0] * 9  # more than its episode has
    resumed = EpisodeVectorEnv("Walk-v0", 3, seed=2)
    assert started_anew(resumed, state) == [1]
    assert resumed.episode_lengths.tolist() == [1, 0, 1] and resumed.state_dict()["episodes"] == state["episodes"]
    play(resumed, 10)  # and it can be played


def test_seeds_that_an_environment_ignores_are_noticed():
    followed = EpisodeVectorEnv("Walk-v0", 2, seed=1)
    assert followed.follows_seeds() and followed.state_dict()["episodes"] == [0, 0]
    followed.reset()
    expected = EpisodeVectorEnv("Walk-v0", 2, seed=1)
    expected.reset()
    assert followed.state_dict() == expected.state_dict()  # nothing of the question is left
    assert not EpisodeVectorEnv("Walk-v0", 2, env_kwargs={"forgetful": True}).follows_seeds()


# The control that replaces the instruction


def test_goto_names_another_object_on_the_board():
    vector = EpisodeVectorEnv(GOTO, 6)
    seen = vector.reset()
    replaced = vector.replaced_instructions()
    for slot in range(6):
        env = envs.make_vlm_env(GOTO)
        env.reset(seed=vector.episode_seeds[slot])
        assert replaced[slot] == env.unwrapped.alternative_instruction() != seen.instructions[slot]


def test_others_get_the_instruction_of_another_episode():
    vector = EpisodeVectorEnv("Walk-v0", 4)
    seen = vector.reset()
    replaced = vector.replaced_instructions()
    assert all(new != own and new in seen.instructions for new, own in zip(replaced, seen.instructions, strict=True))
    for _ in range(12):  # as episodes come and go, a slot keeps its own until its episode ends
        result = vector.step(np.zeros(4, np.int64))
        now = vector.replaced_instructions()
        assert all(new != own for new, own in zip(now, result.observations.instructions, strict=True))
        assert now == replaced
        if result.terminated.any():
            vector.reset_done(result.terminated)
            replaced = tuple(
                new if ended else old
                for new, old, ended in zip(vector.replaced_instructions(), replaced, result.terminated, strict=True)
            )


def test_each_episode_draws_its_own_replacement():
    vector = EpisodeVectorEnv("Walk-v0", 8)
    vector.reset()
    drawn = []
    for seed in range(30):
        vector.reset(seeds=range(seed, seed + 8))
        drawn.append(vector.replaced_instructions()[0])
    assert sum(old != new for old, new in itertools.pairwise(drawn)) > 15


def test_where_all_read_the_same_the_replacement_is_empty():
    vector = EpisodeVectorEnv("manako/ColorMatch-v0", 2)
    vector.reset()
    assert vector.replaced_instructions() == ("", "")
    alone = EpisodeVectorEnv(GOTO, 1, env_kwargs={"num_objects": 1})
    alone.reset()
    assert alone.replaced_instructions() == ("",)
