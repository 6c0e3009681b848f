"""What an environment does not allow is nowhere done: rollouts, evaluation, players, data sets, preferences.

`Gates` raises at every action that its mask does not allow, so a play that ends has obeyed.
"""

import numpy as np
import pytest
import torch

from manako.agent.collector import RolloutCollector
from manako.agent.data.demonstrators import RandomPlayer, RecordedPlayer, ScriptedPlayer
from manako.agent.data.lerobot_format import export_lerobot
from manako.agent.data.recordings import Recording
from manako.agent.data.trajectories import load_trajectories, save_trajectories, to_dataset, without_masks
from manako.agent.errors import TrainingError
from manako.agent.ppo_loop import train_ppo
from manako.agent.report.evaluation import CONDITIONS, evaluate, expert_agreement, record_episodes
from manako.agent.report.figures import episode_gif
from manako.agent.rng import action_draws
from manako.agent.rollout import merge
from manako.agent.tuning.preferences import branch_pairs, pair_dataset, state_pairs
from manako.agent.tuning.supervised import demonstrated_actions
from manako.agent.tuning.trainers import PolicyCloningTrainer
from manako.envs import EnvError, EpisodeVectorEnv, held_out_seeds
from manako.policies.interface import Rows
from tests.agent.tuning.test_trainers import settings
from tests.helpers.rollout_equality import same_bits
from tests.helpers.small_envs import tiny_policy
from tests.helpers.small_runs import ppo_config, weights

GATES = "tests/Gates-v0"


def gates(num_envs=4, **options):
    return EpisodeVectorEnv(GATES, num_envs, **options)


def jumpy_policy(env):
    """A policy that would rather jump, which is never allowed."""
    policy = tiny_policy(env)
    head = policy.base_vlm.get_output_embeddings()
    jump = policy.codec.token_ids[3][0]
    with torch.no_grad():
        others = [ids[0] for ids in policy.codec.token_ids[:3]]
        inputs = policy.prepare(env.reset().images, ["walk right"] * env.num_envs)
        hidden = policy.reading.read_hidden(inputs).mean(0)
        head.weight[jump] = 10 * hidden / hidden.norm() ** 2 + head.weight[others].mean(0)
    return policy


@pytest.fixture(scope="module")
def policy():
    return jumpy_policy(gates())


@pytest.fixture(scope="module")
def rollout(policy):
    return RolloutCollector(gates(), policy, 12, seed=0, record=True, ask_expert=True).collect(0)


@pytest.fixture(scope="module")
def trajectories(policy, rollout):
    return to_dataset([rollout], policy, GATES, "policy", {})


def test_the_policy_would_jump_if_it_were_let(policy):
    env = gates(env_kwargs={"masked": False})
    shown = env.reset()
    logprobs, _ = policy.distribution(policy.prepare(shown.images, shown.instructions))
    assert (logprobs.argmax(-1) == 3).all() and (logprobs[:, 3].exp() > 0.9).all()
    free = RolloutCollector(env, policy, 6, seed=0).collect(0)  # trained with masks, played without
    assert "action_mask" not in free.inputs.columns and (free.actions["index"] == 3).float().mean() > 0.8


def test_a_rollout_obeys_and_stores_what_was_allowed(rollout):
    masks, taken = rollout.inputs["action_mask"], rollout.actions["index"]
    assert masks.shape == (48, 4) and masks.gather(1, taken[:, None]).all() and not masks[:, 3].any()
    assert torch.equal(rollout.record.action_masks.view(48, 4), masks)
    assert (masks.sum(1) == 1).any() and (masks.sum(1) == 3).any()
    assert rollout.bootstrap["action_mask"].shape == (len(rollout.bootstrap), 4)
    assert rollout.truncated.any() and rollout.terminated.any()


def test_the_stored_probabilities_are_those_over_what_was_allowed(policy, rollout):
    inputs = rollout.inputs
    bare = Rows({name: column for name, column in inputs.columns.items() if name != "action_mask"}, inputs.fillers)
    with torch.no_grad():
        p = policy.distribution(bare)[0].exp() * inputs["action_mask"]
    expected = (p / p.sum(1, keepdim=True)).gather(1, rollout.actions["index"][:, None]).log()
    assert torch.allclose(rollout.logprobs.flatten(0, 1), expected, atol=1e-4)


def test_any_split_of_the_slots_plays_the_same(policy, rollout):
    halves = [
        RolloutCollector(gates(2, first_slot=first), policy, 12, 0, batch_size=2, record=True, ask_expert=True)
        for first in (0, 2)
    ]
    whole = RolloutCollector(gates(), policy, 12, 0, batch_size=2, record=True, ask_expert=True)
    for iteration in range(2):
        same_bits(merge([half.collect(iteration) for half in halves]), whole.collect(iteration))


def test_ppo_learns_under_masks(tmp_path):
    env = gates(8)
    policy = jumpy_policy(env)
    before = weights(policy)
    config = ppo_config(tmp_path, num_iterations=3, num_steps=8, minibatch_size=32, ent_coef=0.05)
    rows = list(train_ppo(policy, RolloutCollector(gates(8), policy, 8, 0), config))
    assert all(row["first_ratio_error"] < 1e-4 and np.isfinite(row["loss"]) for row in rows)
    assert any(not torch.equal(before[name], value) for name, value in weights(policy).items())
    assert all(value.isfinite().all() for value in weights(policy).values())


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("sample", [False, True])
def test_every_row_of_an_evaluation_obeys(policy, condition, sample):
    env = gates(3)
    result = evaluate(policy, env, held_out_seeds(12), condition, sample)
    assert len(result.episodes) == 12


def test_the_expert_is_agreed_with_where_nothing_else_is_allowed(policy):
    found = expert_agreement(policy, gates(4), held_out_seeds(4))
    assert found.states > 0


