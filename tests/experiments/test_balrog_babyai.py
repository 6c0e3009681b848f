"""BALROG's BabyAI protocol: the whole command, by a small policy and by a server."""

import json
import sys

import pytest

from manako.envs.babyai_mixed import TASKS
from manako.experiments.benchmarks import balrog_babyai
from manako.experiments.common.command_line import UsageError, run_main
from tests.helpers.chat_server import ChatServer


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Runs the command in an empty folder; returns its exit code, what it printed and its errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")

    def runs(*words):
        monkeypatch.setattr(sys, "argv", ["experiments/benchmarks/balrog_babyai.py", *words])
        with pytest.raises(SystemExit) as stop:
            run_main(balrog_babyai.main)
        return stop.value.code, *capfd.readouterr()

    return runs


def test_a_policy_plays_five_tasks_and_stands_beside_what_is_published(run, tmp_path):
    code, out, _ = run("--policy", "tiny", "--episodes", "2", "--sample", "true", "--output", "balrog.json")
    assert code == 0
    for line in (
        "tiny on BabyAI, 2 episodes of each of 5 tasks",
        "drawn actions, held-out seeds",
        "Claude 3.5 Sonnet     82.0",
    ):
        assert line in out, line
    result = json.loads((tmp_path / "balrog.json").read_text())
    assert tuple(result["tasks"]) == TASKS == tuple(balrog_babyai.LIMITS)
    for row in ("policy", "random"):
        tasks = [rows[row] for rows in result["tasks"].values()]
        assert all(task["episodes"] == 2 and task["fixed_by_seed"] for task in tasks)
        assert result["mean"][row]["episodes"] == 10
        assert result["mean"][row]["progress"] == pytest.approx(100 * sum(task["success"] for task in tasks) / 5)
        for task, limit in zip(tasks, balrog_babyai.LIMITS.values(), strict=True):
            assert task["length_mean"] <= limit


def test_the_mean_is_balrogs_by_hand():
    """82.0 +- 5.4, as BALROG publishes it, is 41 of 50."""
    results = {
        task: {"policy": {"success": share, "episodes": 10}}
        for task, share in zip(TASKS, (1, 1, 0.5, 0.9, 0.7), strict=True)
    }
    mean = balrog_babyai.mean_of(results, "policy")
    assert (round(mean["progress"], 1), round(mean["standard_error"], 1), mean["episodes"]) == (82.0, 5.4, 50)


def test_a_server_is_shown_balrogs_picture_and_goes_forward_where_it_names_no_action(run, tmp_path):
    pytest.importorskip("openai", reason="the extra `remote` is not installed")
    words = ("--policy", "remote", "--remote_model", "m", "--episodes", "1", "--remote_requests", "1000")
    with ChatServer(lambda body: "I wonder") as server:
        code, out, _ = run(*words, "--remote_url", server.url, "--output", "asked.json")
        assert code == 0 and "estimate     512 requests at most" in out
        text = json.dumps(server.bodies[0])
    assert "turn left" in text and "go forward" in text
    played = json.loads((tmp_path / "asked.json").read_text())["tasks"]["open"]["policy"]
    assert played["length_mean"] == 128 and set(played["outcomes"]) == {"unparsed"}


@pytest.mark.parametrize("words", [("--env", "manako/GoTo-v0"), ("--gif", "a.gif"), ("--max_episode_steps", "9")])
def test_what_the_protocol_fixes_is_refused(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"{words[0]} came, and the protocol says it"):
        balrog_babyai.read_line(["--policy", "tiny", *words])
