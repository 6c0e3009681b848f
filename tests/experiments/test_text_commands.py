"""Answers in text from the command line: trained, evaluated without naming them again, and what does not fit."""

import json
import sys

import pytest

from manako.experiments import evaluate, run_ppo, run_sft
from manako.experiments.common.command_line import run_main
from tests.helpers.words import last_of_each

SMALL = "--env manako/ColorMatch-v0 --num_envs 8 --num_steps 4 --minibatch_size 32 --eval_episodes 8 --gif_episodes 1"
WRITING = "--action_format text --answer_template plain --answer_tokens 6"


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)

    def command(module, words):
        monkeypatch.setattr(sys, "argv", [f"{module.__name__.rsplit('.')[-1]}.py", *last_of_each(words.split())])
        with pytest.raises(SystemExit) as ended:
            run_main(module.main)
        return ended.value.code, *capfd.readouterr()

    return command


def test_a_policy_that_writes_is_trained_and_evaluated(run, tmp_path):
    code, out, err = run(run_ppo, f"{SMALL} {WRITING} --total_steps 64 --output_dir run")
    assert code == 0, err
    assert "in text as '{action}', 6 tokens at most; a ratio a token" in out and "the environment is not stepped" in out
    assert "answers of policy: " in out
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert {"outcome/legal", "outcome/cut", "answer_tokens", "tokens_per_second", "illegal_cost", "padding"} <= set(
        rows[-1]
    )
    assert sum(value for name, value in rows[-1].items() if name.startswith("outcome/")) == pytest.approx(1)
    summary = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert sum(summary["policy"]["outcomes"].values()) >= 8 and "outcomes" not in summary["random"]
    assert (tmp_path / "run/after.gif").is_file()
    code, out, err = run(evaluate, "--policy run --episodes 8 --sample true --top_p 0.9 --output again.json")
    assert code == 0 and "answers of policy: " in out, err


@pytest.mark.parametrize("credit", ["step", "token"])
def test_a_policy_that_writes_learns_in_half_precision(credit, run, tmp_path):
    words = f"{SMALL} {WRITING} --total_steps 96 --bf16 true --token_credit {credit} --output_dir run"
    code, _, err = run(run_ppo, words)
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
    assert len(rows) == 3 and all(row["first_ratio_error"] < 1 for row in rows)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            "--answer_template json",
            "--answer_template json came, which is of answers in text: expected --action_format",
        ),
        ("--thought_coef 0.5 --action_format token", "--thought_coef 0.5 came, which is of answers in text"),
        ("--illegal_action up", "--illegal_action up came, which is of answers in text"),
        (f"{WRITING} --illegal_action fly", "--illegal_action is 'fly': expected one of red, green, blue, yellow"),
        (f"{WRITING} --policy vilbert", "answers with one token at a mask, so it writes no text"),
        (f"{WRITING} --answer_tokens 1", "answer_tokens is 1: expected"),
        (f"{WRITING} --temperature 0", "temperature is 0"),
        ("--action_format text --answer_template up", "expected one of json, tags, plain, or a text with"),
        ("--token_credit bilevel", "token_credit is bilevel, but the policy says an action by one number"),
    ],
)
def test_what_does_not_fit_is_one_sentence(run, tmp_path, words, says):
    code, _, err = run(run_ppo, f"{SMALL} --total_steps 64 --output_dir run {words}")
    assert code == 2 and says in err and err.count("\n") == 1 and "Traceback" not in err
    assert not (tmp_path / "run/final").exists()


def test_a_nucleus_without_draws_or_text_is_refused(run):
    for words in ("--policy tiny --env manako/ColorMatch-v0 --top_p 0.5", "--policy tiny --sample true --top_p 0.5"):
        code, _, err = run(evaluate, f"{words} --episodes 4")
        assert code == 2 and "--top_p 0.5 came, which is of sampled answers in text" in err


def test_an_answer_that_is_too_long_for_its_demonstrations_is_said(run):
    from manako.experiments import collect

    assert run(collect, "--env manako/ColorMatch-v0 --episodes 8 --num_envs 8 --output data")[0] == 0
    words = "--env manako/ColorMatch-v0 --dataset data --action_format text --answer_tokens 9 --output_dir sft"
    code, _, err = run(run_sft, words)
    assert code == 2 and "tokens, and at most 9 are written: expected answer_tokens of" in err
