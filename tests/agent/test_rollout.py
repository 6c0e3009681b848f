"""Rollouts: that what is stored is what the policy saw, chose and was paid, and that any split plays the same."""

import json
import logging
import math

import numpy as np
import pytest
import torch

from manako.agent.collector import RolloutCollector
from manako.agent.data.demonstrators import RandomPlayer
from manako.agent.errors import TrainingError
from manako.agent.rng import ACTIONS, action_draws, make_rng
from manako.agent.rollout import merge
from manako.agent.samples import recompute_logprobs, with_advantages
from manako.envs import EpisodeVectorEnv
from manako.policies.interface import PolicySpec, sample_categorical
from tests.helpers.rollout_equality import breaks_of_drift, close_enough, same_bits, same_rows
from tests.helpers.small_runs import color_env, corridor_env, indices, tiny_policy

CORRIDOR = {"length": 7, "limit": 3}


class Tape:
    """A vector env that keeps a copy of everything it showed and was told."""

    def __init__(self, env):
        self.env = env
        self.shown, self.actions, self.results = [], [], []

    def __getattr__(self, name):
        return getattr(self.env, name)

    def reset(self, seeds=None):
        observations = self.env.reset(seeds)
        self.shown = [observations]  # what each action was chosen on
        return observations

    def reset_done(self, mask, seeds=None):
        observations = self.env.reset_done(mask, seeds)
        self.shown[-1] = observations
        return observations

    def step(self, actions):
        result = self.env.step(actions)
        self.actions.append(actions.copy())
        self.results.append(result)
        self.shown.append(result.observations)
        return result


@pytest.fixture(scope="module")
def corridor():
    """Twelve steps of four corridors, with everything that the environments showed."""
    env = Tape(corridor_env(4, CORRIDOR, seed=3))
    policy = tiny_policy(env.env)
    rollout = RolloutCollector(env, policy, num_steps=12, seed=3, record=True).collect(0)
    return env, policy, rollout


# Random numbers


def test_streams_are_repeatable_and_differ():
    assert make_rng(5, ACTIONS, 2, 7).random() == make_rng(5, ACTIONS, 2, 7).random()
    keys = [(5, ACTIONS, 2, 7), (6, ACTIONS, 2, 7), (5, ACTIONS, 3, 7), (5, ACTIONS, 2, 8)]
    assert len({make_rng(seed, *key).random() for seed, *key in keys}) == 4


def test_a_slot_s_draws_are_those_of_seed_slot_and_iteration():
    together, alone = action_draws(5, range(4), 7), action_draws(5, [2], 7)
    for _ in range(3):
        assert together.next()[2] == alone.next()[0]
    assert action_draws(5, [2], 7).next()[0] == make_rng(5, ACTIONS, 2, 7).random()


# What is stored


def test_the_frames_are_those_that_the_environments_showed(corridor):
    env, policy, rollout = corridor
    shown = np.concatenate([observations.images for observations in env.shown[:-1]])
    assert torch.equal(rollout.inputs["frames"], policy.processing.pipeline.resize(shown))
    assert np.array_equal(rollout.record.images, shown)
    assert len(np.unique(shown.reshape(48, -1), axis=0)) > 20  # else any order would do


def test_the_prompts_are_those_of_the_instructions(corridor):
    env, policy, rollout = corridor
    texts = [text for observations in env.shown[:-1] for text in observations.instructions]
    ids, lengths = rollout.inputs["input_ids"], rollout.inputs["lengths"]
    assert rollout.record.instructions == texts
    assert len(set(lengths.tolist())) > 1  # the instruction grows shorter from step to step
    for row, text in enumerate(texts):
        expected = policy.prompts.encode(text)
        assert tuple(ids[row, : lengths[row]].tolist()) == expected
        assert (ids[row, len(expected) :] == policy.processing.pad_id).all()


def test_actions_rewards_and_flags_are_those_of_the_environments(corridor):
    env, _, rollout = corridor
    assert np.array_equal(rollout.record.to_env, np.stack(env.actions))
    assert torch.equal(indices(rollout), torch.from_numpy(np.stack(env.actions)))
    rewards = np.stack([result.rewards for result in env.results])
    assert torch.equal(rollout.rewards, torch.from_numpy(rewards).float())
    assert torch.equal(rollout.terminated, torch.from_numpy(np.stack([result.terminated for result in env.results])))
    assert torch.equal(rollout.truncated, torch.from_numpy(np.stack([result.truncated for result in env.results])))
    assert rollout.terminated.any() and rollout.truncated.any()


