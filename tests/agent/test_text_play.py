"""A policy that writes, in rollouts, learning, data sets and evaluation: what names no action is not played."""

import numpy as np
import pytest
import torch
from trl import SFTConfig

from manako.agent.collector import RolloutCollector
from manako.agent.data.demonstrators import RandomPlayer, ScriptedPlayer
from manako.agent.data.pasts import past_turns
from manako.agent.data.trajectories import (
    load_trajectories,
    save_trajectories,
    to_dataset,
    with_the_experts_actions,
)
from manako.agent.errors import TrainingError
from manako.agent.ppo_trainer import PPOTrainer
from manako.agent.report.evaluation import evaluate, record_episodes
from manako.agent.tuning.preferences import expert_pairs, pair_dataset
from manako.agent.tuning.supervised import demonstrated_actions, demonstrations
from manako.agent.tuning.trainers import PolicyCloningTrainer, PolicySFTTrainer
from manako.envs import EpisodeVectorEnv, held_out_seeds
from manako.envs.observation import MOST_SKIPPED
from manako.policies import PolicySource, load_policy
from manako.policies.answers.illegal import CUT, LEGAL, SKIP
from manako.policies.interface import Acted
from manako.policies.text_policy import TOKENS
from tests.helpers.rollout_equality import same_bits
from tests.helpers.small_runs import corridor_env, ppo_config

RELAY = "manako/Relay-v0"


def writer(env, **settings):
    source = PolicySource(action_format="text", **{"answer_template": "plain", "answer_tokens": 5, **settings})
    policy = load_policy(source, env.action_names, env.frame_shape)
    torch.manual_seed(1)
    torch.nn.init.normal_(policy.value_head.out.weight, std=0.3)
    return policy


def speaks(policy, answers):
    """Makes `act` say these answers, a list of texts for each call, as if they had been sampled."""
    calls = iter(answers)
    act = policy.act

    def said(inputs, draws, greedy=False):
        acted = act(inputs, draws, greedy)
        texts = next(calls)
        rows = [[*policy.prompts.go_on(text), policy.end_id] for text in texts]
        longest = max(map(len, rows))
        tokens = torch.tensor([row + [-1] * (longest - len(row)) for row in rows])
        acted.actions.columns[TOKENS] = tokens
        read = policy.reads(acted.actions)
        with torch.no_grad():
            evaluated = policy.evaluate_actions(inputs, acted.actions)
        return acted._replace(
            to_env=np.array([policy._to_env(answer) for answer in read]),
            outcomes=[answer.outcome for answer in read],
            logprobs=evaluated.logprobs,
            mask=tokens != -1,
            token_values=evaluated.token_values,
        )

    policy.act = said
    return policy


def test_an_answer_without_an_action_steps_nothing_and_pays_what_is_stated():
    """Corridor counts its own steps: it is stepped by `right` alone."""
    env = corridor_env(2, env_kwargs={"length": 41, "limit": 5})
    policy = speaks(writer(env, illegal_penalty=0.25), [["right", "fly"], ["fly", "fly"], ["right", "left"]])
    rollout = RolloutCollector(env, policy, 3, seed=0, record=True).collect(0)
    assert rollout.outcomes == ["legal", "unparsed", "unparsed", "unparsed", "legal", "legal"]
    assert rollout.record.to_env.tolist() == [[1, SKIP], [SKIP, SKIP], [1, 0]]
    # it pays -0.1 for its n-th step, and the policy 0.25 for each answer without an action
    paid = [[-0.1, -0.25], [-0.25, -0.25], [-0.2, -0.1]]
    torch.testing.assert_close(rollout.rewards, torch.tensor(paid))
    images = rollout.record.images.reshape(3, 2, *env.frame_shape)
    assert np.array_equal(images[0, 1], images[2, 1]) and np.array_equal(images[1, 0], images[2, 0])
    assert env.episode_returns.tolist() == pytest.approx([-0.3, -0.1])  # what the environment paid, no more


def test_the_stated_action_is_taken_in_its_place():
    env = corridor_env(1, env_kwargs={"length": 41, "limit": 5})
    policy = speaks(writer(env, illegal_action="left", illegal_penalty=0.0), [["fly"], ["right"]])
    rollout = RolloutCollector(env, policy, 2, seed=0, record=True).collect(0)
    assert rollout.record.to_env.tolist() == [[0], [1]] and rollout.outcomes == ["unparsed", "legal"]
    torch.testing.assert_close(rollout.rewards, torch.tensor([[-0.1], [-0.2]]))


