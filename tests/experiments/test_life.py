"""Runs that end badly, as their user meets them: what is kept, what is said, and where `--resume` ends."""

import contextlib
import json
import os
import shlex
import signal
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from safetensors.torch import load_file

from manako.envs import EnvError
from manako.experiments import collect, evaluate, run_dpo, run_ppo, run_sft
from tests.experiments.test_run_ppo import rows, run, words
from tests.helpers.small_envs import Corridor

ENV = "tests.experiments.test_life:tests/Fragile-v0"
FAST = {"total_steps": 128, "eval_episodes": 4, "gif_episodes": 0, "num_ppo_epochs": 1}


class Faulty(Corridor):
    """Does what the file `fault` in `folder` says: `step`, `close`, `render`, or a reward."""

    def __init__(self, folder: str = "", render_mode: str | None = None) -> None:
        super().__init__(length=9, limit=4, render_mode=render_mode)
        self.file = Path(folder) / "fault"

    def fault(self) -> str:
        return self.file.read_text() if self.file.is_file() else ""

    def step(self, action):
        place, reward, terminated, truncated, info = super().step(action)
        fault = self.fault()
        if fault == "step":
            raise RuntimeError("flaky")
        return place, float(fault) if fault.startswith("1e") else reward, terminated, truncated, info

    def render(self):
        if self.fault() == "render":
            raise RuntimeError("no picture")
        return super().render()

    def close(self):
        if self.fault() == "close":
            raise RuntimeError("no way out")


gym.register("tests/Fragile-v0", Faulty)


def faulty(folder: Path, output: Path, **settings) -> list[str]:
    return words(output, env=ENV, env_kwargs=json.dumps({"folder": str(folder)}), **{**FAST, **settings})


def at_iteration(number: int, do, patch) -> None:
    """Does something when that iteration begins."""
    from manako.agent.ppo_trainer import PPOTrainer

    iterate = PPOTrainer.iterate

    def iterate_and_do(self):
        if self.iteration == number:
            do()
        return iterate(self)

    patch.setattr(PPOTrainer, "iterate", iterate_and_do)


def command_of(text: str) -> list[str]:
    """The command that was printed, without the program."""
    line = next(line for line in text.splitlines() if line.startswith("  python "))
    return shlex.split(line)[2:]


def same_weights(one: Path, other: Path) -> bool:
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert len(files) == 2 and files == sorted(path.name for path in other.glob("*.safetensors"))
    pairs = [(load_file(one / file), load_file(other / file)) for file in files]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("life")
    with pytest.MonkeyPatch.context() as patch:
        assert run(faulty(folder, folder / "run"), patch) == 0
    return folder / "run"


@pytest.mark.parametrize("fault", ["step", "1e300"])
def test_an_environment_that_breaks_in_training_loses_nothing(fault, whole, tmp_path, monkeypatch, capfd):
    fault_file = tmp_path / "fault"
    with monkeypatch.context() as patch:
        at_iteration(2, lambda: fault_file.write_text(fault), patch)
        assert run(faulty(tmp_path, tmp_path / "run"), patch) == 1
    out, err = capfd.readouterr()
    assert "Stopped after iteration 2 of 4. Go on with:" in out and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: tests/Fragile-v0") and "slot 0, episode seed" in err
    assert not (tmp_path / "run/.staging").exists()
    fault_file.unlink()  # repaired
    assert run(command_of(out), monkeypatch) == 0
    assert rows(tmp_path / "run") == rows(whole) and same_weights(tmp_path / "run/final", whole / "final")


def test_close_and_pictures_that_fail_after_training_are_warned_of(tmp_path, monkeypatch, capfd, caplog):
    from manako.experiments.common import ppo_training, results

    def broken(*_, **__):
        raise RuntimeError("no picture")

    with monkeypatch.context() as patch:
        patch.setattr(ppo_training, "learning_curve", broken)
        patch.setattr(results, "write_gif", broken)
        at_iteration(1, lambda: (tmp_path / "fault").write_text("close"), patch)
        assert run(faulty(tmp_path, tmp_path / "run", total_steps=64), patch) == 0
    err = capfd.readouterr().err
    assert "warning: learning_curve.png failed and is left out: RuntimeError: no picture" in err
    assert "warning: after.gif failed" in err and "broke in close() with RuntimeError: no way out" in caplog.text
    assert (tmp_path / "run/final").is_dir() and (tmp_path / "run/evaluation.json").is_file()


