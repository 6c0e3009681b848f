"""Which actions an environment allows: read, checked and enforced, for one environment and for many."""

import numpy as np
import pytest

from manako.envs import EnvError, EpisodeVectorEnv, check_vlm_env, make_vlm_env
from manako.envs.check import measure_speed
from manako.envs.masks import random_actions, read_mask
from tests.envs.test_contract import Screen
from tests.helpers import small_envs  # noqa: F401  (registers its environments)

GATES = "tests/Gates-v0"


def test_a_mask_is_a_fresh_array_of_bool():
    given = np.array([1, 0, 1], np.int8)
    mask = read_mask(given, 3)
    given[0] = 0
    assert mask.dtype == np.bool_ and mask.tolist() == [True, False, True]
    assert read_mask(np.array([True, False]), 2).tolist() == [True, False]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([1, 0], "gave a list as info['action_mask'], expected an array of bool or int8, of shape (2,)"),
        (np.array([1.0, 0.0]), "gave an array of float64 as info['action_mask']"),
        (np.array([[1, 0]], np.int8), "gave info['action_mask'] of shape (1, 2)"),
        (np.array([1, 0, 1], np.int8), "gave info['action_mask'] of shape (3,)"),
        (np.array([0, 2], np.int8), "gave info['action_mask'] with the numbers [0, 2]"),
    ],
)
def test_what_is_no_mask(value, says):
    with pytest.raises(EnvError) as error:
        read_mask(value, 2)
    assert str(error.value).startswith(says)


def test_chance_takes_each_allowed_action_alike_and_no_other():
    mask = np.array([False, True, False, True, True, False])
    uniforms = (np.arange(3000) + 0.5) / 3000
    actions = random_actions(uniforms, 6, np.tile(mask, (3000, 1)))
    assert np.bincount(actions, minlength=6).tolist() == [0, 1000, 0, 1000, 1000, 0]
    edges = random_actions(np.array([0.0, np.nextafter(1, 0)]), 6, np.tile(mask, (2, 1)))
    assert edges.tolist() == [1, 4]
    assert random_actions(np.array([0.0, 0.5, 0.99]), 4, None).tolist() == [0, 2, 3]


def test_taxi_allows_what_its_own_info_says():
    pytest.importorskip("pygame")
    import gymnasium

    env, plain = make_vlm_env("Taxi-v4"), gymnasium.make("Taxi-v4")
    env.reset(seed=3)
    _, info = plain.reset(seed=3)
    assert env.gives_masks
    for _ in range(20):
        assert env.action_mask.tolist() == info["action_mask"].astype(bool).tolist()
        action = int(np.flatnonzero(info["action_mask"])[-1])
        env.step(action)
        info = plain.step(action)[-1]
    refused = int(np.flatnonzero(info["action_mask"] == 0)[0])
    with pytest.raises(EnvError, match=r"Taxi-v4 got an action that its action_mask does not allow: expect.*seed 3"):
        env.step(refused)


def test_without_masks_everything_is_played_as_before():
    pytest.importorskip("pygame")
    env = make_vlm_env("Taxi-v4", action_masks=False)
    env.reset(seed=3)
    assert not env.gives_masks and env.action_mask.all()
    for action in range(6):
        env.step(action)


def test_the_masks_of_all_slots_follow_their_episodes():
    env = EpisodeVectorEnv(GATES, 3, seed=1, env_kwargs={"limit": 4})
    assert env.gives_masks and env.action_masks is None
    env.reset()
    ends = 0
    for number in range(30):
        inner = [each.unwrapped for each in env._envs]
        masks = env.action_masks
        assert masks.dtype == np.bool_ and masks.shape == (3, 4)
        assert masks.tolist() == [each.allowed().astype(bool).tolist() for each in inner]
        actions = env.random_actions(lambda share=(number % 10) / 10: np.full(3, share))
        assert masks[np.arange(3), actions].all()
        result = env.step(actions)
        ended = result.terminated | result.truncated
        assert env.action_masks[result.terminated].all()  # nothing is allowed at the end, and nothing need be
        ends += ended.sum()
        env.reset_done(ended)
    assert ends > 5
    assert EpisodeVectorEnv(GATES, 2, env_kwargs={"masked": False}).reset() and not env._ended.all()


