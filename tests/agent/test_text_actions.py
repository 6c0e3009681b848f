"""Environments whose actions are texts: written by the policy that writes, played, recorded and learned from."""

import json

import gymnasium as gym
import numpy as np
import pytest
import torch

from manako import envs
from manako.agent.collector import RolloutCollector
from manako.agent.data.demonstrators import RandomPlayer, ScriptedPlayer
from manako.agent.data.lerobot_format import export_lerobot
from manako.agent.data.trajectories import load_trajectories, save_trajectories, to_dataset
from manako.agent.errors import TrainingError
from manako.agent.ppo_trainer import PPOTrainer
from manako.agent.report.evaluation import evaluate, expert_agreement, record_episodes
from manako.agent.report.figures import episode_gif
from manako.agent.tuning.supervised import demonstrations
from manako.envs import EpisodeVectorEnv, held_out_seeds
from manako.policies import PolicyError, PolicySource, load_policy
from manako.policies.interface import Draws, PolicySpec, Rows
from manako.policies.text_policy import FILLER, TOKENS
from manako.spaces import TextCodes, random_vectors, space_from_json, space_to_json
from tests.helpers.small_runs import ppo_config

SPELL = "manako/Spell-v0"


def spell(num_envs=4, **options):
    return EpisodeVectorEnv(SPELL, num_envs, **options)


def writer(env, **settings):
    source = PolicySource(**{"answer_tokens": 5, **settings})
    return load_policy(source, env.action_names, env.frame_shape, env.action_space)


def test_texts_as_code_points():
    space = TextCodes(gym.spaces.Text(4, min_length=1, charset="ab眼"))
    assert space.encode("a眼").tolist() == [97, ord("眼"), -1, -1] and space.decode(space.encode("a眼")) == "a眼"
    assert space.contains(space.encode("b")) and space.contains(space.encode("abab"))
    for codes in (space.encode("x"), space.encode(""), space.skipped, np.array([97, -1, 97, -1]), np.zeros(3, int)):
        assert not space.contains(codes)
    assert space_from_json(json.loads(json.dumps(space_to_json(space)))) == space != TextCodes(gym.spaces.Text(4))
    draw = np.random.default_rng(0)
    drawn = random_vectors(space, lambda: draw.random(2000))
    assert all(space.contains(codes) for codes in drawn)
    lengths = (drawn >= 0).sum(1)
    assert np.abs(np.bincount(lengths, minlength=5)[1:] / 2000 - 0.25).max() < 0.04  # each length alike
    assert np.abs((drawn[:, 0] == 97).mean() - 1 / 3) < 0.04


def test_the_environment_is_given_texts_and_plays_them_again():
    env = spell(2, seed=1)
    env.reset()
    words = [env.action_space.decode(codes) for codes in env.expert_actions()]
    assert [each.env.unwrapped.word for each in env._envs] == words
    wrong = env.action_space.encode("rgb")
    first = env.step(np.stack([wrong, env.action_space.skipped]))
    assert first.rewards.tolist() == [0, 0] and [each.env.unwrapped.tries for each in env._envs] == [1, 0]
    again = spell(2, seed=1)
    again.load_state_dict(json.loads(json.dumps(env.state_dict())))
    assert again.given_up == 0 and again.digests == env.digests
    assert again.step(again.expert_actions()).rewards.tolist() == [1, 1]
    with pytest.raises(envs.EnvError, match="got the action 'x', which is not in Text"):
        env.step(np.stack([env.action_space.encode("x")] * 2))
    assert envs.check_vlm_env(SPELL) == []


