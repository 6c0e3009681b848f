"""Players that cannot learn: how often an expert errs, that chance is uniform, that recordings are kept to."""

import numpy as np
import pytest
import torch

from manako.agent.collector import RolloutCollector
from manako.agent.data.demonstrators import RandomPlayer, RecordedPlayer, ScriptedPlayer
from manako.agent.data.recordings import Recording, split_over_slots
from manako.agent.errors import TrainingError
from manako.agent.report.evaluation import evaluate
from manako.agent.rng import make_rng
from manako.envs import EpisodeVectorEnv
from manako.policies.interface import Draws, PolicySpec
from tests.helpers.small_runs import corridor_env, indices

GOTO, SPEC = "manako/GoTo-v0", PolicySpec(("up", "down", "left", "right"), (24, 24, 3))
CORRIDOR = PolicySpec(("left", "right"), (16, 120, 3))
MANY = 40_000  # four standard deviations of a share are at most 4 sqrt(0.25 / 40000) = 0.01


def frames(count):
    return np.zeros((count, *SPEC.frame_shape), np.uint8)


def act(player, count=MANY, greedy=False, **told):
    """What the player does in that many slots, all with one generator."""
    inputs = player.prepare(frames(count), ["go"] * count, {name: np.array(values) for name, values in told.items()})
    return player.act(inputs, Draws([make_rng(0, 1)] * count), greedy)


def shares(to_env):
    return torch.bincount(torch.from_numpy(to_env), minlength=4) / len(to_env)


# ---- the expert ------------------------------------------------------------------------------------------------------


def test_an_expert_errs_as_often_as_asked_and_then_with_any_other_action():
    acted = act(ScriptedPlayer(SPEC, 0.3), expert_actions=[2] * MANY)
    expected = torch.tensor([0.1, 0.1, 0.7, 0.1])
    assert torch.allclose(shares(acted.to_env), expected, atol=0.01)
    assert acted.logprobs.shape == acted.mask.shape == (MANY, 1) and acted.mask.all()
    said = expected[torch.from_numpy(acted.to_env)].log()[:, None]
    assert torch.allclose(acted.logprobs, said, atol=1e-6)
    assert torch.equal(acted.values, torch.zeros(MANY)) and acted.actions["index"].tolist() == acted.to_env.tolist()


def test_an_expert_that_never_errs_does_what_each_environment_s_expert_says():
    experts = np.arange(1000) % 4
    acted = act(ScriptedPlayer(SPEC), 1000, expert_actions=experts)
    assert np.array_equal(acted.to_env, experts) and torch.equal(acted.logprobs, torch.zeros(1000, 1))


def test_an_expert_that_always_errs_never_does_what_its_expert_says():
    acted = act(ScriptedPlayer(SPEC, 1.0), expert_actions=[1] * MANY)
    assert torch.allclose(shares(acted.to_env), torch.tensor([1.0, 0.0, 1.0, 1.0]) / 3, atol=0.01)
    assert 1 not in acted.to_env


@pytest.mark.parametrize("error_rate", [1.5, -0.1])
def test_an_error_rate_is_a_probability(error_rate):
    with pytest.raises(TrainingError, match=rf"error_rate is {error_rate}: expected a number from 0 to 1"):
        ScriptedPlayer(SPEC, error_rate)


def test_the_collector_asks_the_environments_expert_at_every_step():
    """Also where the advice is kept: it is what the player was told."""
    env = EpisodeVectorEnv(GOTO, 4, seed=5)
    rollout = RolloutCollector(env, ScriptedPlayer(SPEC), 12, seed=0, record=True, ask_expert=True).collect(0)
    assert torch.equal(indices(rollout), rollout.record.expert_actions)
    assert all(episode.success for episode in rollout.episodes) and len(rollout.episodes) > 8
    wrong = RolloutCollector(
        EpisodeVectorEnv(GOTO, 4, seed=5), ScriptedPlayer(SPEC, 1.0), 12, 0, record=True, ask_expert=True
    )
    rollout = wrong.collect(0)
    assert (indices(rollout) != rollout.record.expert_actions).all()


# ---- chance ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("greedy", [False, True])
def test_a_random_player_is_uniform_also_where_the_likeliest_action_is_asked_for(greedy):
    acted = act(RandomPlayer(SPEC), greedy=greedy)
    assert torch.allclose(shares(acted.to_env), torch.full((4,), 0.25), atol=0.01)
    assert torch.allclose(acted.logprobs, torch.full((MANY, 1), 0.25).log())


