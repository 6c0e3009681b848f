"""Action vectors in agent/: one ratio for one action, rollouts, players, data sets, cloning, evaluation, figures."""

import functools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from manako.agent.collector import RolloutCollector
from manako.agent.data.demonstrators import RandomPlayer, RecordedPlayer, ScriptedPlayer
from manako.agent.data.lerobot_format import export_lerobot
from manako.agent.data.recordings import read_recordings, split_over_slots
from manako.agent.data.trajectories import load_trajectories, save_trajectories, to_dataset, with_the_experts_actions
from manako.agent.errors import TrainingError
from manako.agent.losses import ppo_loss
from manako.agent.ppo_config import PPOConfig
from manako.agent.ppo_loop import train_ppo
from manako.agent.report.evaluation import CONDITIONS, evaluate, expert_agreement, record_episodes
from manako.agent.report.figures import episode_gif
from manako.agent.rollout import merge
from manako.agent.samples import Samples, recompute_logprobs
from manako.agent.tuning.supervised import demonstrated_actions, demonstrations
from manako.agent.tuning.trainers import PolicyCloningTrainer, PolicySFTTrainer
from manako.envs import EpisodeVectorEnv, held_out_seeds
from manako.policies import PolicySource, load_policy
from manako.policies.interface import Evaluated, Rows
from tests.agent.tuning.test_trainers import settings
from tests.helpers.rollout_equality import same_bits
from tests.helpers.small_runs import ppo_config, weights

SLIDE, PENDULUM = "manako/Slide-v0", "manako/Pendulum-v0"
both = pytest.mark.parametrize("env_id", [SLIDE, PENDULUM])


def make(env_id, num_envs=4, **options):
    kwargs = {"max_episode_steps": 6} if env_id == PENDULUM else {}
    return EpisodeVectorEnv(env_id, num_envs, env_kwargs=kwargs, **options)


@functools.cache
def policy_for(env_id, **source):
    env = make(env_id, 1)
    policy = load_policy(PolicySource(**source), env.action_names, env.frame_shape, env.action_space)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        policy.value_head.out.weight.normal_(std=0.3)
    return policy


@functools.cache
def played(env_id, player=None, steps=12):
    policy = policy_for(env_id)
    acting = policy if player is None else player(policy.spec)
    return RolloutCollector(make(env_id), acting, steps, seed=0, record=True, ask_expert=True).collect(0)


@functools.cache
def trajectories(env_id):
    return to_dataset([played(env_id, ScriptedPlayer)], policy_for(env_id), env_id, "expert", {})


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_the_entries_of_one_action_have_one_ratio():
    new = torch.tensor([[-0.5, -1.0], [-0.2, -0.3]], requires_grad=True)
    old = torch.tensor([[-0.7, -0.6], [-0.2, -0.9]])
    mask, advantages = torch.ones(2, 2, dtype=torch.bool), torch.tensor([1.0, -2.0])
    samples = Samples(Rows({}), Rows({}), old, mask, torch.zeros(2), advantages, torch.zeros(2))
    config = PPOConfig("unused", clip_range=0.2, ent_coef=0.1, vf_coef=0.0, report_to="none")
    entropies = torch.tensor([[0.5, 0.25], [1.0, 0.75]])
    said = Evaluated(new, entropies, torch.zeros(2), is_joint=True)
    loss, parts, ratio = ppo_loss(said, samples, config)
    ratios = [math.exp(0.2 - 0.4), math.exp(0.6)]  # of sums: -1.5 + 1.3, -0.5 + 1.1
    assert ratio.tolist() == pytest.approx(ratios, abs=1e-6)
    surrogate = (ratios[0] * 1 + min(ratios[1] * -2, 1.2 * -2)) / 2
    assert parts["policy_loss"].item() == pytest.approx(-surrogate, abs=1e-6)
    assert parts["entropy"].item() == pytest.approx((0.75 + 1.75) / 2, abs=1e-6)
    k3 = [r - 1 - math.log(r) for r in ratios]
    assert parts["approx_kl"].item() == pytest.approx(sum(k3) / 2, abs=1e-6)
    assert parts["clip_fraction"].item() == 0.5
    loss.backward()
    assert new.grad[0].tolist() == pytest.approx([-ratios[0] / 2] * 2, abs=1e-6)
    apart = ppo_loss(said._replace(is_joint=False), samples, config)[1]
    assert apart["policy_loss"].item() != pytest.approx(-surrogate, abs=1e-3)