def test_an_episode_of_answers_without_an_action_is_cut_and_no_success():
    env = corridor_env(3)
    result = evaluate(writer(env), env, held_out_seeds(3))
    assert [episode.length for episode in result.episodes] == [MOST_SKIPPED] * 3
    assert [episode.success for episode in result.episodes] == [False] * 3
    assert result.outcomes == {CUT: 3 * MOST_SKIPPED} and result.summary()["outcomes"] == result.outcomes


@pytest.mark.parametrize("sample", [False, True])
def test_an_answer_in_vain_is_not_written_again_while_the_same_is_shown(sample):
    """Some places get no action, so their episodes end there; the others go on, and no figure changes."""
    env = corridor_env(4, env_kwargs={"length": 41, "limit": 9})
    policy, asked = writer(env), []

    def act(inputs, draws, greedy=False):
        asked.append(len(inputs))
        lost = [digest % 3 == 0 for digest in inputs.digests().tolist()]
        to_env = np.array([SKIP if stuck else 1 for stuck in lost])
        outcomes = [CUT if stuck else LEGAL for stuck in lost]
        return Acted(inputs, to_env, torch.zeros(len(lost), 1), torch.ones(len(lost), 1) > 0, None, outcomes)

    policy.act = act
    result = evaluate(policy, env, held_out_seeds(12), sample=sample)
    turns = sum(episode.length for episode in result.episodes)
    stuck = [episode for episode in result.episodes if episode.length >= MOST_SKIPPED]
    assert 0 < len(stuck) < 12 and result.outcomes[CUT] == MOST_SKIPPED * len(stuck)
    assert result.outcomes[LEGAL] == turns - result.outcomes[CUT]
    assert all(episode.length == 9 for episode in result.episodes if episode not in stuck)
    if sample:  # drawn again each time
        assert len(asked) == len([rows for rows in asked if rows == 4])
    else:
        assert sum(asked) < turns - (MOST_SKIPPED - 2) * len(stuck) + 4 * 9


def test_skipped_turns_are_played_again():
    env = corridor_env(1, env_kwargs={"length": 41, "limit": 5})
    env.reset()
    for action in (1, SKIP, SKIP, 0):
        env.step(np.array([action]))
    again = corridor_env(1, env_kwargs={"length": 41, "limit": 5})
    shown = again.load_state_dict(env.state_dict())
    assert again.given_up == 0 and again.digests == env.digests
    assert np.array_equal(shown.images, env.observations.images) and again.episode_lengths.tolist() == [4]


def test_the_expert_goes_on_behind_a_skipped_turn():
    env = EpisodeVectorEnv("manako/GoTo-v0", 2)
    env.reset()
    first = env.expert_actions()
    env.step(np.array([SKIP, SKIP]))
    assert np.array_equal(env.expert_actions(), first)


# ---- learning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "credit", ["bilevel", *(pytest.param(name, marks=pytest.mark.slow) for name in ("step", "token"))]
)
def test_ppo_starts_at_ratio_1_and_prefers_what_paid(tmp_path, credit):
    env = EpisodeVectorEnv("manako/ColorMatch-v0", 32, seed=1, env_kwargs={"colors": ["red", "blue"]})
    policy = writer(env, constrain_actions=True, answer_tokens=9)
    args = ppo_config(
        tmp_path,
        num_iterations=8,
        num_steps=8,
        num_ppo_epochs=4,
        minibatch_size=128,
        learning_rate=5e-4,
        gamma=0.0,
        token_credit=credit,
    )
    trainer = PPOTrainer(policy, args, env)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "iteration" in row]
    assert all(row["first_ratio_error"] < 1e-4 and row["outcome/legal"] == 1 for row in rows)
    assert max(row["success_rate"] for row in rows) > rows[0]["success_rate"] + 0.1
    assert all(1 < row["answer_tokens"] <= 9 and row["illegal_cost"] == 0 < row["tokens_per_second"] for row in rows)
    assert 0 <= rows[-1]["padding"] < 0.5


