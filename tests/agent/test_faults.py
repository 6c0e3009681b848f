"""Environments that break by chance: what is learned, counted and written of it, by hand and through every backend."""

import gc
import json
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from manako.agent.collector import RolloutCollector
from manako.agent.data.demonstrators import RandomPlayer
from manako.agent.data.trajectories import to_dataset
from manako.agent.episodes import EpisodeCount
from manako.agent.errors import TrainingError, WorkersError
from manako.agent.faults import FaultLog
from manako.agent.group_advantages import group_advantages, whole_groups
from manako.agent.ppo_trainer import PPOTrainer
from manako.agent.report.callbacks import CheckpointCallback
from manako.agent.report.evaluation import evaluate
from manako.agent.return_scale import ReturnScale
from manako.agent.rollout import Episode, Rollout
from manako.agent.samples import with_advantages
from manako.envs import EnvError, EpisodeVectorEnv, held_out_seeds
from manako.envs.faults import Fault
from manako.experiments.benchmarks.soak_env import ENV_ID
from tests.helpers.small_envs import tiny_policy
from tests.helpers.small_runs import ppo_config


def environments(num_envs=4, on_fault="give up", **kwargs):
    given = {name: kwargs.pop(name) for name in ("seed_lists", "group_size", "seed") if name in kwargs}
    return EpisodeVectorEnv(ENV_ID, num_envs, on_fault=on_fault, env_kwargs=kwargs, **given)


def breaking(env, slot, times):
    """Makes a slot's environment break in its next steps; new objects as well."""
    left = [times]
    kind = type(env._envs[slot].unwrapped)
    step = kind.step

    def broken(self, action):
        if left[0] and self is env._envs[slot].unwrapped:
            left[0] -= 1
            raise RuntimeError("the simulator broke")
        return step(self, action)

    return kind, broken


# ---- one slot of several ---------------------------------------------------------------------------------------------


def test_one_that_breaks_once_is_played_again_and_nothing_changes(monkeypatch):
    """Frames, rewards and seeds are those of environments that never broke, in all slots; the fault is kept."""
    whole, env = environments(rate=0.0), environments(rate=0.0)
    draw = np.random.default_rng(0)
    for made in (whole, env):
        made.reset()
    for t in range(60):
        if t % 7 == 3:
            monkeypatch.undo()
            kind, broken = breaking(env, t % 4, 1)
            monkeypatch.setattr(kind, "step", broken)
        actions = draw.integers(2, size=4)
        one, other = whole.step(actions), env.step(actions)
        assert not other.failed.any() and np.array_equal(one.observations.images, other.observations.images)
        assert np.array_equal(one.rewards, other.rewards) and np.array_equal(one.terminated, other.terminated)
        ended = one.terminated | one.truncated
        assert np.array_equal(whole.reset_done(ended).images, env.reset_done(ended).images)
        assert whole.digests == env.digests and whole.episode_seeds == env.episode_seeds
    faults = env.take_faults()
    assert len(faults) == 9 and not any(fault.given_up for fault in faults) and env.take_faults() == []
    assert "the simulator broke (slot 3, episode seed" in faults[0].sentence and "Traceback" in faults[0].traceback


def test_one_that_breaks_always_is_given_up_and_the_others_keep_their_step():
    env = environments(rate=0.0, always=1)
    whole = environments(rate=0.0)
    env.reset(), whole.reset()
    env.step(np.ones(4, int)), whole.step(np.ones(4, int))
    seeds = list(env.episode_seeds)
    env._envs[0].unwrapped.always = env._envs[3].unwrapped.always = 0
    one, other = whole.step(np.ones(4, int)), env.step(np.ones(4, int))
    assert other.failed.tolist() == [False, True, True, False] and not (other.terminated | other.truncated).any()
    assert np.array_equal(one.observations.images[[0, 3]], other.observations.images[[0, 3]])
    assert other.rewards.tolist() == [-0.125, 0, 0, -0.125]
    with pytest.raises(EnvError, match=r"episodes of the slots \[1, 2\] have ended"):
        env.step(np.ones(4, int))
    env.reset_done(other.failed)
    assert [a == b for a, b in zip(seeds, env.episode_seeds, strict=True)] == [True, False, False, True]
    assert [fault.step for fault in env.take_faults()] == [2, 2] and env.episode_lengths.tolist() == [2, 0, 0, 2]