# ---- rollouts --------------------------------------------------------------------------------------------------------


@both
def test_what_was_played_is_what_is_stored(env_id):
    policy, rollout, env = policy_for(env_id), played(env_id), make(env_id)
    d = env.action_space.shape[0]
    assert rollout.logprobs.shape == rollout.mask.shape == (12, 4, d) and rollout.mask.all()
    assert rollout.record.to_env.shape == (12, 4, d) == tuple(rollout.record.expert_actions.shape)
    vectors = rollout.record.to_env.reshape(-1, d)
    assert torch.equal(policy.actions_from_env(vectors)["bins"], rollout.actions["bins"])
    shown = env.reset()
    for t in range(12):
        assert np.array_equal(rollout.record.images[4 * t : 4 * t + 4], shown.images)
        result = env.step(rollout.record.to_env[t])
        assert np.allclose(rollout.rewards[t], result.rewards)
        shown = env.reset_done(result.terminated | result.truncated)
    again, importance = recompute_logprobs(rollout, policy)
    assert torch.allclose(again.logprobs, rollout.logprobs, atol=1e-4) and torch.allclose(importance, torch.ones(12, 4))


@both
def test_any_split_of_the_slots_plays_the_same(env_id):
    policy = policy_for(env_id)
    parts = [RolloutCollector(make(env_id, 2, first_slot=f), policy, 8, 0, batch_size=2, record=True) for f in (0, 2)]
    whole = RolloutCollector(make(env_id), policy, 8, 0, batch_size=2, record=True)
    for iteration in range(2):
        same_bits(merge([part.collect(iteration) for part in parts]), whole.collect(iteration))
    other = RolloutCollector(make(env_id), policy, 8, 0, batch_size=2, record=True)
    other.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    same_bits(other.collect(2), whole.collect(2))


@pytest.mark.parametrize("advantage", ["gae", "grpo"])
def test_ppo_starts_at_a_ratio_of_one_and_learns(advantage, tmp_path):
    env = make(SLIDE, 8, group_size=4)
    policy = load_policy(PolicySource(), env.action_names, env.frame_shape, env.action_space)
    before = weights(policy)
    others = {} if advantage == "gae" else {"advantage": "grpo", "group_size": 4}
    config = ppo_config(tmp_path, num_iterations=3, num_steps=8, minibatch_size=32, **others)
    rows = list(train_ppo(policy, RolloutCollector(env, policy, 8, 0, rounds=advantage != "gae"), config))
    assert all(row["first_ratio_error"] < 1e-4 and np.isfinite(row["loss"]) for row in rows)
    assert rows[0]["entropy"] == pytest.approx(2 * math.log(3), abs=0.2)  # of both entries
    assert any(not torch.equal(before[name], value) for name, value in weights(policy).items())


def test_a_reference_is_kept_by_the_tokens_that_were_said(tmp_path):
    policy = policy_for(SLIDE, trainable="lora")
    rollout = RolloutCollector(make(SLIDE), policy, 4, 0, reference=policy).collect(0)
    assert rollout.reference.shape == (16, 2)
    assert torch.allclose(rollout.reference, rollout.logprobs.flatten(0, 1), atol=1e-5)  # LoRA has not moved


# ---- players and data sets -------------------------------------------------------------------------------------------


