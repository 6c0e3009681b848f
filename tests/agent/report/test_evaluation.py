"""Evaluation: every seed once and in order, controls, intervals, recorded episodes."""

import numpy as np
import pytest
import torch

from manako.agent.data.demonstrators import RandomPlayer
from manako.agent.errors import TrainingError
from manako.agent.report.evaluation import CONDITIONS, evaluate, evaluate_all, expert_agreement, record_episodes
from manako.agent.report.statistics import wilson_interval
from manako.envs import HELD_OUT, EpisodeVectorEnv, episode_seed, held_out_seeds
from manako.policies import PolicySource, load_policy, save_policy
from manako.policies.interface import PolicySpec
from tests.helpers.small_runs import tiny_policy

SEEDS = [episode_seed(0, HELD_OUT, 0, episode) for episode in range(11)]


def go_to(num_envs: int) -> EpisodeVectorEnv:
    return EpisodeVectorEnv("manako/GoTo-v0", num_envs)


@pytest.fixture(scope="module")
def policy():
    return tiny_policy(go_to(1))


def says(policy, monkeypatch, probabilities):
    """Lets the policy give these probabilities whatever it sees."""
    fixed = torch.log(torch.tensor(probabilities))
    read = policy.distribution
    monkeypatch.setattr(policy, "distribution", lambda inputs: (fixed.expand(len(inputs), len(fixed)), read(inputs)[1]))


@pytest.mark.parametrize("num_envs", [1, 4, 11, 16])
def test_each_seed_is_played_once_and_in_order(policy, num_envs):
    alone = [evaluate(policy, go_to(1), [seed]).episodes[0] for seed in SEEDS]
    assert evaluate(policy, go_to(num_envs), SEEDS).episodes == alone


def test_starts_that_differ_are_counted_by_observation(policy):
    assert evaluate(policy, go_to(4), SEEDS[:1] * 3).starts == 1
    assert evaluate(policy, go_to(2), SEEDS[:5]).starts == 5
    env = EpisodeVectorEnv("manako/GoTo-v0", 2, instruction="go to the red ball")
    boards = {env.reset(seeds=[seed] * 2).images[0].tobytes() for seed in SEEDS}
    assert evaluate(policy, env, SEEDS).starts == len(boards)  # here the instruction tells none apart


@pytest.mark.parametrize("forgetful", [False, True])
def test_there_are_never_more_starts_than_episodes(forgetful):
    """Slots without an episode play on uncounted: 5 episodes in 8 slots, and 9 in 4."""
    options = {"env_kwargs": {"forgetful": forgetful}}
    player = RandomPlayer(PolicySpec(("left", "right"), (16, 16, 3)))
    for episodes, num_envs in ((5, 8), (9, 4)):
        played = evaluate(player, EpisodeVectorEnv("tests/Halves-v0", num_envs, **options), SEEDS[:episodes])
        assert len(played.episodes) == episodes >= played.starts >= episodes - 1
        assert played.fixed_by_seed is not forgetful
        said = played.summary()
        assert said["fixed_by_seed"] is not forgetful
        assert said.get("note") == ("episodes are not fixed by seed" if forgetful else None)


def test_a_policy_that_always_says_the_same(policy, monkeypatch):
    """With the answer fixed, no condition but `random` differs, and the return is that of the scripted moves."""
    says(policy, monkeypatch, [0.1, 0.2, 0.3, 0.4])
    rows = evaluate_all(policy, go_to(4), SEEDS)
    assert rows["policy"] == rows["blank_image"] == rows["replaced_instruction"] != rows["random"]
    env = go_to(1)
    for seed, episode in zip(SEEDS, rows["policy"].episodes, strict=True):
        env.reset(seeds=[seed])
        for _ in range(episode.length):
            step = env.step(np.array([3]))
        assert step.terminated[0] or step.truncated[0]
        assert episode.episode_return == env.episode_returns[0] and episode.success == step.success[0]


def test_controls_change_what_the_policy_sees(policy, monkeypatch):
    seen: dict[str, list] = {name: [] for name in CONDITIONS}
    prepare = type(policy).prepare
    for name in CONDITIONS:
        monkeypatch.setattr(
            type(policy),
            "prepare",
            lambda self, images, texts, told=None, name=name: (
                seen[name].append((images, texts)) or prepare(self, images, texts, told)
            ),
        )
        evaluate(policy, go_to(4), SEEDS[:4], name)
    env = go_to(4)
    first = env.reset(seeds=SEEDS[:4])
    assert (seen["policy"][0][0] == first.images).all() and seen["policy"][0][1] == first.instructions
    assert not seen["blank_image"][0][0].any() and seen["blank_image"][0][1] == first.instructions
    assert (seen["replaced_instruction"][0][0] == first.images).all()
    assert all(a != b for a, b in zip(seen["replaced_instruction"][0][1], first.instructions, strict=True))
    assert not seen["random"]


def test_random_actions_are_uniform_and_repeatable(policy):
    env = go_to(4)
    assert evaluate(policy, env, SEEDS, "random") == evaluate(policy, env, SEEDS, "random")
    assert evaluate(policy, env, SEEDS, "random", seed=1) != evaluate(policy, env, SEEDS, "random", seed=2)


