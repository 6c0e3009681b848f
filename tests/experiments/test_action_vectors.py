"""Action vectors from the command line: checked, recorded, imitated, trained, evaluated; and what is refused."""

import json

import pytest
from datasets import load_from_disk

from manako.experiments import check_env, check_model, collect, evaluate, play, run_dpo, run_ppo, run_sft
from tests.experiments.test_action_masks import SMALL, run

PENDULUM = ["--env", "manako/Pendulum-v0", "--env_kwargs", '{"max_episode_steps": 8}']
SLIDE = ["--env", "manako/Slide-v0"]


def test_from_a_recording_to_an_evaluation(tmp_path, monkeypatch, capfd):
    data, sft = tmp_path / "data", tmp_path / "sft"
    code, _ = run(collect, monkeypatch, capfd, *PENDULUM, error_rate=0.3, episodes=8, num_envs=4, output=data)
    assert code == 0 and len(load_from_disk(str(data))["action"][0]) == 1
    again = {"player": "recorded", "recording": data, "output": tmp_path / "again"}
    code, printed = run(collect, monkeypatch, capfd, *PENDULUM, **again)
    assert code == 0 and load_from_disk(str(tmp_path / "again"))["reward"][:] == load_from_disk(str(data))["reward"][:]
    flags = {"dataset": data, "loss": "actions", "bins": 7, "bin_spacing": "symlog", "target": "expert"}
    code, printed = run(run_sft, monkeypatch, capfd, *PENDULUM, output_dir=sft, **flags, **SMALL)
    assert code == 0 and (sft / "after.gif").is_file(), printed
    assert json.loads((sft / "final/policy.json").read_text())["source"]["bins"] == 7
    code, printed = run(evaluate, monkeypatch, capfd, policy=sft / "final", episodes=4, output=tmp_path / "e.json")
    assert code == 0 and json.loads((tmp_path / "e.json").read_text())["random"]["episodes"] == 4
    flags = {"policy": sft / "final", "num_envs": 4, "num_steps": 4, "minibatch_size": 16, "total_steps": 16, **SMALL}
    code, printed = run(run_ppo, monkeypatch, capfd, *PENDULUM, output_dir=tmp_path / "ppo", **flags)
    assert code == 0, printed
    assert "actions      1 numbers: torque from -2 to 2" in printed and "answers      as bins" in printed


def test_check_env_says_what_the_entries_are(monkeypatch, capfd):
    code, printed = run(check_env, monkeypatch, capfd, "manako/Slide-v0")
    assert code == 0 and "action names  2 whole numbers: across from 0 to 2, down from 0 to 2, from" in printed


def test_check_model_says_how_they_are_said(monkeypatch, capfd):
    code, printed = run(check_model, monkeypatch, capfd, "tiny", *SLIDE, torch_threads=1, num_envs=4)
    assert code == 0, printed
    assert "as bins: across A = 0 to C = 2, down A = 0 to C = 2" in printed


@pytest.mark.parametrize(
    ("runner", "flags", "says"),
    [
        (run_dpo, {"pairs": "expert"}, "has actions that are vectors, and preferences are between actions of a closed"),
        (run_ppo, {"policy": "vilbert"}, "answers with one token at a mask, but an action has 2 entries"),
        (run_ppo, {"bins": 1}, "--bins"),
        (run_ppo, {"bin_spacing": "log"}, "--bin_spacing"),
        (run_ppo, {"action_format": "trie"}, "which are said as bins: leave action_format out"),
        (play, {}, "has actions that are vectors, 2 whole numbers: across from 0 to 2"),
    ],
)
def test_what_vectors_cannot_is_said_in_a_sentence(runner, flags, says, tmp_path, monkeypatch, capfd):
    if runner is play:
        pytest.importorskip("pygame")
        monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
        monkeypatch.setattr(play, "SCREEN_GIVEN", True)
    place = {"output": tmp_path / "play.jsonl"} if runner is play else {"output_dir": tmp_path / "run"}
    code, printed = run(runner, monkeypatch, capfd, *SLIDE, **flags, **place)
    assert code == 2 and says in printed and "Traceback" not in printed
    assert not list(tmp_path.iterdir())


def test_a_box_without_bounds_is_refused_in_a_sentence(tmp_path, monkeypatch, capfd):
    (tmp_path / "mine.py").write_text(
        "import gymnasium as gym\nimport numpy as np\nfrom manako.envs.pendulum import Pendulum\n\n\n"
        "class Free(Pendulum):\n    def __init__(self, render_mode=None):\n        super().__init__(render_mode)\n"
        "        self.action_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)\n\n\n"
        "gym.register('Free-v0', Free, max_episode_steps=5)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    code, printed = run(run_ppo, monkeypatch, capfd, env="mine:Free-v0", output_dir=tmp_path / "run")
    assert code == 2 and "entry 0 goes from -inf to inf: expected finite bounds" in printed
    assert "Traceback" not in printed and not (tmp_path / "run").exists()
