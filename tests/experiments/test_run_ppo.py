"""The runner as its user meets it: what a run leaves behind, resuming bit for bit, signals, plugins, start-up times."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from manako.experiments import evaluate, run_ppo
from manako.experiments.common.command_line import build, checked_sections, parse, read_yaml, run_main
from manako.experiments.common.settings import PPOCommand
from manako.experiments.run_ladder import COMMANDS, check_ladder, own_sections, settings_of

ROOT = Path(__file__).parents[2]
RUNNER = str(ROOT / "experiments" / "run_ppo.py")
SMALL = {
    "total_steps": 192,
    "num_envs": 8,
    "num_steps": 4,
    "minibatch_size": 16,
    "num_ppo_epochs": 2,
    "eval_episodes": 10,
    "gif_episodes": 2,
    "save_every": 2,
    "torch_threads": 1,
}
TIMES = ("rollout_seconds", "rollout_steps_per_second")


def words(output_dir: Path | None = None, **settings) -> list[str]:
    flags = {**SMALL, **settings}
    flags |= {} if output_dir is None else {"output_dir": output_dir}
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def run(arguments: list[str], monkeypatch, main=run_ppo.main) -> int:
    monkeypatch.setattr(sys, "argv", ["runner.py", *arguments])
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    return stop.value.code


def rows(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run of six iterations on GoTo."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        assert run(words(folder, seed=4), patch) == 0  # a seed that is nobody's default
    return folder


def test_a_run_leaves_everything_behind(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.yaml",
        "run.json",
        "metrics.jsonl",
        "tensorboard",
        "learning_curve.png",
        "before.gif",
        "after.gif",
        "checkpoints",
        "final",
        "episodes.json",
        "evaluation.json",
    }
    assert [row["iteration"] for row in rows(finished)] == list(range(1, 7))
    assert {"approx_kl", "clip_fraction", "explained_variance", "entropy", "learning_rate"} <= rows(finished)[0].keys()
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-6"]
    for name in ("before.gif", "after.gif", "learning_curve.png"):
        with Image.open(finished / name) as picture:
            assert np.asarray(picture.convert("RGB")).std() > 10
    assert list((finished / "tensorboard").iterdir())
    description = json.loads((finished / "run.json").read_text())
    assert description["versions"]["torch"] and "--total_steps 192" in description["command"]


def test_evaluation_json(finished):
    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert list(evaluation) == ["policy", "random", "blank_image", "replaced_instruction"]
    for row in evaluation.values():
        assert {"success", "success_ci95", "return_mean", "episodes"} <= row.keys()
        low, high = row["success_ci95"]
        assert 0 <= low <= row["success"] <= high <= 1 and row["episodes"] == 10


def test_final_is_a_plain_model_folder(finished):
    model = AutoModelForImageTextToText.from_pretrained(finished / "final")
    saved = load_file(finished / "final" / "model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items() if name in saved)
    assert AutoProcessor.from_pretrained(finished / "final").image_token == "<image>"


def test_the_settings_of_a_run_are_sections(finished):
    settings = read_yaml(finished / "config.yaml")
    assert list(settings) == ["environment", "policy", "ppo", "workers", "run"]
    assert settings["environment"]["env"] == "manako/GoTo-v0" and settings["run"]["seed"] == 4
    assert settings["ppo"]["gamma"] == 0.9 and settings["ppo"]["num_steps"] == 4  # of goto.yaml, and of a flag
    assert "resume" not in settings["run"] and "seed" not in settings["policy"]


def test_evaluate_gives_the_same_numbers(finished, tmp_path, monkeypatch):
    output = tmp_path / "again.json"
    gif = tmp_path / "again.gif"
    arguments = ["--policy", str(finished), "--episodes", "10", "--output", str(output), "--gif", str(gif)]
    assert run([*arguments, "--gif_episodes", "1"], monkeypatch, evaluate.main) == 0
    again = json.loads(output.read_text())
    assert again["policy"] == json.loads((finished / "evaluation.json").read_text())["policy"]
    assert gif.is_file()


def test_warm_start_from_a_run(finished, tmp_path, monkeypatch):
    arguments = words(tmp_path / "warm", total_steps=32, policy=finished / "final", trainable="lora")
    assert run(arguments, monkeypatch) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"trainable": "lora"},
        pytest.param({"vision_encoder": "convnext", "trainable": "adapter"}, marks=pytest.mark.fault),
        pytest.param({"target_kl": 0.0005}, marks=pytest.mark.fault),
        {"env": "tests.helpers.small_envs:tests/Gates-v0"},  # with action masks
        {"env": "manako/Pendulum-v0", "env_kwargs": '{"max_episode_steps": 6}', "trainable": "lora", "bins": 5},
    ],
)
def test_a_resumed_run_is_bit_equal(settings, tmp_path, monkeypatch):
    """Six iterations in one go, and three, an interrupt and three: the same weights, optimizer and metrics."""
    from manako.agent.ppo_trainer import PPOTrainer

    assert run(words(tmp_path / "whole", **settings), monkeypatch) == 0
    with monkeypatch.context() as patch:
        log = PPOTrainer.log

        def interrupt(self, logs, start_time=None):
            if logs.get("grad_norm") is not None and self.iteration == 3:
                os.kill(os.getpid(), signal.SIGINT)
            log(self, logs, start_time)

        patch.setattr(PPOTrainer, "log", interrupt)
        code = run(words(tmp_path / "parts", **settings), patch)
    assert code == 130
    assert len(rows(tmp_path / "parts")) in (3, 4)  # the signal is answered at the end of an iteration
    assert not (tmp_path / "parts" / "evaluation.json").exists()
    assert run(["--resume", str(tmp_path / "parts")], monkeypatch) == 0
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    for name in ("checkpoints/checkpoint-6", "final"):
        one, other = tmp_path / "whole" / name, tmp_path / "parts" / name
        weights = [path.name for path in one.glob("*.safetensors")]
        assert len(weights) == 2
        for file in weights:
            a, b = load_file(one / file), load_file(other / file)
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    one, other = (
        torch.load(tmp_path / part / "checkpoints/checkpoint-6/optimizer.pt", weights_only=True)
        for part in ("whole", "parts")
    )
    for key, state in one["state"].items():
        assert all(
            torch.equal(torch.as_tensor(state[name]), torch.as_tensor(other["state"][key][name])) for name in state
        )
    assert json.loads((tmp_path / "parts/evaluation.json").read_text()) == json.loads(
        (tmp_path / "whole/evaluation.json").read_text()
    )


WILD = {"env": "tests.helpers.small_envs:tests/Drift-v0", "env_kwargs": '{"wild": true}', "num_steps": 8}


def test_an_environment_that_follows_nothing_goes_through_with_the_right_words(tmp_path, monkeypatch, capfd, caplog):
    """It ignores its seeds, cannot replay and has no time limit: trained, stopped, resumed, evaluated; no groups."""
    from manako.agent.ppo_trainer import PPOTrainer

    said = "episodes are not fixed by seed"
    with monkeypatch.context() as patch:
        log = PPOTrainer.log

        def interrupt(self, logs, start_time=None):
            log(self, logs, start_time)
            if logs.get("grad_norm") is not None and self.iteration == 1:
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(PPOTrainer, "log", interrupt)
        assert run(words(tmp_path / "run", **WILD), patch) == 130
    assert f"seeds        {said}: two resets of tests.helpers" in capfd.readouterr().out
    assert run(["--resume", str(tmp_path / "run")], monkeypatch) == 0
    out, err = capfd.readouterr()
    assert " of 8 running episodes did not play again as they had" in caplog.text
    assert "Traceback" not in err and "replay       " in out and f"seeds        {said}" in out
    assert f"{said}: no two rows are of the same ones, and none is held out" in out
    found = rows(tmp_path / "run")
    assert [row["iteration"] for row in found] == [1, 2, 3]
    given_up = [row["episodes_given_up"] for row in found]
    assert given_up[0] == 0 < max(given_up) <= 8
    evaluation = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert all(row["note"] == said and row["starts"] <= row["episodes"] == 10 for row in evaluation.values())
    assert run(words(tmp_path / "groups", **WILD, advantage="grpo", group_size=4), monkeypatch) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and f"error: {said}: two resets" in error and "and --advantage grpo compares" in error
    assert not (tmp_path / "groups").exists()


def test_groups_whose_episodes_outlast_the_rollout_are_pointed_out(tmp_path, monkeypatch, capfd):
    """Half of the seeds play 40 steps, and no group of them ends in 8; the others are learned from."""
    halves = {"env": "tests.helpers.small_envs:tests/Halves-v0", "num_steps": 8, "minibatch_size": 8}
    folder = tmp_path / "run"
    assert (
        run(words(folder, **halves, advantage="rloo", group_size=2, eval_episodes=2, gif_episodes=0), monkeypatch) == 0
    )
    text = capfd.readouterr().out
    found = rows(folder)
    assert {row["success_rate"] for row in found} == {None} and {row["episodes"] for row in found} == {0}
    shares = [row["whole_groups"] for row in found]
    assert (
        all(0 < share < 1 for share in shares) and text.count("of the groups an episode outlasted the rollout of") == 1
    )
    assert f"warning: in {1 - shares[0]:.0%} of the groups" in text and "success    -  return      -  of    0" in text


def test_resume_falls_back_to_the_last_whole_checkpoint(tmp_path, monkeypatch, capfd):
    from manako.agent.ppo_trainer import PPOTrainer

    with monkeypatch.context() as patch:
        log = PPOTrainer.log

        def interrupt(self, logs, start_time=None):
            log(self, logs, start_time)
            if logs.get("grad_norm") is not None and self.iteration == 4:
                os.kill(os.getpid(), signal.SIGTERM)

        patch.setattr(PPOTrainer, "log", interrupt)
        keep = '{"run": {"keep_checkpoints": 3}}'
        assert run([*words(tmp_path / "run", save_every=1), "--config", keep], patch) == 130
    newest = max((tmp_path / "run/checkpoints").iterdir(), key=lambda path: int(path.name.split("-")[1]))
    file = newest / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    capfd.readouterr()
    assert run(["--resume", str(tmp_path / "run")], monkeypatch) == 0
    warning = capfd.readouterr().err.splitlines()[0]
    assert warning.startswith("warning: ") and "model.safetensors is cut short" in warning and newest.name in warning
    # the damaged one is kept under another name, and its iteration written again
    assert (newest.parent / f"damaged-{newest.name}" / "model.safetensors").stat().st_size == 1000
    assert [row["iteration"] for row in rows(tmp_path / "run")] == list(range(1, 7))


def test_a_signal_in_the_last_iteration_leaves_the_evaluation_to_the_next_start(tmp_path, monkeypatch, capfd):
    from manako.agent.ppo_trainer import PPOTrainer

    settings = {"total_steps": 64}
    assert run(words(tmp_path / "whole", **settings), monkeypatch) == 0
    with monkeypatch.context() as patch:
        iterate = PPOTrainer.iterate

        def interrupt(self):
            if self.iteration == 1:
                os.kill(os.getpid(), signal.SIGINT)
            return iterate(self)

        patch.setattr(PPOTrainer, "iterate", interrupt)
        assert run(words(tmp_path / "parts", **settings), patch) == 130
    assert "Stopped after iteration 2 of 2." in capfd.readouterr().out
    assert not (tmp_path / "parts" / "final").exists()
    assert run(["--resume", str(tmp_path / "parts")], monkeypatch) == 0
    one, other = (json.loads((tmp_path / part / "evaluation.json").read_text()) for part in ("whole", "parts"))
    assert one == other and rows(tmp_path / "parts") == rows(tmp_path / "whole")


def test_ctrl_c_in_the_evaluation_loses_nothing(tmp_path, monkeypatch, capfd):
    from manako.experiments.common import ppo_training

    def ctrl_c(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ppo_training, "evaluate_run", ctrl_c)
        assert run(words(tmp_path / "run", total_steps=32), patch) == 130
    assert f"--resume {tmp_path / 'run'}" in capfd.readouterr().out
    final = (tmp_path / "run/final/model.safetensors").read_bytes()
    assert run(["--resume", str(tmp_path / "run")], monkeypatch) == 0
    assert (tmp_path / "run/evaluation.json").is_file()
    assert (tmp_path / "run/final/model.safetensors").read_bytes() == final
    assert run(["--resume", str(tmp_path / "run")], monkeypatch) == 2  # finished


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_say_how_to_resume(number, tmp_path):
    command = [sys.executable, RUNNER, *words(tmp_path / "run", total_steps=100_000, gif_episodes=0)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not (tmp_path / "run/metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert f"--resume {tmp_path / 'run'}" in out and "Traceback" not in err
    assert list((tmp_path / "run/checkpoints").glob("checkpoint-*"))


CONFIGS = sorted((ROOT / "experiments" / "configs").glob("*.yaml"))
LADDERS = [path for path in CONFIGS if "\nsteps:" in path.read_text()]


@pytest.mark.parametrize("path", LADDERS, ids=lambda path: path.stem)
def test_ladders(path):
    ladder, head = read_yaml(path), path.read_text().split("\ncommon:")[0]
    for step in check_ladder(ladder, path.name):
        kind = COMMANDS[step["runner"]]
        merged = settings_of(step["runner"], own_sections(step), ladder["common"])
        build(kind, checked_sections(kind, merged, step["name"]))
    assert f"python experiments/run_ladder.py --ladder experiments/configs/{path.name}" in head


@pytest.mark.parametrize("path", [path for path in CONFIGS if path not in LADDERS], ids=lambda path: path.stem)
def test_configurations(path):
    parse(PPOCommand, "", ["--config", str(path)])
    head = path.read_text().split("\nenvironment:")[0]
    assert f"python experiments/run_ppo.py --config experiments/configs/{path.name}" in head
    assert "%" in head and "min" in head  # the score and the time to expect


RUNNERS = ["run_ppo", "collect", "run_sft", "run_dpo", "run_ladder", "submit_ray_job", "evaluate", "check_env", "play"]
RUNNERS += [
    "reproduce",
    "export_lerobot",
    *(f"benchmarks/{name}" for name in ("speed", "ray_workers", "compare_sb3", "feature_cache", "writing")),
]


@pytest.mark.parametrize("name", RUNNERS)
def test_help_is_quick(name):
    """Processor time, not the clock: machines are shared."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "usage:" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


def test_a_run_imports_no_ray(tmp_path):
    code = f"""
import sys
sys.argv = {["run_ppo.py", *words(tmp_path / "run", total_steps=32)]!r}
sys.path.insert(0, {str(ROOT)!r})
from manako.experiments import run_ppo
assert run_ppo.main() == 0
assert not [name for name in sys.modules if name.split(".")[0] == "ray"], "ray was imported"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
