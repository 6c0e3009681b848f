"""A policy behind a chat API: by letters, by text, what an illegal answer becomes, and a judge of two actions."""

import math

import numpy as np
import pytest
import torch

from manako.agent.collector import RolloutCollector
from manako.agent.errors import TrainingError
from manako.agent.ppo_trainer import PPOTrainer
from manako.agent.report.evaluation import evaluate
from manako.envs import EpisodeVectorEnv
from manako.policies.answers.illegal import SKIP
from manako.policies.errors import PolicyError
from manako.policies.interface import Draws, PolicySpec, Rows
from manako.policies.remote.choosing import letter_logprobs
from manako.policies.remote.errors import RemoteError
from manako.policies.remote.judge import RemoteJudge
from manako.policies.remote.settings import RemoteSettings
from manako.policies.remote_policy import RemotePolicy, make_chooser
from tests.helpers.chat_server import ChatServer, completion, letters
from tests.helpers.small_runs import corridor_env, ppo_config

pytest.importorskip("openai", reason="the extra `remote` is not installed")
SPEC = PolicySpec(("up", "down", "left"), (8, 8, 3))
HAND = {"A": math.log(0.5), " A": math.log(0.1), "B": math.log(0.2), "The": math.log(0.1), "\n": math.log(0.04)}


@pytest.fixture
def made(tmp_path):
    """Makes policies of a server, with the cache in the test's folder."""

    def make(server, spec=SPEC, illegal_action=None, **settings):
        options = {"remote_model": "m", "remote_cache": str(tmp_path / "cache"), **settings}
        return RemotePolicy(spec, RemoteSettings(remote_url=server.url, **options), illegal_action=illegal_action)

    return make


class Fixed(np.random.Generator):
    """A generator that gives these numbers."""

    def __init__(self, *numbers):
        super().__init__(np.random.PCG64(0))
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)


def frames(count):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)


def act(policy, images, *numbers, instructions=None, **told):
    seen = policy.prepare(images, instructions or ["go"] * len(images), told)
    return policy.act(seen, Draws([Fixed(number) for number in numbers]), greedy=not numbers)


def system_of(body):
    return body["messages"][0]["content"]


def user_text(body):
    return body["messages"][1]["content"][0].get("text", "")


# ---- by letters ------------------------------------------------------------------------------------------------------


def test_letters_are_renormalised_as_by_hand():
    """A 0.5 + 0.1, B 0.2; C is not listed: 0.04 is the least of the list, and 1 - 0.94 = 0.06 is left."""
    assert np.allclose(np.exp(letter_logprobs(list(HAND.items()), 3)), np.array([0.6, 0.2, 0.04]) / 0.84)
    more = {**HAND, "x": math.log(0.05)}  # 0.01 is left, for C and D
    assert np.allclose(np.exp(letter_logprobs(list(more.items()), 4)), np.array([0.6, 0.2, 0.005, 0.005]) / 0.81)
    assert (
        np.allclose(np.exp(letter_logprobs([("A", 0.0)], 2)), [1, 0])
        and np.isfinite(letter_logprobs([("A", 0.0)], 2)).all()
    )
    assert letter_logprobs([("The", -0.1), ("a", -0.5), ("C", -1.0)], 2) is None
    assert np.allclose(np.exp(letter_logprobs([("A", -9999.0), ("B", -1.0)], 2)), [0, 1])


def test_a_sample_inverts_the_letters_and_greedy_takes_the_likeliest(made):
    with ChatServer(lambda body: letters(HAND)) as server:
        policy = made(server)
        acted = act(policy, frames(4), 0.70, 0.72, 0.95, 0.96)  # of 0.714, 0.952, 1
        assert acted.to_env.tolist() == [0, 1, 1, 2] and acted.outcomes == ["legal"] * 4
        said = torch.tensor([0.6, 0.2, 0.2, 0.04]) / 0.84
        assert torch.allclose(acted.logprobs, said.log()[:, None], atol=1e-6) and acted.mask.all()
        assert act(policy, frames(4)).to_env.tolist() == [0, 0, 0, 0] and len(server.bodies) == 4
        told = policy.evaluate_actions(Rows({"frames": torch.zeros(4)}), acted.actions)
        assert torch.equal(told.logprobs, acted.logprobs) and torch.allclose(
            told.distribution.exp().sum(-1), torch.ones(4)
        )
        body = server.bodies[0]
        assert system_of(body).startswith(
            "Follow the instruction. Actions: A: up, B: down, C: left. Answer with the letter"
        )
        assert user_text(body) == "go" and body["max_tokens"] == 1 and body["temperature"] == 1.0 and "seed" not in body
        hot = made(server, remote_temperature=2.0)
        roots = torch.tensor([0.6, 0.2, 0.04]).sqrt()
        assert act(hot, frames(1), 0.5).logprobs.item() == pytest.approx(
            float((roots[0] / roots.sum()).log()), abs=1e-6
        )


# ---- by text ---------------------------------------------------------------------------------------------------------