@both
def test_players_of_vectors(env_id):
    env, spec = make(env_id), policy_for(env_id).spec
    each = math.log(1 / 3) if env_id == SLIDE else math.log(1 / 4)  # of three values; the density over 4 wide
    assert (played(env_id, RandomPlayer).logprobs - each).abs().max() < 1e-6
    rollout = played(env_id, ScriptedPlayer)
    assert np.array_equal(rollout.record.to_env, rollout.record.expert_actions.numpy())
    assert (rollout.logprobs == 0).all()
    wrong = RolloutCollector(env, ScriptedPlayer(spec, 0.5), 50, 0, record=True, ask_expert=True).collect(0)
    same = (wrong.record.to_env == wrong.record.expert_actions.numpy()).all(-1)
    assert 0.35 < same.mean() < 0.7
    d = env.action_space.shape[0]
    assert torch.allclose(wrong.logprobs.sum(-1)[torch.from_numpy(~same)], torch.tensor(math.log(0.5) + d * each))


@both
def test_a_data_set_of_vectors(env_id, tmp_path):
    data, space = trajectories(env_id), policy_for(env_id).spec.action_space
    save_trajectories(data, tmp_path / "data")
    kept, about = load_trajectories(str(tmp_path / "data"), env_id, action_space=space)
    d = space.shape[0]
    assert np.shape(kept["action"][:]) == (len(kept), d) and kept["action"][:] == kept["expert_action"][:]
    assert kept["action_name"][0] == ", ".join(f"{value:.4g}" for value in kept["action"][0])
    export_lerobot(kept, about, tmp_path / "lerobot", 2)
    info = json.loads((tmp_path / "lerobot" / "meta" / "info.json").read_text())
    action = info["features"]["action"]
    assert action["shape"] == [d] and action["names"] == list(make(env_id, 1).action_names)
    assert action["dtype"] == "float32" and "manako.action" not in info["features"]
    other = policy_for(PENDULUM if env_id == SLIDE else SLIDE).spec.action_space
    with pytest.raises(TrainingError, match="has actions of .*: expected .*, so collect again"):
        load_trajectories(str(tmp_path / "data"), env_id, action_space=other)


@both
@pytest.mark.parametrize("form", ["lines", "dataset"])
def test_a_recording_of_vectors_plays_again(env_id, form, tmp_path):
    policy, data, env = policy_for(env_id), trajectories(env_id), make(env_id, 1)
    path = str(tmp_path / "play")
    named = (env_id, env.action_names, {})
    save_trajectories(data, tmp_path / "kept")
    recordings = read_recordings(str(tmp_path / "kept"), *named, action_space=env.action_space)
    if form == "lines":
        for recording in recordings:
            line = {"seed": recording.seed, "actions": [list(action) for action in recording.actions]}
            (tmp_path / "play").open("a").write(json.dumps(line) + "\n")
        recordings = read_recordings(path, *named, action_space=env.action_space)
    player = RecordedPlayer(policy.spec, split_over_slots(recordings, 2))
    env = make(env_id, len(player.queues), seed_lists=player.seed_lists)
    rollout = RolloutCollector(env, player, player.num_steps, 0, record=True, ask_expert=True).collect(0)
    again = to_dataset([rollout], policy, env_id, "recorded", {}, player.quota)
    for name in ("action", "reward", "seed", "step"):
        assert again[name][:] == data[name][:], name


def test_vectors_that_are_none_are_refused_where_they_stand(tmp_path):
    env = make(PENDULUM, 1)
    for actions in ([[3.0]], [["up"]], [[0.1, 0.2]], [0.5]):
        (tmp_path / "play").write_text(json.dumps({"seed": 4, "actions": actions}))
        with pytest.raises(TrainingError, match=r"The action of step 0 in line 1 of .* expected a list of 1 numb"):
            read_recordings(str(tmp_path / "play"), PENDULUM, env.action_names, action_space=env.action_space)


