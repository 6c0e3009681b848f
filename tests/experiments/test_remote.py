"""The runners with a model behind a chat API: evaluate, collect, judge; stopped by the budget and gone on; no key."""

import json
import sys

import pytest
import yaml

from manako.agent.data.trajectories import load_trajectories
from manako.agent.tuning.preferences import expert_pairs, judged_pairs
from manako.agent.tuning.supervised import demonstrated_actions, demonstrations
from manako.experiments import collect, evaluate, run_dpo, run_ppo, run_sft
from manako.experiments.common.command_line import run_main
from tests.helpers.chat_server import ChatServer, Fault, letters
from tests.helpers.small_runs import goto_policy
from tests.helpers.words import last_of_each

pytest.importorskip("openai", reason="the extra `remote` is not installed")
KEY = "sk-secret/0123456789"
RUNNERS = {"evaluate": evaluate, "collect": collect, "run_dpo": run_dpo, "run_ppo": run_ppo, "run_sft": run_sft}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return tmp_path


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs a command; returns its exit code, what it printed and its errors."""

    def runs(name, *words, server=None):
        asked = ["--remote_url", server.url, "--remote_model", "m"] if server else []
        monkeypatch.setattr(sys, "argv", [f"experiments/{name}.py", *last_of_each([*words, *asked])])
        with pytest.raises(SystemExit) as stop:
            run_main(RUNNERS[name].main)
        return stop.value.code, *capfd.readouterr()

    return runs


def by_frame(body):
    """Text that depends on the frame, of every 7th a wrong one."""
    size = len(body["messages"][1]["content"][-1]["image_url"]["url"]) + len(body["messages"][1]["content"][0]["text"])
    return Fault(400, "no 'logprobs' here") if "logprobs" in body else ("up", "down", "left", "right", "fly")[size % 5]


EVALUATE = ("--policy", "remote", "--episodes", "6", "--num_envs", "3", "--illegal_action", "up")


def test_an_evaluation_that_is_stopped_goes_on_where_it_was(run, folder):
    with ChatServer(by_frame) as server:
        code, out, _ = run("evaluate", *EVALUATE, "--output", "whole.json", server=server)
        asked = len(server.bodies)
        assert code == 0 and f"asked        {asked} requests" in out
        for line in (
            f"remote       m at {server.url}, by letters where the server gives logprobs, else text, 8 requests at a",
            "budget       1,000 requests; prices are not given",
            "estimate     3 rows ask, once for each step that shows something new: 150,000 requests at most",
            "answers of policy: ",
        ):
            assert line in out, line
        assert out.index("estimate") < out.index("policy: success")
        cache = ("--remote_cache", "again")
        done, stops = 0, 0
        while True:
            words = (*EVALUATE, *cache, "--output", "again.json", "--remote_requests", "20")
            code, out, err = run("evaluate", *words, server=server)
            if code == 0:
                break
            stops += 1
            assert code == 2 and err.startswith("error: The budget of --remote_requests 20 is used up")
            assert "All answers are kept in again" in err and "goes on where it stopped" in err
            assert "python experiments/evaluate.py --policy remote --episodes 6 --num_envs 3" in err
            assert "Traceback" not in err and not (folder / "again.json").exists()
            done += 20
            assert len(server.bodies) == asked + done
        assert stops == (asked - 1) // 20 and len(server.bodies) == 2 * asked  # not one was asked twice
    whole = json.loads((folder / "whole.json").read_text())
    assert json.loads((folder / "again.json").read_text()) == whole
    assert set(whole["policy"]["outcomes"]) == {"legal", "unparsed"} and "outcomes" not in whole["random"]
    assert sum(whole["policy"]["outcomes"].values()) == round(6 * whole["policy"]["length_mean"])


@pytest.mark.parametrize("env", ["manako/Pendulum-v0", "manako/Slide-v0"])
@pytest.mark.parametrize("runner", ["evaluate", "collect"])
def test_actions_without_names_are_refused(run, folder, runner, env):
    """The entries of a vector have names too, which are no actions."""
    words = {"evaluate": ("--policy", "remote"), "collect": ("--player", "remote", "--output", "data")}[runner]
    with ChatServer(by_frame) as server:
        code, _, err = run(runner, "--env", env, "--episodes", "2", *words, server=server)
    assert code == 2 and "a model behind a chat API names one of a list: expected an environment of Discrete" in err
    assert not server.bodies and not (folder / "data").exists()


def test_a_gif_of_letters(run, folder):
    with ChatServer(lambda body: letters({"A": -1.0, "B": -1.0, "C": -2.0, "D": -2.0})) as server:
        words = ("--policy", "remote", "--episodes", "2", "--num_envs", "2", "--gif", "a.gif", "--gif_episodes", "2")
        assert run("evaluate", *words, server=server)[0] == 0 and (folder / "a.gif").stat().st_size > 1000


def test_what_it_records_is_data_and_what_named_no_action_is_not(run, folder):
    words = ("--player", "remote", "--episodes", "6", "--num_envs", "4", "--illegal_action", "up", "--output", "data")
    with ChatServer(by_frame) as server:
        code, out, _ = run("collect", *words, server=server)
        asked = len(server.bodies)
        assert code == 0 and "answers: " in out and "only legal ones are learned from" in out
        again = ("--remote_requests", "0", "--output", "again")
        assert run("collect", *words, *again, server=server)[0] == 0 and len(server.bodies) == asked
    rows, about = load_trajectories("data")
    assert load_trajectories("again")[0]["action"] == rows["action"] and about["player"] == "remote m"
    outcomes, policy = rows["outcome"], goto_policy()
    legal, illegal = outcomes.count("legal"), [row for row, said in enumerate(outcomes) if said == "unparsed"]
    assert legal + len(illegal) == len(rows) and illegal and {rows["action"][row] for row in illegal} == {0}
    assert about["episodes"] == 6 and asked <= len(rows) + 4  # a request for letters in each of 4 slots came first
    assert sum(demonstrated_actions(rows)["chosen"]) == len(demonstrations(rows, policy)) == legal
    following = demonstrated_actions(rows, next_frames=True)
    row = next(
        row for row in range(len(rows)) if row + 1 in illegal and rows["episode"][row] == rows["episode"][row + 1]
    )
    picture = following["next_image"][sum(said == "legal" for said in outcomes[:row])]
    assert picture == demonstrated_actions(rows.remove_columns("outcome"), next_frames=True)["next_image"][row]
    for pairs in (expert_pairs(rows), judged_pairs(rows, prefers_the_first, 4, 99, 0)):
        assert pairs and not set(illegal) & {row for row, _, _ in pairs}
    for row, better, worse in judged_pairs(rows, prefers_the_first, 4, 99, 0):
        assert better == rows["action"][row] and worse != better
    run_words = ("--dataset", "data", "--loss", "actions", "--eval_episodes", "0", "--output_dir", "sft")
    assert run("run_sft", *run_words)[0] == 0


def prefers_the_first(frames, instructions, pairs):
    return [pair[0] for pair in pairs]


def test_it_judges_pairs_and_the_key_is_nowhere(run, folder):
    """Its server puts the key into every answer."""

    def answer(body):
        listed = body["messages"][0]["content"].split("Actions: ")[1].split(".")[0].split(", ")
        best = max(listed, key=lambda each: each.split(": ")[1])  # up before right, left and down
        return letters({best[0]: -0.1, KEY: -3.0})

    assert run("collect", "--player", "random", "--episodes", "8", "--num_envs", "8", "--output", "data")[0] == 0
    tiny = ("--dataset", "data", "--eval_episodes", "2", "--gif_episodes", "0", "--output_dir", "dpo")
    with ChatServer(answer) as server:
        judged = ("--pairs", "remote", "--branch_steps", "2", *tiny)
        code, out, err = run("run_dpo", *judged, server=server)
        assert code == 0, err
        rows = len(load_trajectories("data")[0])
        asked = next(line for line in out.splitlines() if line.startswith("judged"))
        pairs = int(asked.split()[1])
        assert 8 < pairs <= 16 <= rows and asked.startswith(f"judged       {pairs} of {pairs} pairs told apart")
        assert "two requests for each of 2 steps of each episode" in out and len(server.bodies) <= 2 * pairs
        server.answer = lambda body: Fault(401, f"no {KEY}")
        code, told, refused = run("run_dpo", *judged, "--remote_cache", "b", "--output_dir", "b/run", server=server)
        assert code == 2 and "refuses the key in OPENAI_API_KEY (401: no <key>)" in refused
    settings = yaml.safe_load((folder / "dpo/config.yaml").read_text())
    assert settings["remote"]["remote_key"] == "OPENAI_API_KEY"
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 20 and any(file.suffix == ".safetensors" for file in files)
    assert not [file for file in files if KEY.encode() in file.read_bytes() or b"0123456789" in file.read_bytes()]
    assert KEY not in out + err + told + refused
    assert run("evaluate", "--policy", "dpo", "--episodes", "2", "--num_envs", "2")[0] == 0  # its config.yaml is read


@pytest.mark.parametrize("runner", ["run_ppo", "run_sft", "run_dpo", "collect"])
@pytest.mark.parametrize("trainable", [(), ("--trainable", "full")])
def test_it_does_not_learn(runner, trainable, run):
    words = {"run_sft": ("--dataset", "data"), "collect": ("--output", "data")}.get(runner, ())
    trainable = () if runner == "collect" else trainable
    code, _, err = run(runner, "--policy", "remote", *words, *trainable)
    assert code == 2 and err.startswith("error: --policy remote is a model behind a chat API, which cannot learn")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("runner", "words", "said"),
    [
        (
            "evaluate",
            ("--policy", "tiny", "--remote_model", "m"),
            "--remote_model is for --policy remote, and --policy is tiny",
        ),
        (
            "collect",
            ("--output", "x", "--remote_cost", "1"),
            "--remote_cost is for --player remote, and --player is expert",
        ),
        ("run_dpo", ("--remote_timeout", "1"), "--remote_timeout is for --pairs remote, and --pairs is expert"),
        ("evaluate", ("--policy", "remote"), "--remote_model is missing: give the server's name of the model"),
        (
            "evaluate",
            ("--policy", "remote", "--remote_model", "m", "--remote_cost", "1"),
            "the price of m is not known",
        ),
        (
            "evaluate",
            ("--policy", "remote", "--remote_model", "m", "--remote_key", KEY),
            "names no environment variable",
        ),
        ("evaluate", ("--policy", "remote", "--remote_concurrency", "0"), "--remote_concurrency is 0: expected"),
        (
            "evaluate",
            (
                "--policy",
                "remote",
                "--remote_model",
                "m",
                "--remote_url",
                "http://localhost:9/v1",
                "--instruction",
                "a\a",
            ),
            "holds control characters",
        ),
        (
            "evaluate",
            (
                "--policy",
                "remote",
                "--remote_model",
                "m",
                "--remote_url",
                "http://localhost:9/v1",
                "--remote_retries",
                "0",
            ),
            "gave no answer in 1 attempts",
        ),
    ],
)
def test_bad_input(runner, words, said, run):
    code, _, err = run(runner, *words)
    assert code == 2 and err.startswith("error: ") and said in err and KEY not in err and "Traceback" not in err