def test_text_is_read_where_there_are_no_letters(made, caplog):
    with ChatServer(lambda body: "Down." if "logprobs" not in body else completion("A")) as server:
        acted = act(made(server), frames(2), 0.25, 0.5)
        assert acted.to_env.tolist() == [1, 1] and acted.outcomes == ["legal"] * 2
        assert not acted.mask.any() and not acted.logprobs.any()
        assert caplog.text.count("its answers are read as text") == 1
        body = server.bodies[-1]
        assert system_of(body).startswith("Follow the instruction. Actions: up, down, left. Answer with the name")
        assert sorted(b["seed"] for b in server.bodies if "seed" in b) == [2**29, 2**30] and body["max_tokens"] == 64
        act(made(server), frames(1))
        assert server.bodies[-1]["temperature"] == 0 and "seed" not in server.bodies[-1]
        with pytest.raises(RemoteError, match="--remote_answers is letters, and .* gives no logprobs"):
            act(made(server, remote_answers="letters"), frames(1))


def test_equal_frames_in_different_places_are_different_samples(made):
    with ChatServer(lambda body: ("up", "down", "left")[body["seed"] % 3]) as server:
        policy, same = made(server, remote_answers="text"), np.repeat(frames(1), 3, axis=0)
        seeds = [0, 1, 2]
        acted = act(policy, same, *[(seed + 0.5) / 2**31 for seed in seeds])
        assert acted.to_env.tolist() == seeds and len(server.bodies) == 3
        assert act(policy, same, *[(seed + 0.5) / 2**31 for seed in seeds[::-1]]).to_env.tolist() == seeds[::-1]
        assert len(server.bodies) == 3


def test_an_illegal_answer_becomes_what_the_environment_has_for_it(made):
    said = {"a": "up", "b": "fly", "c": completion("up", finish_reason="length"), "d": completion("", refusal=1)}
    said["d"] = completion(None, message={"content": None, "refusal": "I cannot"})
    with ChatServer(lambda body: said[user_text(body)]) as server:
        asking = {"remote_answers": "text", "remote_concurrency": 1}
        acted = act(made(server, illegal_action="left", **asking), frames(4), instructions=list("abcd"))
        assert acted.to_env.tolist() == [0, 2, 2, 2] and acted.outcomes == ["legal", "unparsed", "cut", "refused"]
        skipping = act(made(server, **asking), frames(2), instructions=["a", "b"])
        assert skipping.to_env.tolist() == [0, SKIP] and skipping.outcomes == ["legal", "unparsed"]
        with pytest.raises(PolicyError, match="--illegal_action is 'fly'"):
            made(server, illegal_action="fly")


@pytest.mark.parametrize("answers", ["letters", "text"])
def test_what_is_not_allowed_is_not_offered(made, answers):
    def answer(body):
        assert "down" not in system_of(body) or "up" in system_of(body)
        return letters({"A": -3.0, "B": -0.1}) if "logprobs" in body else "left"

    masks = np.array([[True, False, True], [True, True, True]])
    with ChatServer(answer) as server:
        acted = act(made(server, remote_answers=answers), frames(2), action_masks=masks)
        assert acted.to_env.tolist() == ([2, 1] if answers == "letters" else [2, 2])  # B is left, then down
        offered = [system_of(body) for body in server.bodies]
        assert sum("down" in text for text in offered) == 1
        assert acted.actions["logprobs"][0, 1] == -math.inf


def test_a_letter_that_is_none_of_them_is_no_action(made):
    with ChatServer(lambda body: letters({"The": -0.1, "Z": -2.0})) as server:
        assert act(made(server, illegal_action="up"), frames(1)).outcomes == ["unparsed"]


# ---- in the house ----------------------------------------------------------------------------------------------------


def test_rows_hold_what_came_and_halves_act_as_the_whole(made):
    with ChatServer(lambda body: letters({"A": -1.0, "B": -1.1, "C": -1.2 - len(user_text(body))})) as server:
        policy, texts = made(server), ["go", "日本 \u0007up", "", "x" * 300]
        rows = policy.prepare(frames(4), texts)
        assert np.array_equal(rows["frames"].numpy(), frames(4)) and rows["text"].dtype == torch.uint8
        numbers = [0.1, 0.5, 0.9, 0.3]
        whole = policy.act(rows, Draws([Fixed(number) for number in numbers]))
        halves = [
            policy.act(rows.select(torch.tensor(half)), Draws([Fixed(numbers[slot]) for slot in half]))
            for half in ([0, 1], [2, 3])
        ]
        assert whole.to_env.tolist() == [index for half in halves for index in half.to_env.tolist()]
        parts = [body["messages"][1]["content"] for body in server.bodies]
        assert {part[0]["text"] for part in parts if len(part) == 2} == {"go", "日本 \\x07up", "x" * 300}
        assert [len(part) for part in parts].count(1) == 1  # an empty instruction is no part
        apart = [policy.prepare(frames(4)[slot : slot + 1], texts[slot : slot + 1]) for slot in range(4)]
        assert torch.equal(Rows.join(apart).digests(), rows.digests())
        with pytest.raises(PolicyError, match=r"Frames of \(9, 8, 3\) came"):
            policy.prepare(np.zeros((1, 9, 8, 3), np.uint8), ["go"])