def test_three_in_a_row_without_a_step_end_it_with_one_sentence():
    env = environments(1, rate=1.0)
    env.reset()
    with pytest.raises(EnvError, match=r"broke \(slot 0, .* 3 times in a row without a step between") as caught:
        for _ in range(9):
            env.reset_done(env.step(np.ones(1, int)).failed)
    assert "\n" not in str(caught.value) and len(env.take_faults()) == 3


def test_a_value_outside_the_contract_is_no_chance_and_raised_at_once(monkeypatch):
    env = environments(1, rate=0.0)
    monkeypatch.setattr(type(env._envs[0].unwrapped), "step", lambda self, action: (1, "1.0", False, False, {}))
    env.reset()
    with pytest.raises(EnvError, match="gave the reward '1.0'"):
        env.step(np.ones(1, int))
    assert env.take_faults() == []


def test_a_reset_that_breaks_is_tried_again_and_then_the_next_episode_begins(monkeypatch):
    env = environments(2, rate=0.0)
    kind = type(env._envs[0].unwrapped)
    reset, calls = kind.reset, []

    def broken(self, *, seed=None, options=None):
        if seed is not None:
            calls.append(seed)
            if len(calls) in (1, 3):
                raise RuntimeError("no answer")
        return reset(self, seed=seed, options=options)

    monkeypatch.setattr(kind, "reset", broken)
    env.reset()
    assert (calls[0] == env.episode_seeds[0] and calls[2] == calls[0] == calls[3]) or calls[0] in calls[1:]
    assert [fault.step for fault in env.take_faults()] == [0, 0] and env.digests[0] != env.digests[1]


# ---- what is learned -------------------------------------------------------------------------------------------------


def hand_rollout(**fields):
    """One slot, five steps: the third one failed."""
    column = lambda *numbers: torch.tensor(numbers, dtype=torch.float32)[:, None]  # noqa: E731
    flags = torch.zeros(5, 1, dtype=torch.bool)
    failed = flags.clone()
    failed[2] = True
    given = {name: None for name in Rollout._fields} | {
        "logprobs": torch.zeros(5, 1, 1),
        "mask": torch.ones(5, 1, 1, dtype=torch.bool),
        "values": column(1, 2, 3, 4, 5),
        "next_values": column(2, 3, 4, 5, 6),
        "rewards": column(1, 1, 0, 1, 1),
        "terminated": flags,
        "truncated": flags,
        "failed": failed,
        "episodes": [],
        "faults": [],
    }
    return Rollout(**(given | fields))


def test_the_steps_before_a_failed_one_are_bootstrapped_as_at_a_truncation_and_it_is_no_sample():
    """Gamma 1/2, lambda 1/2: A1 = 1 + 3/2 - 2 = 1/2, A0 = 1 + 2/2 - 1 + A1/4 = 9/8; A4 = -1, A3 = -1/2 - 1/4 = -3/4."""
    rollout = hand_rollout()
    samples = with_advantages(rollout, 0.5, 0.5)
    by_hand = torch.tensor([9 / 8, 1 / 2, -3 / 4, -1])
    expected = (by_hand - by_hand.mean()) / by_hand.std(unbiased=False)
    kept = samples.usable
    assert kept.tolist() == [True, True, False, True, True]
    assert torch.allclose(samples.advantages[kept], expected, atol=1e-6) and samples.advantages[2] == 0
    assert torch.allclose(samples.returns[kept], torch.tensor([17 / 8, 5 / 2, 13 / 4, 4]), atol=1e-6)
    with_truncation = hand_rollout(failed=None, truncated=torch.tensor([[0], [1], [1], [0], [0]], dtype=torch.bool))
    assert torch.equal(with_advantages(with_truncation, 0.5, 0.5).returns[kept], samples.returns[kept])