def test_what_a_policy_writes():
    env = spell()
    policy = writer(env)
    assert policy.template.text == "{action}" and policy.texts == env.action_space
    assert "a text of 1 to 3 characters among rgb; answer in the form ..." in policy.prompt("x")

    def read(text):
        return policy.read([*policy.prompts.go_on(text), policy.end_id])[0]

    assert [read(text) for text in ("rb", "r", "rgbr", "x", "")] == ["legal", "legal", *["not allowed"] * 3]
    rows = policy.actions_from_env(np.stack([env.action_space.encode("rb"), env.action_space.encode("g")]))
    assert policy.answers(rows) == ["rb", "g"]
    seen = env.reset()
    inputs = policy.prepare(seen.images, seen.instructions)
    acted = policy.act(inputs, Draws([np.random.default_rng(slot) for slot in range(4)]))
    assert acted.to_env.shape == (4, 3) and acted.to_env.dtype == np.int64
    assert (policy.evaluate_actions(inputs, acted.actions).logprobs - acted.logprobs).abs().max() < 1e-4
    thinking = writer(env, answer_template="json", answer_tokens=40)
    assert thinking.answers(thinking.actions_from_env(np.stack([env.action_space.encode("rb")]), ["so"])) == [
        '{"thoughts": "so", "action": "rb"}'
    ]


def spelled_in_all_ways(policy, lead):
    """Yields all constrained answers behind the tokens of `lead`, as tokens."""
    ways = [lead]
    while ways:
        way = ways.pop()
        for token in policy._allowed(way, None):
            if token == policy.end_id:
                yield [*way, token]
            else:
                ways.append([*way, token])


@torch.no_grad()
@pytest.mark.parametrize("template", ["plain", "[{action}]"])
def test_constrained_texts_are_in_the_space_and_add_up_to_one(template):
    """All ways to spell all texts, token by token: their probabilities are 1 in sum."""
    env = spell(1)
    policy = writer(env, constrain_actions=True, answer_template=template, answer_tokens=8)
    seen = env.reset()
    inputs = policy.prepare(seen.images, seen.instructions)
    lead = list(policy.prompts.go_on("[")) if template != "plain" else []
    total, texts = 0.0, set()
    for answer in spelled_in_all_ways(policy, lead):
        rows = Rows({TOKENS: torch.tensor([answer])}, {TOKENS: FILLER})
        read = policy.reads(rows)[0]
        assert read.outcome == "legal"
        texts.add(read.written)
        logprobs = policy.evaluate_actions(inputs, rows).logprobs[0, len(lead) :]
        total += float(logprobs.sum().exp())
    assert len(texts) == 3 + 9 + 27 and total == pytest.approx(1, abs=1e-4)
    if template == "plain":
        acted = policy.act(inputs, Draws([np.random.default_rng(0)]))
        assert acted.outcomes == ["legal"]


def test_it_is_saved_and_loaded_without_flags(tmp_path):
    env = spell()
    policy = writer(env, answer_template="[{action}]", illegal_action="r")
    policy.save(tmp_path)
    again = load_policy(PolicySource(str(tmp_path)), env.action_names, env.frame_shape, env.action_space)
    assert again.text == policy.text and again.texts == policy.texts


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"action_format": "token"}, "--action_format token came for the actions Text"),
        ({"illegal_action": "x"}, "--illegal_action is 'x': expected a text in Text"),
        ({"history": 2}, "which have no names to tell"),
    ],
)
def test_what_does_not_fit(settings, says):
    with pytest.raises(PolicyError, match=says):
        writer(spell(), **settings)