def test_an_evaluation_counts_outcomes_and_asks_for_what_counts(made):
    """Corridor's instruction tells the steps left: each observation is asked once, of the counted episodes alone."""
    env = corridor_env(4)
    spec = PolicySpec(env.action_names, env.frame_shape)
    with ChatServer(lambda body: "right" if len(user_text(body)) % 3 else "well") as server:
        policy = made(server, spec, remote_answers="text", illegal_action="left")
        result = evaluate(policy, env, [1, 2, 3, 4, 5])
        steps = sum(episode.length for episode in result.episodes)
        assert sum(result.outcomes.values()) == steps and set(result.outcomes) == {"legal", "unparsed"}
        assert result.summary()["outcomes"] == result.outcomes
        alone = [evaluate(policy, corridor_env(1), [seed]) for seed in (1, 2, 3, 4, 5)]
        assert [each.episodes[0] for each in alone] == result.episodes
        assert result.outcomes == {
            name: sum(each.outcomes.get(name, 0) for each in alone) for name in ("legal", "unparsed")
        }
        sampled = made(server, spec, remote_answers="text", illegal_action="left")
        before = len(server.bodies)
        played = evaluate(sampled, corridor_env(4), [1, 2, 3, 4, 5], sample=True)
        assert len(server.bodies) - before == sum(episode.length for episode in played.episodes)
    assert "outcomes" not in evaluate(policy, env, [1], "random").summary()


def test_slots_that_play_their_seeds_again_are_not_asked_for(made):
    env = EpisodeVectorEnv("manako/ColorMatch-v0", 2, seed_lists=[[2], [4, 6, 8]])  # episodes of one step
    spec = PolicySpec(env.action_names, env.frame_shape)
    with ChatServer(lambda body: env.action_names[0]) as server:
        collector = RolloutCollector(env, made(server, spec, remote_answers="text"), 3, seed=0)
        rollout = collector.collect(0)
        assert len(server.bodies) == 4 and len(rollout.outcomes) == 6
    assert not EpisodeVectorEnv("manako/ColorMatch-v0", 2).uncounted().any()


def test_ppo_refuses_it(made, tmp_path):
    env = corridor_env(4)
    with ChatServer(lambda body: "left") as server, pytest.raises(TrainingError, match="RemotePolicy is a player"):
        PPOTrainer(made(server, PolicySpec(env.action_names, env.frame_shape)), ppo_config(tmp_path), env)


def test_what_it_says_of_itself(made):
    with ChatServer(lambda body: "up") as server:
        lines = dict(made(server).describe())
        assert lines["budget"] == "1,000 requests; prices are not given, so dollars are not counted"
        priced = made(server, remote_cost=2.0, remote_input_price=0.15, remote_output_price=0.6)
        # system text 105 + instruction 200 bytes, 2 x 32, a tile: 8,500; 64 tokens of an answer
        system = len(
            "Follow the instruction. Actions: up, down, left. Answer with the name of one of them and nothing else."
        )
        most = 0.15e-6 * (system + 200 + 64 + 8500) + 0.6e-6 * 64
        assert dict(priced.describe())["budget"] == (
            f"1,000 requests and $2; a request costs ${most:.5f} at most, so for {int(2 / most):,} at least"
        )


# ---- the judge -------------------------------------------------------------------------------------------------------


def judge_of(server, folder, **settings):
    options = {"remote_model": "m", "remote_cache": str(folder), **settings}
    chooser, _ = make_chooser(RemoteSettings(remote_url=server.url, **options))
    return RemoteJudge(chooser, SPEC.action_names)


@pytest.mark.parametrize("answers", ["letters", "text"])
def test_a_judge_is_believed_where_both_orders_agree(tmp_path, answers):
    """Of up and down the later in the alphabet; where left is named it takes what comes first."""

    def answer(body):
        listed = system_of(body).split("Actions: ")[1].split(".")[0].replace("A: ", "").replace("B: ", "").split(", ")
        best = 0 if "left" in listed else listed.index(max(listed))
        return letters({"AB"[best]: -0.2, "AB"[1 - best]: -2.0}) if "logprobs" in body else listed[best]

    with ChatServer(answer) as server:
        judge = judge_of(server, tmp_path, remote_answers=answers)
        pairs = [(0, 1), (1, 0), (0, 2), (2, 1)]
        assert judge(frames(4), ["go"] * 4, pairs) == [0, 0, None, None] and len(server.bodies) == 8
        assert judge.in_words() == "2 of 4 pairs told apart in both orders, 0 not answered"


def test_a_judge_that_names_neither_says_nothing(tmp_path):
    with ChatServer(lambda body: "both") as server:
        judge = judge_of(server, tmp_path, remote_answers="text")
        assert judge(frames(1), ["go"], [(0, 1)]) == [None] and judge.unparsed == 1