def test_an_evaluation_that_breaks_is_gone_on_with(whole, tmp_path, monkeypatch, capfd):
    from manako.experiments.common import ppo_training

    with monkeypatch.context() as patch:
        final = ppo_training.write_final
        patch.setattr(
            ppo_training, "write_final", lambda *each: (final(*each), (tmp_path / "fault").write_text("step"))[0]
        )
        assert run(faulty(tmp_path, tmp_path / "run"), patch) == 1
    out, err = capfd.readouterr()
    assert "The training is done, with" in out and "flaky" in err and "Traceback" not in err
    (tmp_path / "fault").unlink()
    assert run(command_of(out), monkeypatch) == 0
    assert (tmp_path / "run/evaluation.json").read_text() == (whole / "evaluation.json").read_text()


def test_an_error_that_nobody_foresaw_is_a_sentence_and_a_file(whole, tmp_path, monkeypatch, capfd):
    def bug():
        raise ZeroDivisionError("of ours")

    with monkeypatch.context() as patch:
        at_iteration(3, bug, patch)
        assert run(faulty(tmp_path, tmp_path / "run"), patch) == 1
    out, err = capfd.readouterr()
    file = tmp_path / "run/error.txt"
    assert err.splitlines()[-1] == f"error: ZeroDivisionError: of ours; the traceback is in {file}."
    assert "Traceback" not in err and "Traceback" in file.read_text()
    assert run(command_of(out), monkeypatch) == 0 and same_weights(tmp_path / "run/final", whole / "final")


@pytest.mark.slow
@pytest.mark.fault
def test_the_advice_on_numbers_that_break_can_be_followed(tmp_path, monkeypatch, capfd):
    """A learning rate of 1e4 breaks the numbers; the printed command, and those that it prints, end in a whole run."""
    arguments = faulty(tmp_path, tmp_path / "run", learning_rate=1e6, num_ppo_epochs=2)
    code, given = run(arguments, monkeypatch), []
    while code == 1 and len(given) < 12:
        out, err = capfd.readouterr()
        assert "finite" in err and "Traceback" not in err
        given.append(command_of(out))
        code = run(given[-1], monkeypatch)
    assert code == 0 and given and given[0][-2:] == ["--learning_rate", "100000"]
    changes = [json.loads(line) for line in (tmp_path / "run/changes.jsonl").read_text().splitlines()]
    assert changes[0]["changes"]["learning_rate"] == [1e6, 1e5]


@pytest.mark.slow
@pytest.mark.fault
def test_a_finished_run_is_prolonged(whole, tmp_path, monkeypatch, capfd):
    """With a constant rate it is, bit for bit, the one that had been so long from the start."""
    constant = {"lr_scheduler_type": "constant"}
    assert run(faulty(tmp_path, tmp_path / "long", **constant), monkeypatch) == 0
    assert run(faulty(tmp_path, tmp_path / "run", **constant, total_steps=64), monkeypatch) == 0
    again = ["--resume", str(tmp_path / "run")]
    assert run(again, monkeypatch) == 2 and "prolong it with a larger --total_steps" in capfd.readouterr().err
    for flag, value in (("gamma", "0.5"), ("num_envs", "4"), ("seed", "9")):
        assert run([*again, f"--{flag}", value], monkeypatch) == 2
        assert f"but --{flag} came too" in capfd.readouterr().err
    assert run([*again, "--total_steps", "128", "--eval_episodes", "3"], monkeypatch) == 0
    out = capfd.readouterr().out
    assert "changed      eval_episodes 4 -> 3, total_steps 64 -> 128, from iteration 3 on" in out
    assert rows(tmp_path / "run") == rows(tmp_path / "long")
    assert same_weights(tmp_path / "run/final", tmp_path / "long/final")
    assert not same_weights(tmp_path / "run/final-64", tmp_path / "run/final")
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["policy"]["episodes"] == 3
    assert json.loads((tmp_path / "run/evaluation-64.json").read_text())["policy"]["episodes"] == 4


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "goto"
    with pytest.MonkeyPatch.context() as patch:
        assert run(["--episodes", "6", "--error_rate", "0.3", "--output", str(folder)], patch, collect.main) == 0
    return folder


def tuning_words(output: Path, dataset: Path, **settings) -> list[str]:
    given = {"dataset": dataset, "batch_size": 4, "eval_episodes": 3, "gif_episodes": 0, "output_dir": output}
    return [word for name, value in {**given, **settings}.items() for word in (f"--{name}", str(value))]