def test_a_step_that_ended_before_the_failed_one_keeps_its_own_end():
    terminated = torch.tensor([[0], [1], [0], [0], [0]], dtype=torch.bool)
    samples = with_advantages(hand_rollout(terminated=terminated), 0.5, 0.5)
    assert samples.returns[:2].tolist() == pytest.approx([7 / 4, 1])  # A1 = 1 - 2, A0 = 1 + 2/2 - 1 + A1/4


def test_a_group_with_a_failed_episode_is_not_compared_and_later_ones_are():
    rewards = torch.tensor([[1.0, 0], [0, 0], [2, 4], [0, 0]])
    ended = torch.tensor([[0, 0], [1, 0], [0, 0], [1, 1]], dtype=torch.bool)
    failed = torch.tensor([[0, 0], [0, 1], [0, 0], [0, 0]], dtype=torch.bool)
    advantages, usable = group_advantages("rloo", rewards, ended, torch.zeros(2, dtype=torch.long), failed=failed)
    assert usable.tolist() == [[False, False], [False, False], [True, True], [True, True]]
    assert advantages[2:].tolist() == [[-2, 2], [-2, 2]] and not advantages[:2].any()


def test_counts_and_scales_leave_out_what_was_no_step():
    scale, same = ReturnScale(0.5, 1), ReturnScale(0.5, 1)
    scale(hand_rollout())
    same.update(torch.tensor([[1.0], [1]]), torch.tensor([[0], [1]], dtype=torch.bool))
    same.update(torch.tensor([[1.0], [1]]), torch.zeros(2, 1, dtype=torch.bool))
    assert (scale.count, scale.mean, scale.squares) == pytest.approx((same.count, same.mean, same.squares))
    counts = EpisodeCount(rounds=False)
    two = torch.zeros(5, 2)
    failed = torch.zeros(5, 2, dtype=torch.bool)
    failed[3, 0] = True  # slot 0's first episode never ends: slot 1's are counted all the same
    episodes = [Episode(1.0, 2, True, step=1, slot=1), Episode(1.0, 2, True, step=3, slot=1)]
    rollout = hand_rollout(rewards=two, failed=failed, episodes=episodes)
    assert len(counts.take(rollout)) == 2
    assert len(EpisodeCount(rounds=False).take(rollout._replace(failed=None))) == 0


def test_a_training_survives_and_counts_a_fault_in_a_hundred_steps(tmp_path):
    env = environments(8, seed=3, rate=0.01, always=5, limit=12)
    policy = tiny_policy(env)
    args = ppo_config(tmp_path, num_iterations=6, num_steps=32, minibatch_size=32)
    trainer = PPOTrainer(policy, args, env)
    trainer.faults = FaultLog(0.2, tmp_path / "errors.jsonl")
    trainer.train()
    assert trainer.failure is None and trainer.iteration == 6
    rows = [row for row in trainer.state.log_history if "iteration" in row]
    lines = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert rows[-1]["env_faults"] == len(lines) > rows[-1]["episodes_failed"] == sum(line["given_up"] for line in lines)
    assert all(row["first_ratio_error"] < 1e-4 for row in rows)
    assert {"slot", "seed", "step", "sentence", "traceback", "given_up", "iteration"} <= set(lines[0])
    assert any(line["seed"] % 5 == 0 and line["step"] == 2 for line in lines)


def test_a_rate_above_the_limit_ends_the_run_and_says_how_to_go_on(tmp_path):
    log = FaultLog(0.02, tmp_path / "errors.jsonl")
    fault = Fault(1, 7, 3, True, "the simulator broke", "Traceback ...")
    rollout = hand_rollout(rewards=torch.zeros(100, 4))
    for number in range(5):  # 4 of 400 are one in a hundred
        log.take(rollout._replace(faults=[fault] * 4), number)
    with pytest.raises(WorkersError, match=r"broke 3\d times in the last 1,\d00 steps.* --max_fault_rate 0.02 allows"):
        log.take(rollout._replace(faults=[fault] * 30), 5)
    assert len((tmp_path / "errors.jsonl").read_text().splitlines()) == 50
    assert FaultLog(0.0).take(hand_rollout(), 0) == {}