def test_it_learns_from_experts_and_from_what_was_paid(tmp_path):
    """Cloned on the expert's texts, then PPO: the held-out success of a policy that looks, with a random one beside."""
    env = spell(16, seed=3)
    policy = writer(env)
    player = ScriptedPlayer(policy.spec, 0.2)
    data = to_dataset(
        [RolloutCollector(env, player, 12, 5, record=True, ask_expert=True).collect(0)], policy, SPELL, "e", {}
    )
    save_trajectories(data, tmp_path / "data")
    rows, about = load_trajectories(
        str(tmp_path / "data"), SPELL, env.action_names, env.frame_shape, action_space=env.action_space
    )
    assert about["action_space"] == {"kind": "Text", "min": 1, "max": 3, "characters": "rgb"}
    assert set("".join(rows["action_name"])) <= set("rgb") and any(
        a != b for a, b in zip(rows["action"], rows["expert_action"], strict=True)
    )
    made = demonstrations(rows, policy)
    assert made[0]["completion"][0]["content"][0]["text"] == rows[0]["action_name"]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)
    learning = spell(64, seed=9)
    for _ in range(60):  # cloning by the door alone
        seen = learning.reset()
        inputs = policy.prepare(seen.images, seen.instructions)
        loss = (
            -policy.evaluate_actions(inputs, policy.actions_from_env(learning.expert_actions())).logprobs.sum(-1).mean()
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trainer = PPOTrainer(
        policy, ppo_config(tmp_path / "ppo", num_iterations=2, num_steps=4, learning_rate=1e-4), spell(8)
    )
    trainer.train()
    row = next(row for row in trainer.state.log_history if "iteration" in row)
    assert row["first_ratio_error"] < 1e-4 and row["outcome/legal"] > 0.5
    result = evaluate(policy, spell(8), held_out_seeds(40))
    chance = evaluate(policy, spell(8), held_out_seeds(40), "random")
    assert result.summary()["success"] > 0.7 > 0.4 > chance.summary()["success"]
    assert set(result.outcomes) <= {"legal", "not allowed", "cut"}
    assert expert_agreement(policy, spell(8), held_out_seeds(8)).share > 0.7
    played = record_episodes(policy, spell(1), held_out_seeds(1))
    assert played[0].answers and len(played[0].actions[0]) == 3
    episode_gif(played, env.action_names, tmp_path / "a.gif", 2)
    with pytest.raises(TrainingError, match="are texts, and LeRobot's are numbers"):
        export_lerobot(rows, about, tmp_path / "lerobot", 5)


def test_random_players_write_texts():
    env = spell(2)
    rollout = RolloutCollector(
        env, RandomPlayer(PolicySpec(("text",), env.frame_shape, vectors=env.action_space)), 3, 0
    )
    rollout.record = True
    played = rollout.collect(0)
    assert all(env.action_space.contains(codes) for codes in played.record.to_env.reshape(-1, 3))


@torch.no_grad()
@pytest.mark.parametrize(
    ("space", "template", "texts"),
    [
        (gym.spaces.Text(2, min_length=0, charset="a眼"), "plain", 1 + 2 + 4),
        (gym.spaces.Text(2, min_length=0, charset="🙂"), "tags", 3),
        (gym.spaces.Text(2, min_length=1, charset="🙂🙁 "), "<{action}>", 3 + 9),
    ],
)
def test_characters_of_several_tokens_and_no_characters_at_all(space, template, texts):
    """Every text of the space can be sampled, nothing else, and what is sampled is what the environment is given."""
    policy = load_policy(
        PolicySource(answer_tokens=60, constrain_actions=True, answer_template=template),
        ("text",),
        (16, 16, 3),
        TextCodes(space),
    )
    cue = policy.template.write("", "").removesuffix(policy.template.after)
    lead = list(policy.prompts.go_on(cue)) if cue else []
    found = set()
    for tokens in spelled_in_all_ways(policy, lead):
        answer = policy.read(tokens)
        assert answer.outcome == "legal"
        found.add(answer.written)
    assert len(found) == texts and all(map(space.contains, found))
    inputs = policy.prepare(np.zeros((8, 16, 16, 3), np.uint8), ["say it"] * 8)
    acted = policy.act(inputs, Draws([np.random.default_rng(slot) for slot in range(8)]))
    for codes, outcome in zip(acted.to_env, acted.outcomes, strict=True):
        assert policy.texts.contains(codes) == (outcome == "legal")
    assert (policy.evaluate_actions(inputs, acted.actions).logprobs - acted.logprobs).abs().max() < 1e-4
    vectors = np.stack([policy.texts.encode(text) for text in sorted(found)])
    again = policy.reads(policy.actions_from_env(vectors))
    assert [answer.written for answer in again] == sorted(found)
    assert {answer.outcome for answer in again} == {"legal"}


@torch.no_grad()
def test_constrained_names_of_characters_of_several_tokens():
    names = ("上", "下", "🙂 wait", "up")
    source = PolicySource(action_format="text", answer_template="plain", constrain_actions=True, answer_tokens=24)
    policy = load_policy(source, names, (16, 16, 3))
    inputs = policy.prepare(np.random.default_rng(0).integers(0, 255, (64, 16, 16, 3), np.uint8), ["say it"] * 64)
    acted = policy.act(inputs, Draws([np.random.default_rng(slot) for slot in range(64)]))
    assert set(acted.outcomes) == {"legal"} and set(acted.to_env.tolist()) == {0, 1, 2, 3}