def test_the_stored_logprob_is_the_policy_s_for_the_stored_action(corridor):
    _, policy, rollout = corridor
    with torch.no_grad():
        whole = policy.whole_prompt
        logprobs, values = policy.distribution(rollout.inputs, whole)
    own = logprobs.gather(1, indices(rollout).flatten()[:, None])[:, 0]
    assert rollout.logprobs.shape == rollout.mask.shape == (12, 4, 1) and rollout.mask.all()
    assert torch.allclose(rollout.logprobs.flatten(), own, atol=1e-5)
    assert torch.allclose(rollout.values.flatten(), values, atol=1e-5)
    assert rollout.values.std() > 0.01 and rollout.logprobs.std() > 0.01


def test_the_actions_are_drawn_from_each_slot_s_rng(corridor):
    _, policy, rollout = corridor
    with torch.no_grad():
        logprobs = policy.distribution(rollout.inputs)[0].view(12, 4, 2)
    for slot in range(4):
        uniforms = make_rng(3, ACTIONS, slot, 0).random(12)
        assert torch.equal(indices(rollout)[:, slot], sample_categorical(logprobs[:, slot], uniforms))


def test_next_values_are_those_of_the_observation_that_the_step_returned(corridor):
    """Of a truncated episode's own last frame, and not of the first frame of the next episode."""
    env, policy, rollout = corridor
    checked = 0
    for t, result in enumerate(env.results):
        inputs = policy.prepare(result.observations.images, result.observations.instructions)
        with torch.no_grad():
            own = policy.distribution(inputs)[1]  # of the last frame where an episode ended
        for slot in range(4):
            if not rollout.terminated[t, slot]:  # nothing follows those
                assert rollout.next_values[t, slot].item() == pytest.approx(own[slot].item(), abs=1e-5)
                if rollout.truncated[t, slot] and t + 1 < len(env.results):
                    assert abs(rollout.next_values[t, slot] - rollout.values[t + 1, slot]) > 1e-3
                    checked += 1
    assert checked >= 3


def test_episodes_are_listed_as_they_end(corridor):
    env, _, rollout = corridor
    returns, lengths, expected = np.zeros(4), np.zeros(4, int), []
    for result in env.results:
        returns += result.rewards
        lengths += 1
        for slot in np.flatnonzero(result.terminated | result.truncated):
            expected.append((pytest.approx(returns[slot]), lengths[slot], bool(result.success[slot])))
            returns[slot] = lengths[slot] = 0
    assert [(e.episode_return, e.length, e.success) for e in rollout.episodes] == expected
    assert {episode.success for episode in rollout.episodes} == {True, False}


def test_a_step_that_terminates_and_truncates_counts_as_terminated():
    env = Tape(corridor_env(4, {"length": 3, "limit": 1, "both": True}, seed=0))
    rollout = RolloutCollector(env, tiny_policy(env.env), num_steps=8, seed=0).collect(0)
    both = np.stack([result.terminated & result.truncated for result in env.results])
    assert both.any()
    assert rollout.terminated[torch.from_numpy(both)].all()
    assert not (rollout.terminated & rollout.truncated).any()
    assert (rollout.terminated | rollout.truncated).all()


def test_a_rollout_goes_on_where_the_last_one_stopped():
    env, whole_env = Tape(corridor_env(2, CORRIDOR)), Tape(corridor_env(2, CORRIDOR))
    policy = tiny_policy(env.env)
    collector = RolloutCollector(env, policy, num_steps=5, seed=0)
    first, second = collector.collect(0), collector.collect(1)
    assert not torch.equal(indices(first), indices(second)) or not torch.equal(first.rewards, second.rewards)
    whole_env.reset()
    for actions in env.actions:  # the same actions in one sweep: no step was lost or played twice in between
        result = whole_env.step(actions)
        ended = result.terminated | result.truncated
        if ended.any():
            whole_env.reset_done(ended)
    assert np.array_equal(
        np.stack([result.rewards for result in env.results]), np.stack([r.rewards for r in whole_env.results])
    )
    assert torch.equal(
        policy.processing.pipeline.resize(np.concatenate([o.images for o in whole_env.shown[5:10]])),
        second.inputs["frames"],
    )
    # the value beyond the first rollout is the value of the second one's first observation, where the episode went on
    going_on = ~(first.terminated[-1] | first.truncated[-1])
    assert torch.allclose(first.next_values[-1][going_on], second.values[0][going_on], atol=1e-5)


