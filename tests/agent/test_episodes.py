"""Over which episodes a run's rates are: those that began first, whatever their length.

`Halves` ends after 2 steps in success or after 40 in failure, as the seed says.
"""

import json

import pytest
import torch

from manako.agent.collector import RolloutCollector
from manako.agent.data.demonstrators import RandomPlayer
from manako.agent.episodes import LONGEST, EpisodeCount, means
from manako.agent.rollout import Episode
from manako.envs import TRAINING, EpisodeVectorEnv, episode_seed
from manako.policies.interface import PolicySpec
from tests.helpers.small_envs import Halves

SLOTS, STEPS = 64, 16


def rollouts(number):
    """Rollouts of 16 steps in 64 slots."""
    env = EpisodeVectorEnv("tests/Halves-v0", SLOTS)
    collector = RolloutCollector(env, RandomPlayer(PolicySpec(env.action_names, env.frame_shape)), STEPS, 0)
    return [collector.collect(iteration) for iteration in range(number)]


@pytest.fixture(scope="module")
def played():
    return rollouts(16)


def timetable(steps):
    """(start, end, success) of every episode that begins before this step, from the seeds alone."""
    table = []
    for slot in range(SLOTS):
        now = episode = 0
        while now < steps:
            short = Halves.is_short(episode_seed(0, TRAINING, slot, episode))
            table.append((now, now + (2 if short else 40), short))
            now, episode = table[-1][1], episode + 1
    return table


def test_the_first_iterations_give_no_rate_and_then_that_of_the_seeds(played):
    table, before, count = timetable(16 * STEPS), 0, EpisodeCount(rounds=False)
    rates = []
    for iteration, rollout in enumerate(played):
        now = (iteration + 1) * STEPS
        running = min(start for start, end, _ in table if end > now)  # the running episode that began first
        counted = [success for start, _, success in table if before <= start < running]
        row = means(count.take(rollout))
        assert row["episodes"] == len(counted)
        assert row["success_rate"] == (sum(counted) / len(counted) if counted else None)
        rates.append(row["success_rate"])
        before = max(before, running)
    assert {e.success for e in played[0].episodes} == {True}  # of what ends in it
    assert rates[:2] == [None, None]
    assert 0.4 < rates[2] < 0.6  # after step 48, of those that began before step 8 at least


def test_each_episode_is_counted_once_through_a_saved_state(played):
    whole, first, second = (EpisodeCount(rounds=False) for _ in range(3))
    taken = [whole.take(rollout) for rollout in played]
    before = [first.take(rollout) for rollout in played[:7]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + [second.take(rollout) for rollout in played[7:]] == taken
    assert sum(map(len, taken)) + len(whole.state_dict()["waiting"]) == sum(len(r.episodes) for r in played)


def rollout_of(episodes, slots, steps=10):
    """A rollout of which only the episodes' ends are looked at: (slot, step, length)."""

    class Ends:
        rewards = torch.zeros(steps, slots)
        failed = None

    Ends.episodes = [Episode(1.0, length, True, step, slot) for slot, step, length in episodes]
    return Ends


def test_an_endless_episode_does_not_hold_the_others_back_for_ever():
    count = EpisodeCount(rounds=False)
    for iteration in range(1, LONGEST // 10 + 5):
        counted = count.take(rollout_of([(0, 9, 10)], 2))  # slot 1 never ends
        if iteration * 10 <= LONGEST:
            assert counted == []
        elif (iteration - 1) * 10 <= LONGEST:
            assert len(counted) == iteration
        else:
            assert len(counted) == 1


def test_where_rounds_are_cut_those_count_that_began_before_what_was_cut():
    count = EpisodeCount(rounds=True)
    # slot 0: 4 steps, 3, cut in its third; slot 1: 6 steps, 4: from 0, 4, 7 and from 0, 6
    ended = [(0, 3, 4), (1, 5, 6), (0, 6, 3), (1, 9, 4)]
    assert [e.length for e in count.take(rollout_of(ended, 2))] == [4, 6, 3, 4]
    # slot 1's first episode is cut: nothing is known of the first episodes
    assert count.take(rollout_of([(0, 3, 4), (0, 6, 3)], 2)) == []
    # slot 0's second is cut, begun at 4: slot 1's of 2 steps from 5 on are not counted
    ended = [(0, 3, 4), (1, 4, 5), (1, 6, 2), (1, 8, 2)]
    assert [e.length for e in count.take(rollout_of(ended, 2))] == [4, 5]
    assert means([]) == {"episodes": 0, "success_rate": None, "episode_return": None, "episode_length": None}
