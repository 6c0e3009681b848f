"""`--eval_every` as its user meets it: what it leaves, that training does not notice it, that stops cost nothing."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import gymnasium as gym
import pytest
import torch

from manako.agent.checkpoint import write_folder
from manako.agent.report.evaluation import evaluate as evaluate_episodes
from manako.agent.report.statistics import mcnemar
from manako.agent.report.unfinished import Unfinished
from manako.agent.tuning.trainers import plain_model
from manako.envs import held_out_seeds, make_env, validation_seeds
from manako.experiments import evaluate, run_ppo, run_sft
from manako.experiments.common import validating
from manako.experiments.common.command_line import UsageError
from manako.experiments.common.disk_room import REST, check_disk_room, policy_bytes
from manako.experiments.common.sft_training import examples_of
from manako.manifest import fault
from manako.policies import PolicySource, load_policy
from tests.experiments.test_life import command_of, dataset, same_weights, tuning_words  # noqa: F401 - a fixture
from tests.experiments.test_run_ppo import rows, run, words
from tests.helpers.small_envs import Corridor
from tests.helpers.small_runs import goto_policy

ENV = "tests.experiments.test_best:tests/Logged-v0"
SHORT = {"eval_episodes": 6, "gif_episodes": 0, "num_ppo_epochs": 1, "learning_rate": 3e-3}
EVERY = {"eval_every": 64, "validation_episodes": 7}


class Logged(Corridor):
    """Writes the seed of each episode into the file `seeds` in `folder`; `silent`: says of no episode what it was."""

    def __init__(self, folder: str = "", silent: bool = False, render_mode: str | None = None) -> None:
        super().__init__(length=9, limit=8, render_mode=render_mode)
        self.folder, self.silent = folder, silent

    def reset(self, *, seed=None, options=None):
        if self.folder and seed is not None:
            with (Path(self.folder) / "seeds").open("a") as file:
                file.write(f"{seed}\n")
        return super().reset(seed=seed, options=options)

    def step(self, action):
        place, reward, terminated, truncated, info = super().step(action)
        return place, reward, terminated, truncated, {} if self.silent else info


gym.register("tests/Logged-v0", Logged)


def training_rows(folder: Path) -> list[dict]:
    return [row for row in without_times(folder) if "validation/episodes" not in row]


def without_times(folder: Path) -> list[dict]:
    """And without TRL's count of tokens, which begins anew with every start."""
    left_out = ("validation/seconds", "num_tokens")
    return [{name: row[name] for name in row if name not in left_out} for row in rows(folder)]


def read(file: Path) -> dict:
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("best")
    kwargs = json.dumps({"folder": str(folder)})
    with pytest.MonkeyPatch.context() as patch:
        assert run(words(folder / "run", env=ENV, env_kwargs=kwargs, seed=2, **SHORT, **EVERY), patch) == 0
    return folder / "run"


def test_what_it_leaves(whole):
    found = [row for row in rows(whole) if "validation/episodes" in row]
    assert [(row["iteration"], row["env_steps"]) for row in found] == [(2, 64), (4, 128), (6, 192)]
    assert all(row["validation/episodes"] == 7 and row["validation/fixed_by_seed"] for row in found)
    best = read(whole / "best/validation.json")
    assert best["validation"]["success"] == max(row["validation/success"] for row in found)
    row = next(row for row in found if row["iteration"] == best["iteration"])
    assert {f"validation/{name}": value for name, value in best["validation"].items()}.items() <= row.items()
    assert "highest success on the validation episodes" in best["rule"]
    assert fault(whole / "best", ("validation.json", "model.safetensors")) is None
    assert not list(whole.glob("*under_way*")) and not list(whole.glob(".*"))


def test_its_figures_are_those_of_the_policy_in_best_on_validation_seeds(whole):
    """Played again by hand, from the folder."""
    best = read(whole / "best/validation.json")
    env = make_env(ENV, 3)
    policy = load_policy(PolicySource(str(whole / "best")), env.action_names, env.frame_shape)
    assert evaluate_episodes(policy, env, validation_seeds(7, 2)).summary() == best["validation"]


def test_which_seeds_it_plays(whole):
    """Those of validation, and neither these in the final evaluation nor that one's while it trains."""
    played = [int(line) for line in (whole.parent / "seeds").read_text().split()]
    chosen, tests = validation_seeds(7, 2), held_out_seeds(6, 2)
    assert set(chosen) <= set(played) and set(tests) <= set(played) and not set(chosen) & set(tests)
    training = {seed for seed in played if seed % 2 == 0}
    assert training and not training & {*chosen, *tests}
    last_of_validation = max(at for at, seed in enumerate(played) if seed in chosen)
    first_of_training = min(at for at, seed in enumerate(played) if seed in training)
    assert not set(played[first_of_training:last_of_validation]) & set(tests)
    assert read(whole / "episodes.json")["seeds"] == tests