# The same again, and any split


def test_the_same_seed_gives_the_same_rollout():
    rollouts = []
    for seed in (4, 4, 5):
        env = corridor_env(3, CORRIDOR, seed=seed)
        rollouts.append(RolloutCollector(env, tiny_policy(env), num_steps=6, seed=seed).collect(0))
    one, same, other = rollouts
    same_bits(one, same)
    assert not torch.equal(indices(one), indices(other))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_with_one_batch_size_any_split_merges_to_the_same_bits(batch_size):
    whole_env = corridor_env(4, CORRIDOR, seed=2)
    policy = tiny_policy(whole_env)
    how = {"num_steps": 6, "seed": 2, "batch_size": batch_size, "record": True}
    whole = RolloutCollector(whole_env, policy, **how)
    parts = [RolloutCollector(corridor_env(2, CORRIDOR, seed=2, first_slot=first), policy, **how) for first in (0, 2)]
    for iteration in range(2):
        one = whole.collect(iteration)
        same_bits(one, merge([part.collect(iteration) for part in parts]))
        assert len(one.bootstrap) == 4 + len(one.bootstrap_at) > 4
        assert {(e.step, e.slot) for e in one.episodes} == {
            (t, n) for t, n in (one.terminated | one.truncated).nonzero().tolist()
        }
    with pytest.raises(TrainingError, match="batch_size is 3 for 4 environments"):
        RolloutCollector(corridor_env(4, CORRIDOR), policy, num_steps=6, seed=2, batch_size=3)


def test_a_recomputed_rollout_of_the_same_weights_is_the_same_and_of_others_is_corrected():
    env = corridor_env(4, CORRIDOR, seed=3)
    policy, newer = tiny_policy(env), tiny_policy(env)
    rollout = RolloutCollector(env, policy, num_steps=7, seed=3).collect(0)
    again, importance = recompute_logprobs(rollout, policy, max_batch=5)
    for name in ("logprobs", "values", "next_values"):
        assert torch.allclose(getattr(again, name), getattr(rollout, name), atol=1e-5), name
    assert torch.allclose(importance, torch.ones(7, 4), atol=1e-5)
    with torch.no_grad():
        for parameter in newer.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    moved, importance = recompute_logprobs(rollout, newer)
    expected = torch.minimum((moved.logprobs - rollout.logprobs)[..., 0].exp(), torch.ones(7, 4))
    assert torch.equal(importance, expected) and 0 < importance.min() < 0.99
    assert not torch.allclose(moved.next_values, rollout.next_values, atol=1e-3)
    for t, slot in rollout.bootstrap_at.tolist():  # a truncated episode's own last frame, not the next one's first
        assert t == 6 or moved.next_values[t, slot] != moved.values[t + 1, slot]


def test_any_split_of_the_slots_plays_the_same():
    whole_env = corridor_env(4, CORRIDOR, seed=2)
    policy = tiny_policy(whole_env)
    whole = [RolloutCollector(whole_env, policy, num_steps=6, seed=2)]
    parts = [
        RolloutCollector(corridor_env(2, CORRIDOR, seed=2, first_slot=first), policy, num_steps=6, seed=2)
        for first in (0, 2)
    ]
    for iteration in range(2):
        (one,) = (collector.collect(iteration) for collector in whole)
        two = [collector.collect(iteration) for collector in parts]
        for name in ("rewards", "terminated", "truncated", "mask"):
            assert torch.equal(getattr(one, name), torch.cat([getattr(part, name) for part in two], dim=1)), name
        assert torch.equal(indices(one), torch.cat([indices(part) for part in two], dim=1))
        for name in ("logprobs", "values", "next_values"):
            joined = torch.cat([getattr(part, name) for part in two], dim=1)
            assert torch.allclose(getattr(one, name), joined, atol=1e-5), name
        frames = [part.inputs["frames"].view(6, 2, *part.inputs["frames"].shape[1:]) for part in two]
        assert torch.equal(one.inputs["frames"], torch.cat(frames, dim=1).flatten(0, 1))
        close_enough(one, merge(two))


def test_a_collector_is_brought_back_to_where_it_was():
    env = corridor_env(3, CORRIDOR)
    policy = tiny_policy(env)
    collector = RolloutCollector(env, policy, num_steps=5, seed=0)
    collector.collect(0)
    state = collector.state_dict()
    expected = collector.collect(1)
    again = RolloutCollector(corridor_env(3, CORRIDOR), policy, num_steps=5, seed=0)
    again.load_state_dict(state)
    same_bits(expected, again.collect(1))
    assert again.metrics() == {"episodes_given_up": 0}