def test_an_environment_without_masks_has_none():
    env = EpisodeVectorEnv(GATES, 2, env_kwargs={"masked": False})
    env.reset()
    assert not env.gives_masks and env.action_masks is None


def test_a_mask_that_allows_nothing_names_slot_and_seed():
    env = EpisodeVectorEnv(GATES, 2, seed=5, first_slot=4, env_kwargs={"broken": True})
    env.reset()
    env.step(np.array([1, 1]))
    with pytest.raises(EnvError) as error:
        env.step(np.array([1, 1]))
    assert "gave info['action_mask'] that allows none of its 4 actions" in str(error.value)
    assert f"(slot 4, episode seed {env.episode_seeds[0]}, step 2, action 'right')" in str(error.value)


class Late(Screen):
    def step(self, action):
        return *super().step(action)[:4], {"action_mask": np.ones(2, np.int8)}


class Odd(Screen):
    mask = np.ones(3, np.int8)

    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0], {"action_mask": self.mask}


def test_masks_that_come_late_or_malformed_are_faults():
    from manako.envs.observation import VLMObservation

    late = VLMObservation(Late())
    late.reset(seed=0)
    with pytest.raises(EnvError, match=r"gave info\['action_mask'\] after a first reset\(\) without one: .* step 1"):
        late.step(0)
    with pytest.raises(EnvError, match=r"of shape \(3,\), expected .* \(2,\).* action_masks false.*episode seed 7"):
        VLMObservation(Odd()).reset(seed=7)
    ignoring = VLMObservation(Odd(), action_masks=False)
    ignoring.reset(seed=7)
    ignoring.step(0)


def test_a_state_is_taken_up_with_its_masks():
    env, other = (EpisodeVectorEnv(GATES, 3, seed=2) for _ in range(2))
    env.reset()
    for _ in range(3):
        result = env.step(env.random_actions(lambda: np.array([0.1, 0.5, 0.9])))
        env.reset_done(result.terminated | result.truncated)
    other.load_state_dict(env.state_dict())
    assert other.given_up == 0 and other.digests == env.digests
    assert other.action_masks.tolist() == env.action_masks.tolist()


def test_a_replay_with_other_masks_is_another_episode():
    env = EpisodeVectorEnv(GATES, 1, seed=2)
    env.reset()
    env.step(np.array([1]))
    state = env.state_dict()
    env._envs[0].unwrapped.allowed = lambda: np.ones(4, np.int8)
    env.load_state_dict(state)
    assert env.given_up == 1


def test_an_expert_that_wants_what_is_not_allowed():
    env = EpisodeVectorEnv(GATES, 1, seed=5, env_kwargs={"jumpy": True})
    env.reset()
    with pytest.raises(EnvError, match=r"has an expert that wants 'jump', which its action_mask does not allow"):
        env.expert_actions()
    free = EpisodeVectorEnv(GATES, 1, env_kwargs={"jumpy": True}, action_masks=False)
    free.reset()
    assert free.expert_actions().tolist() == [3]


def test_taxis_expert_obeys_the_mask_to_the_end():
    pytest.importorskip("pygame")
    env = EpisodeVectorEnv("Taxi-v4", 4)
    env.reset()
    for _ in range(40):
        result = env.step(env.expert_actions())
        env.reset_done(result.terminated | result.truncated)


def test_check_env_looks_at_masks():
    assert check_vlm_env(GATES) == []
    assert check_vlm_env(GATES, action_masks=False) != []  # then all actions are tried, at which it breaks
    broken = check_vlm_env(GATES, env_kwargs={"broken": True})
    assert any("gives info['action_mask'] that allows none of its 4 actions" in fault for fault in broken)
    assert measure_speed(make_vlm_env(GATES), seconds=0.05).steps_per_second > 0