def test_summary(policy):
    evaluation = evaluate(policy, go_to(4), SEEDS)
    summary = evaluation.summary()
    wins = sum(episode.success for episode in evaluation.episodes)
    assert summary["success"] == wins / 11 and summary["episodes"] == 11
    assert summary["success_ci95"] == list(wilson_interval(wins, 11))
    low, high = summary["return_ci95"]
    assert low <= summary["return_mean"] <= high


def test_agreement_with_the_expert_counts_the_experts_states(policy, monkeypatch):
    """By hand: a policy that always goes up agrees wherever the expert goes up, in episodes that the expert plays."""
    says(policy, monkeypatch, [1.0, 0.0, 0.0, 0.0])
    ups = states = 0
    env = go_to(1)
    for seed in SEEDS:
        env.reset(seeds=[seed])
        ended = False
        while not ended:
            action = env.expert_actions()
            ups, states = ups + int(action[0] == 0), states + 1
            result = env.step(action)
            ended = bool(result.terminated[0] | result.truncated[0])
    found = expert_agreement(policy, go_to(len(SEEDS)), SEEDS)
    assert found == (ups, states) and 0 < ups < states and found.share == ups / states


def test_a_saved_policy_evaluates_alike(policy, tmp_path):
    env = go_to(4)
    fresh = load_policy(PolicySource(seed=3), env.action_names, env.frame_shape)
    save_policy(fresh, tmp_path)
    again = load_policy(PolicySource(policy=str(tmp_path)), env.action_names, env.frame_shape)
    assert evaluate(again, env, SEEDS, sample=True) == evaluate(fresh, env, SEEDS, sample=True)


@pytest.mark.parametrize("budget", [1, 60, 10_000])
def test_a_budget_of_steps_takes_fewer_whole_episodes_in_the_order_of_seeds(policy, budget):
    """Short ones are not preferred: what counts are the first ones, as many as their mean length says."""
    seeds = held_out_seeds(40, 5)
    whole = evaluate(policy, go_to(4), seeds)
    some = evaluate(policy, go_to(4), seeds, most_steps=budget)
    count = len(some.episodes)
    assert some.episodes == whole.episodes[:count]
    lengths = [episode.length for episode in whole.episodes]
    fits = int(budget * 4 / sum(lengths[:4]))
    # at least what fits, and what had begun when the first four had ended: each slot one or more
    assert count == 40 if fits >= 40 else fits <= count <= max(fits, 4 + sum(lengths[:4]))
    assert some.asked == (None if count == 40 else 40)
    if budget == 60:
        assert 4 <= count < 40 and some.summary()["episodes_asked"] == 40
        rows = evaluate_all(policy, go_to(4), seeds, most_steps=4 * budget)
        assert {len(row.episodes) for row in rows.values()} == {count} and rows["random"].asked == 40


def test_recorded_episodes_are_the_evaluated_ones(policy):
    episodes = record_episodes(policy, go_to(3), SEEDS[:3])
    for tape, episode in zip(episodes, evaluate(policy, go_to(3), SEEDS[:3]).episodes, strict=True):
        assert len(tape.frames) == len(tape.instructions) == episode.length + 1 == len(tape.actions) + 1
        assert sum(tape.rewards) == pytest.approx(episode.episode_return)
        assert tape.success == episode.success
        assert tape.probabilities.shape == (episode.length, 4)
        assert (tape.probabilities.argmax(-1) == tape.actions).all()


def test_long_episodes_are_thinned_and_those_that_do_not_end_cut(policy, monkeypatch):
    says(policy, monkeypatch, [0.97, 0.01, 0.01, 0.01])  # up, and against the border
    whole, thinned, cut = (
        record_episodes(policy, go_to(2), SEEDS[:2], steps, frames)
        for steps, frames in ((100, 100), (100, 4), (5, 100))
    )
    for tape, few, short in zip(whole, thinned, cut, strict=True):
        steps = len(tape.actions)
        assert steps == 9 and tape.ended and tape.every == 1 and len(tape.frames) == 10
        assert few.ended and few.every == 4 and list(few.rewards) == list(tape.rewards)
        for frame, other in zip(few.frames, [*tape.frames[:steps:4], tape.frames[-1]], strict=True):
            assert (frame == other).all()
        assert not short.ended and len(short.actions) == 5 and len(short.frames) == 6


def test_an_episode_that_does_not_end_is_an_error(policy, monkeypatch):
    monkeypatch.setattr("manako.agent.report.evaluation.MAX_EPISODE_STEPS", 5)
    says(policy, monkeypatch, [0.97, 0.01, 0.01, 0.01])  # up, and against the border for ever
    with pytest.raises(TrainingError, match=r"has not ended in 5 steps: expected .*max_episode_steps"):
        evaluate(policy, go_to(4), SEEDS)


def test_bad_calls(policy):
    with pytest.raises(TrainingError, match="at least one episode"):
        evaluate(policy, go_to(1), [])
    with pytest.raises(TrainingError, match="condition is 'blind'"):
        evaluate(policy, go_to(1), SEEDS, "blind")  # type: ignore[arg-type]