@both
def test_the_experts_word_in_place_of_what_was_done(env_id):
    player = functools.partial(ScriptedPlayer, error_rate=0.6)
    data = to_dataset([played(env_id, player)], policy_for(env_id), env_id, "expert", {})
    told = with_the_experts_actions(data)
    assert data["action"][:] != data["expert_action"][:] == told["action"][:]
    assert told["action_name"][0] == ", ".join(f"{value:.4g}" for value in told["action"][0])
    assert told.info.description == data.info.description and told["image"][0] == data["image"][0]
    alone = data.remove_columns("expert_action").add_column("expert_action", [None] * len(data))
    with pytest.raises(TrainingError, match="These trajectories know no expert"):
        with_the_experts_actions(alone)


# ---- cloning ---------------------------------------------------------------------------------------------------------


@both
def test_cloning_is_of_the_nearest_bins(env_id, tmp_path):
    policy, data = policy_for(env_id), demonstrated_actions(trajectories(env_id))
    trainer = PolicyCloningTrainer(policy, settings(tmp_path), data, tmp_path)
    rows = [data[row] for row in range(6)]
    with torch.no_grad():
        loss = trainer.compute_loss(policy.model, trainer.collate(rows))
        expected = 0.0
        for row in rows:
            one = trainer.collate([row])
            values = [torch.from_numpy(values) for values in policy.codec.values]
            bins = [int((each - number).abs().argmin()) for each, number in zip(values, row["action"], strict=True)]
            said = policy.evaluate_actions(one["inputs"], Rows({"bins": torch.tensor([bins])}))
            expected -= said.logprobs.sum().item() / len(rows)
    assert loss.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("loss", ["actions", "tokens"])
def test_both_losses_learn_from_vectors(loss, tmp_path):
    env = make(SLIDE, 1)
    policy = load_policy(PolicySource(), env.action_names, env.frame_shape, env.action_space)
    before, data = weights(policy), trajectories(SLIDE)
    if loss == "actions":
        trainer = PolicyCloningTrainer(policy, settings(tmp_path), demonstrated_actions(data), tmp_path)
    else:
        texts = demonstrations(data, policy)
        said = {row[0]["content"][0]["text"] for row in texts["completion"]}
        assert said <= {policy.codec.text([a, b]) for a in range(3) for b in range(3)}
        trainer = PolicySFTTrainer(policy, settings(tmp_path), texts, tmp_path)
    trainer.train()
    assert any(not torch.equal(before[name], value) for name, value in weights(policy).items())
    assert trainer.rows[-1]["loss"] < trainer.rows[0]["loss"]


# ---- evaluation and figures ------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_row_of_an_evaluation(env_id, condition):
    result = evaluate(policy_for(env_id), make(env_id), held_out_seeds(6), condition)
    assert len(result.episodes) == 6


@both
def test_agreement_with_an_expert_is_of_bins(env_id):
    found = expert_agreement(policy_for(env_id), make(env_id), held_out_seeds(4))
    assert 0 <= found.agreed < found.states


@both
def test_a_gif_shows_the_numbers(env_id, tmp_path):
    env = make(env_id, 2)
    episodes = record_episodes(policy_for(env_id), env, held_out_seeds(2))
    d = env.action_space.shape[0]
    assert all(np.shape(e.probabilities) == np.shape(e.actions) == (len(e.rewards), d) for e in episodes)
    low, high = (2, 2) if env_id == PENDULUM else (0, 2)
    expected = (np.array(episodes[0].actions) + (low if env_id == PENDULUM else 0)) / (low + high)
    assert np.allclose(episodes[0].probabilities, expected, atol=1e-6)
    episode_gif(episodes, env.action_names, tmp_path / "a.gif")
    other = episodes[0]._replace(actions=(1 - np.array(episodes[0].actions)).tolist())
    episode_gif([other, episodes[1]], env.action_names, tmp_path / "b.gif")
    one, two = (np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("a.gif", "b.gif"))
    assert one.shape == two.shape and (one != two).any()  # another number, the same bar