def test_a_random_player_draws_with_the_run_s_numbers():
    first, again = (RolloutCollector(corridor_env(3), RandomPlayer(CORRIDOR), 9, seed=4).collect(0) for _ in range(2))
    other = RolloutCollector(corridor_env(3), RandomPlayer(CORRIDOR), 9, seed=5).collect(0)
    assert torch.equal(indices(first), indices(again)) and not torch.equal(indices(first), indices(other))
    assert len(first.bootstrap) == 0 and torch.equal(first.next_values, torch.zeros(9, 3))  # nobody judges what follows


def test_players_are_evaluated():
    seeds = list(range(1, 21, 2))
    players = ScriptedPlayer(SPEC), RandomPlayer(SPEC)
    expert, chance = (evaluate(player, EpisodeVectorEnv(GOTO, 4), seeds) for player in players)
    assert expert.summary()["success"] == 1 > chance.summary()["success"]


# ---- recordings ------------------------------------------------------------------------------------------------------


def corridors(queues):
    """One slot for each queue; every episode is cut after 4 steps."""
    seeds = [[recording.seed for recording in queue] for queue in queues]
    return corridor_env(len(queues), {"length": 30, "limit": 4}, seed_lists=seeds)


def replay(recordings, num_envs, num_steps):
    """Rollouts of that many steps in which all recordings are played to their end."""
    player = RecordedPlayer(CORRIDOR, split_over_slots(recordings, num_envs))
    collector = RolloutCollector(corridors(player.queues), player, num_steps, 0, record=True)
    return [collector.collect(number) for number in range(-(-player.num_steps // num_steps))]


GOOD = [
    Recording(0, (1, 0, 1, 1), "line 0"),
    Recording(2, (0, 0, 1, 0), "line 1"),
    Recording(4, (1, 1, 1, 1), "line 2"),
]


@pytest.mark.parametrize("num_steps", [1, 5])
def test_recordings_are_played_to_the_letter_and_after_the_last_the_first_again(num_steps):
    player = RecordedPlayer(CORRIDOR, [GOOD[:2], GOOD[2:]])
    assert player.seed_lists == [[0, 2], [4]] and player.quota == [2, 1] and player.num_steps == 9
    collector = RolloutCollector(corridors(player.queues), player, num_steps, 0, record=True)
    rollouts = [collector.collect(number) for number in range(15 // num_steps)]
    played = torch.cat([indices(rollout) for rollout in rollouts])  # (15, 2)
    seeds = torch.cat([rollout.record.seeds for rollout in rollouts])
    assert played[:12, 0].tolist() == [*GOOD[0].actions, *GOOD[1].actions, *GOOD[0].actions]
    assert played[:12, 1].tolist() == [*GOOD[2].actions] * 3
    assert seeds[:12, 0].tolist() == [0] * 4 + [2] * 4 + [0] * 4 and set(seeds[:, 1].tolist()) == {4}
    assert all(torch.equal(rollout.logprobs, torch.zeros(num_steps, 2, 1)) for rollout in rollouts)


@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_episode_of_another_length_is_refused(at, num_steps):
    """The wrong one comes first, in the middle or last, in one slot with the others or beside them."""
    good = [Recording(2 * number, (1, 0, 1, 1), f"line {number}") for number in range(3)]
    assert sum(len(rollout.episodes) for rollout in replay(good, 1, num_steps)) == 3
    for actions, message in (
        ((1, 0, 1), rf"in line {at} \(seed {2 * at}\) ends before step 3, and the episode goes on"),
        ((1, 0, 1, 1, 0), rf"in line {at} \(seed {2 * at}\) goes on for 5 actions, and .* ended with step 3"),
    ):
        wrong = [*good[:at], Recording(2 * at, actions, f"line {at}"), *good[at + 1 :]]
        for num_envs in (1, 2):
            with pytest.raises(TrainingError, match=message):
                replay(wrong, num_envs, num_steps)


def test_a_recorded_player_wants_its_own_seeds():
    player = RecordedPlayer(SPEC, [[Recording(12, (0, 1), "line 1")]])
    with pytest.raises(TrainingError, match="line 1 is of 12: expected an environment that was given the player's"):
        RolloutCollector(EpisodeVectorEnv(GOTO, 1), player, 2, 0).collect(0)