def test_evaluation_json_says_both_on_the_same_test_episodes(whole, tmp_path, monkeypatch):
    found, episodes = read(whole / "evaluation.json"), read(whole / "episodes.json")
    assert list(found) == ["policy", "best", "random", "blank_image", "replaced_instruction"]
    best, compared = found["best"], found["best"]["against_policy"]
    assert best["episodes"] == 6 and best["validation"]["episodes"] == 7
    assert compared["p"] == mcnemar(episodes["success"]["best"], episodes["success"]["policy"])
    assert compared["difference"] == pytest.approx(best["success"] - found["policy"]["success"])
    for name in ("best", "final"):
        output = tmp_path / f"{name}.json"
        arguments = ["--policy", str(whole / name), "--episodes", "6", "--output", str(output)]
        assert run(arguments, monkeypatch, evaluate.main) == 0
        row = found["policy" if name == "final" else name]
        assert read(output)["policy"].items() <= row.items()


def test_the_row_of_best_is_of_the_weights_in_best(whole, tmp_path, monkeypatch, capfd):
    """Of a policy that says left where the final one says right: 6 of 6 episodes turn, p = 2 / 2^6."""
    shutil.copytree(whole, tmp_path / "run")
    for name in ("evaluation.json", "best"):
        (shutil.rmtree if name == "best" else os.unlink)(tmp_path / "run" / name)
    env = make_env(ENV, 1)
    policy = load_policy(PolicySource(str(whole / "final")), env.action_names, env.frame_shape)
    left, right = (ids[0] for ids in policy.codec.token_ids)
    with torch.no_grad():
        rows_of_head = policy.vlm.get_output_embeddings().weight
        rows_of_head[[left, right]] = rows_of_head[[right, left]]

    def fill(folder):
        policy.save(folder)
        shutil.copy(whole / "best/validation.json", folder)

    write_folder(tmp_path / "run/best", fill)
    assert run(["--resume", str(tmp_path / "run")], monkeypatch) == 0
    found = read(tmp_path / "run/evaluation.json")
    assert [found[name]["success"] for name in ("policy", "best")] == [1, 0]
    compared = found["best"]["against_policy"]
    assert (compared["measure"], compared["difference"], compared["p"]) == ("success", -1, 2 / 2**6)
    assert "success -100.0% from the final policy's on the same episodes, p 0.031 by McNemar" in capfd.readouterr().out
    assert found["policy"] == read(whole / "evaluation.json")["policy"]


def test_both_are_printed(tmp_path, monkeypatch, capfd):
    silent = json.dumps({"silent": True})
    settings = {"env": ENV, "env_kwargs": silent, **SHORT, **EVERY, "total_steps": 128}
    assert run(words(tmp_path / "run", **settings), monkeypatch) == 0
    out = capfd.readouterr().out
    assert "validation   every 64 env steps, 7 episodes of seeds of their own; best/ keeps the highest success" in out
    assert len(re.findall(r"^validation   iteration    [24]  env steps .* return -?\d.* of 7 episodes", out, re.M)) == 2
    table = out[out.index("held-out seeds, 6 episodes a row") :]
    assert re.search(r"^ policy .*\n best ", table, re.M) and re.search(r"^best: iteration [24]", table, re.M)
    found = read(tmp_path / "run/evaluation.json")["best"]
    assert found["success"] is None and found["against_policy"]["measure"] == "return"
    assert found["same_weights_as_policy"] is (found["iteration"] == 4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"env": "manako/GoTo-v0", "trainable": "lora", "bf16": "true"}, marks=pytest.mark.fault),
        pytest.param({"action_format": "text", "constrain_actions": "true"}, marks=pytest.mark.fault),
        pytest.param({"rollout_backend": "ray-replica", "num_workers": 2}, marks=[pytest.mark.slow, pytest.mark.fault]),
        pytest.param({"rollout_backend": "ray-env", "num_workers": 2}, marks=[pytest.mark.slow, pytest.mark.fault]),
    ],
)
def test_training_learns_the_same_with_it_and_without(settings, tmp_path, monkeypatch):
    settings = {"env": ENV, **SHORT, **settings, "total_steps": 128, "eval_episodes": 1}
    assert run(words(tmp_path / "with", **settings, eval_every=32, validation_episodes=3), monkeypatch) == 0
    assert run(words(tmp_path / "without", **settings), monkeypatch) == 0
    assert same_weights(tmp_path / "with/final", tmp_path / "without/final")
    times = ("seconds", "second", "answer_tokens_per")
    one, other = (
        [{key: row[key] for key in row if not any(part in key for part in times)} for row in training_rows(folder)]
        for folder in (tmp_path / "with", tmp_path / "without")
    )
    assert one == other and len(rows(tmp_path / "with")) == 8
    assert "best" not in read(tmp_path / "without/evaluation.json") and not (tmp_path / "without/best").exists()