def counted_training(tmp_path, at, limit):
    """A training of 3 rollouts whose environments break at that step of every episode from the second rollout on."""
    env = environments(4, seed=3, rate=0.0, limit=6)
    policy = tiny_policy(env)
    trainer = PPOTrainer(policy, ppo_config(tmp_path / ".staging", num_iterations=3, num_steps=16), env)
    trainer.faults = FaultLog(limit, tmp_path / "errors.jsonl")
    trainer.add_callback(CheckpointCallback(trainer, tmp_path, every=100))
    collect, after, kind = trainer.collector.collect, [], type(env._envs[0].unwrapped)
    step, breaks = kind.step, [False]

    def broken(self, action):
        if breaks[0] and self.steps + 1 == at:
            raise RuntimeError("the simulator broke")
        return step(self, action)

    def from_the_second(iteration):
        breaks[0] = iteration >= 1
        rollout = collect(iteration)
        after.append(env.state_dict())
        return rollout

    trainer.collector.collect = from_the_second
    return trainer, kind, broken, after


def test_a_rollout_with_too_many_faults_is_learned_from_and_what_is_saved_is_what_follows_it(tmp_path, monkeypatch):
    """Nothing that was played is skipped: the checkpoint's environments are those after the last rollout learned."""
    trainer, kind, broken, after = counted_training(tmp_path, at=2, limit=0.001)
    monkeypatch.setattr(kind, "step", broken)
    trainer.train()
    assert isinstance(trainer.failure, WorkersError) and trainer.iteration == len(after) == 2
    saved = json.loads((tmp_path / "checkpoints/checkpoint-2/rollout_state.json").read_text())
    assert saved["iteration"] == 2 and saved["env"] == after[-1]
    rows = [row for row in trainer.state.log_history if "iteration" in row]
    assert rows[-1]["env_faults"] == len((tmp_path / "errors.jsonl").read_text().splitlines()) >= 10


def test_what_broke_in_a_rollout_that_broke_off_is_written_down(tmp_path, monkeypatch):
    trainer, kind, broken, _ = counted_training(tmp_path, at=1, limit=1.0)
    monkeypatch.setattr(kind, "step", broken)
    with pytest.raises(EnvError, match="3 times in a row"):
        trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert len(lines) >= 3 and {line["iteration"] for line in lines} == {1} and all(line["traceback"] for line in lines)


@pytest.mark.parametrize(("limit", "said"), [(1.0, "leaves too few for its 4 minibatches"), (0.001, "more often than")])
def test_a_rollout_in_which_every_step_failed_ends_it_with_a_sentence_and_what_was_learned(limit, said, tmp_path):
    """Episodes of one step that all break: nothing is left to learn from."""
    trainer, _, _, _ = counted_training(tmp_path, at=1, limit=limit)
    collect = trainer.collector.collect

    def nothing_taken(iteration):
        rollout = collect(iteration)
        if iteration < 1:
            return rollout
        fault = Fault(1, 7, 3, True, "the simulator broke", "Traceback ...")
        failed = torch.ones(rollout.rewards.shape, dtype=torch.bool)
        return rollout._replace(failed=failed, faults=[fault] * failed.numel())

    trainer.collector.collect = nothing_taken
    before = None

    def kept(*_, **__):
        nonlocal before
        before = {name: weight.clone() for name, weight in trainer.policy.named_parameters()}

    callback = TrainerCallback()
    callback.on_epoch_end = kept
    trainer.add_callback(callback)
    with pytest.raises(WorkersError, match=f"{said}.*the simulator broke"):
        trainer.train()
    assert trainer.iteration == 1
    assert all(torch.equal(weight, before[name]) for name, weight in trainer.policy.named_parameters())


def test_a_broken_environment_is_gone_at_once():
    """Its error's frames hold it; without the collector of circles nothing of it may stay, however often one breaks."""
    env = environments(2, rate=0.2, limit=6)
    env.reset()
    gc.collect()
    gc.disable()
    try:
        seen = weakref.WeakSet(each.unwrapped for each in env._envs)
        for _ in range(200):
            result = env.step(np.ones(2, int))
            ended = result.terminated | result.truncated | result.failed
            if ended.any():
                env.reset_done(ended)
            seen.update(each.unwrapped for each in env._envs)
        assert len(env.take_faults()) > 20 and len(seen) == 2
    finally:
        gc.enable()