def test_episodes_that_do_not_replay_begin_anew_with_a_warning(caplog):
    """Nobody sees a column jump by more than a place, and nothing of the given-up episodes is counted."""

    def make():
        player = RandomPlayer(PolicySpec(("left", "right"), (8, 64, 3)))
        return RolloutCollector(EpisodeVectorEnv("tests/Drift-v0", 3), player, num_steps=7, seed=0, record=True)

    first, again = make(), make()
    before = [first.collect(iteration) for iteration in range(2)]
    with caplog.at_level(logging.WARNING):
        again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    after = [again.collect(iteration) for iteration in range(2, 6)]
    assert breaks_of_drift(before + after) == [(14, slot) for slot in range(3)]
    assert again.metrics() == {"episodes_given_up": 3} and "3 of 3 running episodes did not play" in caplog.text
    assert [episode.length for rollout in after for episode in rollout.episodes] == [20] * 3


# The reference, and what goes wrong


def test_reference_logprobs_are_those_of_the_policy_with_its_lora_off():
    env = color_env(4)
    policy = tiny_policy(env, trainable="lora", lora_rank=4)
    with torch.no_grad():
        start = policy.distribution(policy.prepare(*env.reset()))[0]
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad and "value_head" not in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    collector = RolloutCollector(color_env(4), policy, num_steps=3, seed=0, reference=policy, max_batch=5)
    rollout = collector.collect(0)
    assert rollout.reference.shape == (12, 4)
    assert torch.allclose(rollout.reference[:4], start, atol=1e-5)
    with torch.no_grad():
        assert (policy.distribution(rollout.inputs)[0][:4] - start).abs().max() > 0.01  # LoRA is on again


def test_another_policy_can_be_the_reference():
    env = color_env(4)
    policy, reference = tiny_policy(env), tiny_policy(env, seed=1)
    rollout = RolloutCollector(env, policy, num_steps=2, seed=0, reference=reference).collect(0)
    with torch.no_grad():
        assert torch.allclose(rollout.reference, reference.distribution(rollout.inputs)[0], atol=1e-5)
        assert not torch.allclose(rollout.reference, policy.distribution(rollout.inputs)[0], atol=1e-2)


def test_no_reference_is_none(corridor):
    assert corridor[2].reference is None


def test_probabilities_that_are_not_finite_stop_the_rollout():
    env = color_env(2)
    policy = tiny_policy(env)
    with torch.no_grad():
        policy.base_vlm.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(TrainingError, match=r"not finite in iteration 3, step 0: expected numbers, which a smaller"):
        RolloutCollector(env, policy, num_steps=2, seed=0).collect(3)


def test_samples_are_the_rollout_laid_flat(corridor):
    _, _, rollout = corridor
    samples = with_advantages(rollout, gamma=0.9, gae_lambda=0.8)
    same_rows(samples.actions, rollout.actions)
    same_rows(samples.inputs, rollout.inputs)
    assert torch.equal(samples.logprobs.view(12, 4, 1), rollout.logprobs) and samples.mask.shape == (48, 1)
    assert torch.equal(samples.values.view(12, 4), rollout.values)
    assert samples.advantages.mean().abs() < 1e-5
    assert samples.advantages.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)
    # the last step has no successor inside the rollout: its return is r + gamma V(s') where the episode went on
    expected = rollout.rewards[-1] + 0.9 * rollout.next_values[-1] * (~rollout.terminated[-1])
    assert torch.allclose(samples.returns.view(12, 4)[-1], expected, atol=1e-5)


def test_samples_are_selected_and_moved_whole(corridor):
    samples = with_advantages(corridor[2], gamma=0.9, gae_lambda=0.8, importance=torch.rand(12, 4))
    rows = torch.tensor([40, 3])
    part, moved = samples.select(rows), samples.to("meta")
    same_rows(part.inputs, samples.inputs.select(rows))
    same_rows(part.actions, samples.actions.select(rows))
    for name, values in samples._asdict().items():
        if isinstance(values, torch.Tensor):
            assert torch.equal(getattr(part, name), values[rows]) and getattr(moved, name).device.type == "meta", name
    assert samples.importance is not None and samples.reference is part.reference is moved.reference is None
    assert moved.inputs["frames"].device.type == moved.actions["index"].device.type == "meta"