@pytest.mark.parametrize("at", [1, 5])  # steps of the second evaluation
def test_stopped_in_an_evaluation_it_goes_on_bit_for_bit(at, whole, tmp_path, monkeypatch, capfd):
    settings = {"env": ENV, "seed": 2, **SHORT, **EVERY, "save_every": 50}
    with monkeypatch.context() as patch:
        signal_in_validation(at, 2, patch)
        assert run(words(tmp_path / "run", **settings), patch) == 130
    out = capfd.readouterr().out
    assert "Stopped after iteration 4 of 6. Go on with:" in out
    assert (tmp_path / "run/validation_under_way.json").is_file()
    assert [row["iteration"] for row in rows(tmp_path / "run")] == [1, 2, 2, 3, 4]
    assert run(command_of(out), monkeypatch) == 0
    assert "going on     with the evaluation in validation_under_way.json" in capfd.readouterr().out
    assert without_times(tmp_path / "run") == without_times(whole)
    for name in ("final", "best"):
        assert same_weights(tmp_path / "run" / name, whole / name)
    assert read(tmp_path / "run/best/validation.json") == read(whole / "best/validation.json")
    assert read(tmp_path / "run/evaluation.json") == read(whole / "evaluation.json")
    assert not list((tmp_path / "run").glob("*under_way*"))


def signal_in_validation(at: int, number: int, patch) -> None:
    """Sends SIGTERM at that step of that evaluation while it trains."""
    ask, steps = Unfinished.at, []

    def signalled(self, row, state):
        steps.append(self.identity["policy"])
        before = len(set(steps))
        if self.file.name.startswith("validation") and (before, steps.count(steps[-1])) == (number, at):
            os.kill(os.getpid(), signal.SIGTERM)
        ask(self, row, state)

    patch.setattr(Unfinished, "at", signalled)


def test_a_signal_in_the_final_evaluation_of_best(whole, tmp_path, monkeypatch):
    """The rows before it are not played again, and final/ stays final/."""
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/evaluation.json").unlink()
    with monkeypatch.context() as patch:
        ask, files = Unfinished.at, []

        def signalled(self, row, state):
            files.append(self.file.name)
            if files.count("evaluation_of_best_under_way.json") == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            ask(self, row, state)

        patch.setattr(Unfinished, "at", signalled)
        assert run(["--resume", str(tmp_path / "run")], patch) == 130
    assert len(read(tmp_path / "run/evaluation_under_way.json")["rows"]) == 4
    assert run(["--resume", str(tmp_path / "run")], monkeypatch) == 0
    assert read(tmp_path / "run/evaluation.json") == read(whole / "evaluation.json")
    assert same_weights(tmp_path / "run/final", whole / "final")


def test_it_may_be_switched_on_and_changed_by_resume(tmp_path, monkeypatch, capfd):
    from manako.experiments.common import ppo_training

    with monkeypatch.context() as patch:
        patch.setattr(ppo_training, "evaluate_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(words(tmp_path / "run", env=ENV, **SHORT), patch) == 130
    again = ["--resume", str(tmp_path / "run")]
    assert run([*again, "--validation_episodes", "3"], monkeypatch) == 2
    assert "but --validation_episodes came too" in capfd.readouterr().err
    assert run([*again, "--eval_every", "32"], monkeypatch) == 0
    assert "changed      eval_every 0 -> 32" in capfd.readouterr().out
    assert read(tmp_path / "run/best/validation.json")["iteration"] == 6  # what was left of it: its last policy
    assert read(tmp_path / "run/evaluation.json")["best"]["same_weights_as_policy"] is True


@pytest.mark.fault
def test_a_prolonged_run_keeps_the_best_of_the_shorter_one_as_well(tmp_path, monkeypatch):
    settings = {"env": ENV, **SHORT, **EVERY, "lr_scheduler_type": "constant"}
    assert run(words(tmp_path / "run", **settings, total_steps=64), monkeypatch) == 0
    assert run(["--resume", str(tmp_path / "run"), "--total_steps", "192"], monkeypatch) == 0
    assert fault(tmp_path / "run/best-64", ("validation.json",)) is None
    assert read(tmp_path / "run/evaluation-64.json")["best"]["iteration"] == 2
    assert run(words(tmp_path / "long", **settings), monkeypatch) == 0
    assert without_times(tmp_path / "run") == without_times(tmp_path / "long")
    assert same_weights(tmp_path / "run/best", tmp_path / "long/best")


def test_a_damaged_best_costs_its_row_alone(whole, tmp_path, monkeypatch, capfd):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/evaluation.json").unlink()
    (tmp_path / "run/best/model.safetensors").write_bytes(b"")
    assert run(["--resume", str(tmp_path / "run")], monkeypatch) == 0
    assert "best is damaged (model.safetensors is cut short" in capfd.readouterr().out
    assert "best" not in read(tmp_path / "run/evaluation.json")


def test_room_for_best_is_asked_for(tmp_path, monkeypatch):
    policy = goto_policy()
    free = policy_bytes(policy) + REST
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(free, 0, free))
    check_disk_room(policy, tmp_path, kept=0)
    with pytest.raises(UsageError, match=r"\(final/, best/ and one more while it is written\)"):
        check_disk_room(policy, tmp_path, kept=0, best=True)