def test_a_group_whose_first_episode_failed_is_not_whole():
    ended = torch.tensor([[0, 0], [0, 1], [1, 0]], dtype=torch.bool)
    failed = torch.tensor([[1, 0], [0, 0], [0, 0]], dtype=torch.bool)
    assert whole_groups(ended, 2, failed) == 0 and whole_groups(ended, 2) == 1


# ---- episodes that are fixed beforehand ------------------------------------------------------------------------------


def test_an_evaluation_counts_a_failed_episode_as_such_and_puts_none_in_its_place():
    env = environments(3, rate=0.0, always=4)
    seeds = [8, 9, 11, 12, 13, 15, 17]  # two of which break
    policy = RandomPlayer(
        SimpleNamespace(
            action_names=env.action_names,
            frame_shape=env.frame_shape,
            history=0,
            frames=1,
            action_space=env.action_space,
        )
    )
    result = evaluate(policy, env, seeds, "random")
    summary = result.summary()
    assert result.failed == [0, 3] and summary["failed"] == 2 and summary["episodes"] == 7
    whole = evaluate(policy, environments(3, rate=0.0), [9, 11, 13, 15, 17], "random")
    won = [result.episodes[place].success for place in (1, 2, 4, 5, 6)]
    assert summary["success"] == pytest.approx(won.count(True) / 7) and len(whole.episodes) == 5
    returns = [result.episodes[place].episode_return for place in (1, 2, 4, 5, 6)]
    assert summary["return_mean"] == pytest.approx(np.mean(returns))
    assert "failed" not in whole.summary()
    with pytest.raises(TrainingError, match="broke in each of 4 episodes of the evaluation, the last time so: .*Soak"):
        evaluate(policy, environments(2, rate=0.0, always=1), held_out_seeds(4), "random")


def test_a_dataset_has_no_failed_episode_and_no_other_in_its_place():
    seed_lists = [[5, 8, 7], [9, 11, 12]]  # 8 and 12 break
    env = environments(2, rate=0.0, always=4, seed_lists=seed_lists)
    policy = tiny_policy(env)
    collector = RolloutCollector(env, policy, 30, seed=0, record=True)
    rollouts = [collector.collect(number) for number in range(4)]
    data = to_dataset(rollouts, policy, ENV_ID, "policy", {}, quota=[3, 3])
    assert sorted(set(data["seed"])) == [5, 7, 9, 11]
    assert data["step"].count(0) == 4


# ---- steps that do not come back -------------------------------------------------------------------------------------


def test_a_local_step_that_takes_long_is_told_with_its_place(monkeypatch, caplog):
    monkeypatch.setattr("manako.envs.faults.WARN_AFTER", 0.2)
    env = environments(2, rate=0.0)
    kind = type(env._envs[0].unwrapped)
    step = kind.step
    monkeypatch.setattr(kind, "step", lambda self, action: time.sleep(0.6) or step(self, action))
    env.reset()
    with caplog.at_level("WARNING"):
        env.step(np.ones(2, int))
    env.close()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and f"slot 1, episode seed {env.episode_seeds[1]}, step 1" in told[1]
    assert all("has not returned for" in text and "--step_timeout" in text for text in told)


def test_a_step_that_hangs_is_broken_off_and_its_episode_is_lost_alone():
    env = EpisodeVectorEnv(
        ENV_ID, 2, on_fault="give up", step_timeout=0.3, env_kwargs={"rate": 0.0, "kind": "wait", "always": 1}
    )
    env.reset()
    env.step(np.ones(2, int))
    env._envs[0].unwrapped.always = 0
    result = env.step(np.ones(2, int))
    assert result.failed.tolist() == [False, True] and result.rewards[0] == -0.125
    assert "did not return in time (slot 1, episode seed" in env.take_faults()[0].sentence
    env.close()