def signal_at_step(number: int, patch, round_number: int = 0) -> None:
    """Sends SIGTERM in that step of the fine-tuning's given round."""
    from manako.agent.tuning.saving import StepCheckpoints

    ends, steps = StepCheckpoints.on_step_end, []

    def end(self, args, state, control, **kwargs):
        steps.append(state.global_step)
        if state.global_step == number and steps.count(number) == round_number + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        ends(self, args, state, control, **kwargs)

    patch.setattr(StepCheckpoints, "on_step_end", end)


@pytest.mark.parametrize(
    ("main", "settings", "round_number"),
    [
        (run_sft.main, {"loss": "actions", "epochs": 2}, 0),
        pytest.param(
            run_sft.main, {"loss": "tokens", "trainable": "lora"}, 0, marks=[pytest.mark.slow, pytest.mark.fault]
        ),
        pytest.param(
            run_dpo.main,
            {"trainable": "lora", "rounds": 2, "episodes": 8, "num_steps": 8, "pairs": "expert"},
            0,
            marks=[pytest.mark.slow, pytest.mark.fault],
        ),
    ],
)
def test_a_stopped_fine_tuning_goes_on_bit_for_bit(main, settings, round_number, dataset, tmp_path, monkeypatch, capfd):
    assert run(tuning_words(tmp_path / "whole", dataset, **settings), monkeypatch, main) == 0
    with monkeypatch.context() as patch:
        signal_at_step(2, patch, round_number)
        assert run(tuning_words(tmp_path / "parts", dataset, **settings), patch, main) == 130
    out, err = capfd.readouterr()
    assert "Stopped, with a checkpoint of step 2. Go on with:" in out and "Traceback" not in err
    assert not (tmp_path / "parts/.staging").exists()
    assert run(command_of(out), monkeypatch, main) == 0
    assert same_weights(tmp_path / "parts/final", tmp_path / "whole/final")
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("parts", "whole")
    ]
    assert losses[0] == losses[1]
    one, other = ((tmp_path / name / "evaluation.json").read_text() for name in ("parts", "whole"))
    assert one == other
    assert run(["--resume", str(tmp_path / "parts")], monkeypatch, main) == 2  # finished


# ---- evaluations -----------------------------------------------------------------------------------------------------


def test_evaluate_goes_on_with_the_same_command(whole, tmp_path, monkeypatch, capfd):
    from manako.agent.report.unfinished import Unfinished

    arguments = ["--policy", str(whole), "--episodes", "9", "--num_envs", "2", "--sample", "true"]
    assert run([*arguments, "--output", str(tmp_path / "whole")], monkeypatch, evaluate.main) == 0
    with monkeypatch.context() as patch:
        at, calls = Unfinished.at, []

        def interrupt(self, row, state):
            calls.append(row)
            if len(calls) == 20:
                os.kill(os.getpid(), signal.SIGTERM)
            at(self, row, state)

        patch.setattr(Unfinished, "at", interrupt)
        assert run([*arguments, "--output", str(tmp_path / "parts")], patch, evaluate.main) == 130
    assert "the same command goes on with it" in capfd.readouterr().out
    assert run([*arguments, "--output", str(tmp_path / "parts")], monkeypatch, evaluate.main) == 0
    assert "going on     with the evaluation in parts.under_way: 1 rows are done" in capfd.readouterr().out
    assert (tmp_path / "parts").read_text() == (tmp_path / "whole").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts", "whole"]


def test_faulty_is_faulty(tmp_path):
    (tmp_path / "fault").write_text("step")
    from manako.envs import EpisodeVectorEnv

    with contextlib.closing(EpisodeVectorEnv("tests/Fragile-v0", 1, env_kwargs={"folder": str(tmp_path)})) as env:
        env.reset()
        with pytest.raises(EnvError, match="flaky"):
            for _ in range(3):
                env.step(torch.zeros(1, dtype=torch.long).numpy())


def test_the_runner_is_told_to_go_on_by_its_start(tmp_path, monkeypatch, capfd):
    """Stopped before a checkpoint was written, `--resume` begins the run again."""
    with monkeypatch.context() as patch:
        at_iteration(0, lambda: (_ for _ in ()).throw(KeyboardInterrupt), patch)
        assert run(faulty(tmp_path, tmp_path / "run", total_steps=32), patch) == 130
    out = capfd.readouterr().out
    assert "nothing was learned yet, and what goes on begins again." in out
    assert run(command_of(out), monkeypatch, run_ppo.main) == 0
    assert len(rows(tmp_path / "run")) == 1