# ---- fine-tuning -----------------------------------------------------------------------------------------------------


def test_examples_are_counted_by_hand():
    """Ten examples in batches of 4: 4, 4, 2 in each pass."""
    assert [examples_of(10, 4, step) for step in range(8)] == [0, 4, 8, 10, 14, 18, 20, 24]


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "actions"},
        pytest.param({"loss": "tokens"}, marks=pytest.mark.fault),
        pytest.param({"loss": "tokens", "trainable": "lora", "bf16": "true"}, marks=pytest.mark.fault),
    ],
)
def test_a_fine_tuning_keeps_its_best_and_does_not_notice(settings, dataset, tmp_path, monkeypatch, capfd):  # noqa: F811
    """Stopped in an evaluation and gone on with, it is that in one piece, and learns what one without them does."""
    given = {**settings, "batch_size": 5, "epochs": 2, "learning_rate": 3e-3}
    best = {"eval_every": 8, "validation_episodes": 5}
    assert run(tuning_words(tmp_path / "without", dataset, **given), monkeypatch, run_sft.main) == 0
    evaluate_all, seen = validating.evaluate_all, []

    def looked_at(policy, *arguments, **options):
        seen.append((policy.vlm.training, "forward" in plain_model(policy).__dict__))
        return evaluate_all(policy, *arguments, **options)

    monkeypatch.setattr(validating, "evaluate_all", looked_at)
    assert run(tuning_words(tmp_path / "with", dataset, **given, **best), monkeypatch, run_sft.main) == 0
    assert seen == [(False, False)] * 3  # as it acts, and not as it is trained
    with monkeypatch.context() as patch:
        signal_in_validation(2, 2, patch)
        assert run(tuning_words(tmp_path / "parts", dataset, **given, **best), patch, run_sft.main) == 130
    assert (tmp_path / "parts/validation_under_way.json").is_file()
    capfd.readouterr()
    assert run(["--resume", str(tmp_path / "parts")], monkeypatch, run_sft.main) == 0
    assert without_times(tmp_path / "parts") == without_times(tmp_path / "with")
    found = [row for row in rows(tmp_path / "with") if "validation/episodes" in row]
    examples = [row["examples"] for row in found]
    assert [row["step"] for row in found] == [2, 4, 6] and examples == [10, 17, 24]  # 12 in a pass: 5, 5, 2
    assert training_rows(tmp_path / "with") == training_rows(tmp_path / "without")
    for name in ("with", "parts"):
        assert same_weights(tmp_path / name / "final", tmp_path / "without/final")
        assert same_weights(tmp_path / name / "best", tmp_path / "with/best")
    one, other = (read(tmp_path / name / "evaluation.json") for name in ("with", "parts"))
    assert one == other and list(one)[:2] == ["policy", "best"] and one["best"]["examples"] in examples
    # what it did while it was trained is what it does from its folder
    env = make_env("manako/GoTo-v0", 5)
    policy = load_policy(PolicySource(str(tmp_path / "with/best")), env.action_names, env.frame_shape)
    said = evaluate_episodes(policy, env, validation_seeds(5)).summary()
    assert said == read(tmp_path / "with/best/validation.json")["validation"]


def test_a_stage_without_acting_is_refused(tmp_path, monkeypatch, capfd):
    arguments = ["--stage", "align", "--eval_every", "5", "--output_dir", str(tmp_path / "run")]
    assert run(arguments, monkeypatch, run_sft.main) == 2
    assert "--eval_every 5 is for --stage instruct" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_help_says_the_rule(monkeypatch, capfd):
    for main in (run_ppo.main, run_sft.main):
        assert run(["--help"], monkeypatch, main) == 0
        text = " ".join(capfd.readouterr().out.split())
        assert "best/ keeps the policy with the highest success there (the highest mean return" in text
        assert "of equal ones the higher mean return, then the earlier" in text