def test_the_bars_of_a_gif_are_of_what_is_allowed(policy, tmp_path):
    env = gates(2)
    played = record_episodes(policy, env, held_out_seeds(2))
    bars = np.concatenate([episode.probabilities for episode in played])
    assert (bars[:, 3] == 0).all() and np.allclose(bars.sum(1), 1, atol=1e-5)
    episode_gif(played, env.action_names, tmp_path / "a.gif")
    assert (tmp_path / "a.gif").stat().st_size > 0


def test_players_obey(policy):
    for player in (RandomPlayer(policy.spec), ScriptedPlayer(policy.spec, error_rate=0.7)):
        played = RolloutCollector(gates(), player, 200, seed=0, record=True, ask_expert=True).collect(0)
        masks, taken = played.record.action_masks.flatten(0, 1), torch.from_numpy(played.record.to_env).flatten()
        assert masks.gather(1, taken[:, None]).all()
        three = masks.sum(1) == 3
        shares = torch.bincount(taken[three], minlength=4) / three.sum()
        expected = [1 / 3, 1 / 3, 1 / 3, 0] if isinstance(player, RandomPlayer) else [0.35, 0.3, 0.35, 0]
        assert np.allclose(shares, expected, atol=0.07)
        alone = masks.sum(1) == 1
        assert alone.any() and (played.logprobs.flatten()[alone] == 0).all()


def test_a_recording_of_what_is_not_allowed_is_refused(policy):
    player = RecordedPlayer(policy.spec, [[Recording(5, (3,), "line 1")]])
    collector = RolloutCollector(gates(1, seed_lists=player.seed_lists), player, 1, 0)
    with pytest.raises(EnvError, match=r"got an action that its action_mask does not allow.*episode seed 5.*'jump'"):
        collector.collect(0)


def test_a_data_set_holds_what_was_allowed(trajectories, tmp_path):
    save_trajectories(trajectories, tmp_path / "data")
    kept, about = load_trajectories(str(tmp_path / "data"), GATES)
    assert all(mask[action] and not mask[3] for mask, action in zip(kept["action_mask"], kept["action"], strict=True))
    assert "action_mask" not in without_masks(kept).column_names
    export_lerobot(kept, about, tmp_path / "lerobot", 2)
    import pyarrow.parquet as pq

    table = pq.read_table(next((tmp_path / "lerobot" / "data").rglob("*.parquet")))
    assert table["manako.allowed"].to_pylist() == kept["action_mask"][:]


def test_an_environment_without_masks_makes_the_columns_of_before(policy):
    env = gates(env_kwargs={"masked": False})
    played = RolloutCollector(env, RandomPlayer(policy.spec), 12, 0, record=True).collect(0)
    assert played.record.action_masks is None
    assert "action_mask" not in to_dataset([played], policy, GATES, "random", {}).column_names


def test_cloning_is_out_of_what_was_allowed(policy, trajectories, tmp_path):
    data = demonstrated_actions(trajectories)
    trainer = PolicyCloningTrainer(policy, settings(tmp_path), data, tmp_path)
    batch = trainer.collate([data[row] for row in range(len(data))])
    with torch.no_grad():
        loss = trainer.compute_loss(policy.model, batch)
    mask = torch.tensor(data["action_mask"])
    bare = trainer.collate([{**data[row], "action_mask": None} for row in range(len(data))])
    with torch.no_grad():
        p = policy.distribution(bare["inputs"])[0].exp()[bare["observation"]] * mask
    expected = -(p / p.sum(1, keepdim=True)).gather(1, torch.tensor(data["action"])[:, None]).log().mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)


def test_a_demonstration_of_what_was_not_allowed_is_refused(trajectories):
    wrong = trajectories.map(lambda row: {"action": 3, "action_name": "jump"})
    with pytest.raises(TrainingError, match="Row 0 of the dataset took 'jump', which its action_mask does not allow"):
        demonstrated_actions(wrong)
    assert len(demonstrated_actions(without_masks(wrong))) == len(wrong)


def test_pairs_are_of_allowed_actions(policy, trajectories):
    env = gates(4)
    pairs = branch_pairs(trajectories, env, lambda _: np.ones(4, np.int64), steps_per_episode=6, seed=0)
    masks = trajectories["action_mask"]
    assert pairs and all(masks[row][good] and masks[row][bad] for row, good, bad in pairs)
    forbidden = [(row, 1, 3) for row in range(3)]
    data = pair_dataset(trajectories, [*forbidden, *pairs], policy)
    assert len(data) == len(pairs)
    assert "jump" not in {row["content"][0]["text"] for part in data["rejected"] for row in part}
    with pytest.raises(TrainingError, match="No two actions could be told apart"):
        pair_dataset(trajectories, forbidden, policy)


def test_the_same_sight_with_other_masks_is_another_state(trajectories):
    rows = trajectories.select([0, 0]).map(
        lambda row, number: {"action": number, "reward": float(number), "episode": number, "step": 0}, with_indices=True
    )
    both = rows.map(lambda row: {"action_mask": [True, True, False, False]})
    apart = rows.map(lambda row, number: {"action_mask": [number == 0, number == 1, False, False]}, with_indices=True)
    assert state_pairs(both) == [(0, 1, 0)] and state_pairs(apart) == []


def test_draws_are_the_same_with_masks_that_allow_all(policy):
    env = gates()
    images = env.reset().images
    texts = ["walk right"] * 4
    everything = {"action_masks": np.ones((4, 4), bool)}
    acted = [
        policy.act(policy.prepare(images, texts, told), action_draws(0, range(4), 0)) for told in (None, everything)
    ]
    assert acted[0].to_env.tolist() == acted[1].to_env.tolist()