def test_one_ratio_a_step_with_a_weighted_thought(tmp_path):
    env = EpisodeVectorEnv("manako/ColorMatch-v0", 8, seed=1)
    policy = writer(env, answer_template="[{thought}] {action}", answer_tokens=8, thought_coef=0.5)
    args = ppo_config(tmp_path, num_iterations=1, num_steps=4, minibatch_size=32)
    trainer = PPOTrainer(policy, args, env)
    trainer.train()
    row = next(row for row in trainer.state.log_history if "iteration" in row)
    assert row["first_ratio_error"] < 1e-4 and row["answer_tokens"] > 1
    args = ppo_config(tmp_path / "other", num_iterations=1, num_steps=4, minibatch_size=32, token_credit="bilevel")
    with pytest.raises(TrainingError, match="token_credit is bilevel, but the policy says an action by one number"):
        PPOTrainer(policy, args, env).train()


def test_slots_in_batches_play_the_same():
    env, other = corridor_env(6), corridor_env(6)
    policy = writer(env)
    whole = RolloutCollector(env, policy, 4, seed=3, batch_size=2, record=True).collect(0)
    parts = RolloutCollector(other, policy, 4, seed=3, batch_size=2, record=True).collect(0)
    same_bits(whole, parts)
    assert whole.token_values.shape == whole.mask.shape == whole.logprobs.shape


# ---- data ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def relay():
    return EpisodeVectorEnv(RELAY, 4, seed=2)


@pytest.fixture(scope="module")
def thinker(relay):
    return writer(relay, answer_template="json", answer_tokens=40)


@pytest.fixture(scope="module")
def shown(thinker):
    """What the expert does, wrong in some places, and what it thinks."""
    env = EpisodeVectorEnv(RELAY, 4, seed=2)
    player = ScriptedPlayer(thinker.spec, 0.3)
    rollout = RolloutCollector(env, player, 12, seed=5, record=True, ask_expert=True).collect(0)
    return to_dataset([rollout], thinker, RELAY, "expert", {})


def test_experts_thoughts_are_recorded_with_their_own_actions_alone(shown, relay, tmp_path):
    save_trajectories(shown, tmp_path / "data")
    rows, _ = load_trajectories(str(tmp_path / "data"))
    wrong = 0
    for row in rows:
        own = row["action"] == row["expert_action"]
        wrong += not own
        words = row["expert_thought"].split()
        assert len(words) == 3 and words[-1] == relay.action_names[row["expert_action"]]
        assert row["thought"] == (row["expert_thought"] if own else "")
    assert 0 < wrong < len(rows)
    env = EpisodeVectorEnv(RELAY, 4, seed=2)
    chance = RolloutCollector(env, RandomPlayer(relay_spec(relay)), 3, seed=5, record=True, ask_expert=True).collect(0)
    assert chance.record.thoughts is None and all(chance.record.expert_thoughts)
    silent = RolloutCollector(corridor_env(2), RandomPlayer(relay_spec(corridor_env(1))), 3, seed=5, record=True)
    assert silent.collect(0).record.expert_thoughts is None


def relay_spec(env):
    from manako.policies.interface import PolicySpec

    return PolicySpec(env.action_names, env.frame_shape)


def test_demonstrations_are_answers_with_thoughts(shown, thinker):
    rows = demonstrations(shown, thinker)
    for made, row in zip(rows, shown, strict=True):
        text = made["completion"][0]["content"][0]["text"]
        assert text == f'{{"thoughts": "{row["thought"]}", "action": "{row["action_name"]}"}}'
    # behind the prompt stand the very tokens that the policy reads as this answer, with its end
    given = thinker.training_inputs(
        np.stack([np.asarray(row["images"][0]) for row in rows.select(range(3))]),
        rows[:3]["prompt"],
        rows[:3]["completion"],
    )
    for row in range(3):
        tokens = given["input_ids"][row][given["completion_mask"][row].bool()].tolist()
        read = thinker.read(tokens)
        assert (read.outcome, read.action, read.thought) == (LEGAL, shown[row]["action"], shown[row]["thought"])


def test_both_losses_learn_answers(shown, thinker, relay, tmp_path):
    """The loss on actions is the answer's probability under the policy: a hand sum of its tokens'."""
    args = {
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "num_train_epochs": 1,
        "save_strategy": "no",
    }
    args |= {"per_device_train_batch_size": 8, "learning_rate": 1e-3, "disable_tqdm": True, "max_length": None}
    rows = demonstrated_actions(shown, thoughts=True)
    policy = writer(relay, answer_template="json", answer_tokens=40)
    trainer = PolicyCloningTrainer(policy, SFTConfig(str(tmp_path / "a"), **args), rows, tmp_path)
    batch = trainer.collate([rows[row] for row in range(8)])
    loss = trainer.compute_loss(policy, batch)
    actions = policy.actions_from_env(np.array(rows[:8]["action"]), rows[:8]["thought"])
    logprobs = policy.evaluate_actions(batch["inputs"].select(batch["observation"]), actions).logprobs
    assert float(loss.detach()) == pytest.approx(-float(logprobs.detach().sum()) / 8, rel=1e-5)
    trainer.train()
    assert trainer.rows[-1]["loss"] < trainer.rows[0]["loss"]
    tokens = PolicySFTTrainer(policy, SFTConfig(str(tmp_path / "b"), **args), demonstrations(shown, policy), tmp_path)
    tokens.train()
    assert np.isfinite(tokens.rows[-1]["loss"])


def test_own_play_is_recorded_as_it_was_written(relay, tmp_path):
    env = EpisodeVectorEnv(RELAY, 2, seed=2)
    policy = writer(relay, answer_template="json", answer_tokens=40)
    names = relay.action_names
    good, bad = policy.template.write(names[2], "so"), "nothing"
    speaks(policy, [[good, bad], [good, good]])
    rollout = RolloutCollector(env, policy, 2, seed=0, record=True, ask_expert=True).collect(0)
    data = to_dataset([rollout], policy, RELAY, "policy", {})
    assert [(row["action"], row["outcome"], row["thought"]) for row in data] == [
        (2, "legal", "so"),
        (2, "legal", "so"),
        (SKIP, "unparsed", ""),
        (2, "legal", "so"),
    ]
    assert data["reward"] == [0.0, 0.0, 0.0, 0.0]  # what was paid for an answer without an action is no reward
    assert data[2]["action_name"] == "" and data[0]["action_tokens"] == [*policy.prompts.go_on(good), policy.end_id]
    assert len(demonstrations(data, policy)) == 3


def test_a_gif_shows_what_was_written(relay):
    env = EpisodeVectorEnv(RELAY, 1, seed=2)
    policy = writer(relay, answer_template="json", answer_tokens=40)
    speaks(policy, [["nothing"], [policy.template.write(relay.action_names[0], "so")]])
    episode = record_episodes(policy, env, held_out_seeds(1))[0]
    assert episode.answers == ["nothing", f'{{"thoughts": "so", "action": "{relay.action_names[0]}"}}']
    assert list(episode.actions) == [SKIP, 0]


def test_pairs_name_each_action_behind_its_own_thought(shown, thinker):
    pairs = pair_dataset(shown, expert_pairs(shown), thinker)
    wrong = [row for row in shown if row["action"] != row["expert_action"]]
    assert len(pairs) == len(wrong) > 0
    for pair, row in zip(pairs, wrong, strict=True):
        chosen, rejected = (pair[name][0]["content"][0]["text"] for name in ("chosen", "rejected"))
        best = thinker.spec.action_names[row["expert_action"]]
        assert chosen == f'{{"thoughts": "{row["expert_thought"]}", "action": "{best}"}}'
        assert rejected == f'{{"thoughts": "", "action": "{row["action_name"]}"}}'


def test_the_experts_actions_bring_its_thoughts_and_leave_the_past_as_it_was(shown, thinker):
    told = with_the_experts_actions(shown)
    assert told["action"] == shown["expert_action"] and told["thought"] == shown["expert_thought"]
    assert told["action"] != shown["action"]
    turns = [past.tolist() for past in past_turns(told, 1)]
    assert turns == [past.tolist() for past in past_turns(shown, 1)]
    texts = [row["completion"][0]["content"][0]["text"] for row in demonstrations(told, thinker)]
    assert all(f'"{row["expert_thought"]}"' in text for row, text in zip(shown, texts, strict=True))
