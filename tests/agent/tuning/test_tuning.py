"""The runners of SFT, DPO and the ladder: from demonstrations to a report, and what they refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from manako.agent.collector import RolloutCollector
from manako.agent.data.trajectories import save_trajectories
from manako.envs.settings import EnvSettings
from manako.experiments import collect, run_dpo, run_ladder, run_sft
from manako.experiments.common.collecting import play_to_the_end
from manako.experiments.common.command_line import UsageError, run_main
from manako.experiments.common.ladder_report import as_trained, compare_steps, print_report
from manako.experiments.common.ladder_table import TABLE
from tests.helpers.small_envs import tiny_policy
from tests.helpers.small_runs import GOTO, corridor_env, expert_trajectories

ROOT = Path(__file__).parents[3]
SMALL = {"eval_episodes": 4, "gif_episodes": 0}


def run(name, folder, **given):
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    return subprocess.run(
        [sys.executable, str(ROOT / "experiments" / name), *words], cwd=folder, capture_output=True, text=True
    )


@pytest.mark.slow
def test_a_ladder_from_demonstrations_to_ppo(tmp_path):
    """All four runners, one after another, and the report that compares them."""
    small = {"eval_episodes": SMALL["eval_episodes"], "gif_episodes": SMALL["gif_episodes"]}
    assert set(SMALL) <= {*small, "torch_threads"}
    ladder = {
        "common": {
            "environment": {"env": GOTO, "num_envs": 8},
            "policy": {"policy": "tiny", "trainable": "full"},
            "sft": {"batch_size": 16},
            "run": SMALL,
        },
        "steps": [
            {"name": "demos", "runner": "collect", "run": {"episodes": 30, "error_rate": 0.3}},
            {"name": "sft", "runner": "sft", "sft": {"dataset": "demos"}},
            {"name": "dpo", "runner": "dpo", "dpo": {"episodes": 20, "num_steps": 10, "batch_size": 16, "rounds": 2}},
            {"name": "kto", "runner": "dpo", "dpo": {"method": "kto", "pairs": "branch", "episodes": 20}},
            {"name": "ppo", "runner": "ppo", "policy": {"policy": "sft"}, "run": {"total_steps": 64}},
        ],
    }
    (tmp_path / "ladder.yaml").write_text(json.dumps(ladder))
    done = run("run_ladder.py", tmp_path, ladder="ladder.yaml", output_dir="out", eval_episodes=6, table="table.md")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert [row["step"] for row in report["steps"]] == ["start", "sft", "dpo", "kto", "ppo"]
    for row in report["steps"][1:]:
        assert row["episodes"] == 6 and row["trained_parameters"] > 200_000
        assert row["seconds"] > 0 and row["perplexity"] > 1
    assert [row["from"] for row in report["steps"]] == [None, "start", "sft", "dpo", "sft"]
    rounds = json.loads((tmp_path / "out/dpo/report.json").read_text())["rounds"]
    assert [row["round"] for row in rounds] == [1, 2] and all(row["pairs"] > 0 for row in rounds)
    pairs = [(pair["step"], pair["against"]) for pair in report["comparisons"]]
    assert pairs[:3] == [("sft", "start"), ("dpo", "start"), ("dpo", "sft")] and len(pairs) == 10
    assert report["demonstrations"]["demos"]["episodes"] >= 30 and "ppo against sft" in done.stdout
    assert report["random"]["episodes"] == 6
    for row in report["steps"]:
        assert 0 <= row["expert_agreement"]["share"] <= 1 and row["milliseconds_a_frame"] > 0
        assert set(row["controls"]) == (set() if row["step"] == "start" else {"blank_image", "replaced_instruction"})
    table = (tmp_path / "table.md").read_text()
    assert table.startswith(TABLE.begin) and table.count("\n") == 10 and "| `dpo` | `sft` |" in table
    for chart in ("table.png", "out/report.png"):
        assert (tmp_path / chart).read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "out/sft/final/model.safetensors").stat().st_mtime
    done = run("run_ladder.py", tmp_path, resume="out", eval_episodes=6, sample="true")
    drawn = json.loads((tmp_path / "out/report_sampled.json").read_text())
    assert drawn["sampled_actions"] and len(drawn["steps"]) == 5 and not report["sampled_actions"]
    assert done.returncode == 0 and (tmp_path / "out/sft/final/model.safetensors").stat().st_mtime == before


@pytest.mark.slow
def test_a_ladder_with_a_blind_step_and_a_stricter_success(tmp_path):
    """The blind step is evaluated on black frames; `easier` gives a return above -100 as success, so it is 100 %."""
    ladder = {
        "common": {
            "environment": {"env": "manako/EZPoints-v0", "env_kwargs": {"size": 30}, "num_envs": 8},
            "policy": {"policy": "tiny", "trainable": "full"},
            "run": SMALL,
        },
        "evaluations": {
            "strict": {"env_kwargs": {"strict": True}},
            "easier": {"success_return": -100.0},
        },
        "steps": [
            {"name": "demos", "runner": "collect", "environment": {"image_source": "blank"}, "run": {"episodes": 30}},
            {
                "name": "blind",
                "runner": "sft",
                "environment": {"image_source": "blank"},
                "sft": {"dataset": "demos", "loss": "actions", "epochs": 2},
            },
        ],
    }
    (tmp_path / "ladder.yaml").write_text(json.dumps(ladder))
    done = run("run_ladder.py", tmp_path, ladder="ladder.yaml", output_dir="out", eval_episodes=6)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out/report.json").read_text())
    start, blind = report["steps"]
    for row in (report["random"], start, blind):
        assert row["evaluations"]["easier"]["success"] == 1 and row["evaluations"]["strict"]["episodes"] == 6
    own = json.loads((tmp_path / "out/blind/evaluation.json").read_text())
    assert own["policy"]["return_mean"] == own["blank_image"]["return_mean"]  # it has seen nothing else
    assert report["evaluations"]["strict"]["env_kwargs"] == {"size": 30, "strict": True}
    assert "strict [95 %]" in done.stdout and "single colour" not in done.stdout


@pytest.mark.parametrize(
    ("evaluations", "message"),
    [
        ([1], r"The evaluations in ladder.yaml are \[1\]: expected a name"),
        ({"strict": None}, "The evaluation 'strict' in ladder.yaml is None: expected settings"),
        ({"strict": {"env_kwarg": {}}}, "env_kwarg"),
        ({"strict": {"max_episode_steps": 0}}, "max_episode_steps"),
    ],
)
def test_evaluations_that_are_none(evaluations, message):
    ladder = {"common": {}, "evaluations": evaluations, "steps": [{"name": "one", "runner": "ppo"}]}
    with pytest.raises(UsageError, match=message):
        run_ladder.check_ladder(ladder, "ladder.yaml")


def test_a_step_is_shown_what_it_was_trained_on_and_else_what_the_evaluation_says():
    seen, black = EnvSettings("E-v0"), EnvSettings("E-v0", image_source="blank", num_envs=4)
    blind, rendered, no_word = (
        {"environment": given} for given in ({"image_source": "blank"}, {"image_source": "render"}, {"num_envs": 8})
    )
    assert as_trained(seen, {}, seen) == seen and as_trained(black, no_word, seen) == black
    assert as_trained(seen, blind, seen).image_source == as_trained(black, blind, seen).image_source == "blank"
    assert as_trained(black, rendered, seen) == EnvSettings("E-v0", image_source="render", num_envs=4)
    assert as_trained(black, rendered, EnvSettings("E-v0", image_source="render")) == black  # said for all steps


def test_an_evaluation_changes_what_it_names_alone():
    environment = {"env": "E-v0", "env_kwargs": {"size": 60, "strict": False}}
    changed = run_ladder.changed(environment, {"env_kwargs": {"strict": True}, "image_source": "blank"})
    assert changed == {"env": "E-v0", "env_kwargs": {"size": 60, "strict": True}, "image_source": "blank"}
    assert environment["env_kwargs"] == {"size": 60, "strict": False}
    assert run_ladder.changed({}, {"env_kwargs": {"a": 1}}) == {"env_kwargs": {"a": 1}}


def test_align_and_instruct(recorded, tmp_path, monkeypatch, capsys):
    """Both in this process; the ladder runs the same as programs."""
    monkeypatch.chdir(tmp_path)

    def run_here(**given):
        words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        monkeypatch.setattr(sys, "argv", ["run_sft.py", *words])
        with pytest.raises(SystemExit) as ended:
            run_main(run_sft.main)
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.err
        return printed.out

    printed = run_here(
        stage="align", adapter="mlp_zscore", trainable="adapter", captions=16, batch_size=8, output_dir="align"
    )
    assert "standardises features by 16 frames" in printed
    assert json.loads((tmp_path / "align/report.json").read_text())["trained_parameters"] == 8320
    given = {"policy": "align", "dataset": recorded / "right", "trainable": "adapter", "loss": "actions", **SMALL}
    printed = run_here(**given, epochs=3, warmup_steps=2, lr_scheduler_type="constant", output_dir="instruct")
    assert "actions right" in printed and "standardises" not in printed  # by what align gave it
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "instruct/metrics.jsonl").open()]
    assert rates == [0, 5e-4, *[1e-3] * (len(rates) - 2)] and len(rates) > 2
    assert json.loads((tmp_path / "instruct/report.json").read_text())["loss"] > 0


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recorded")
    save_trajectories(expert_trajectories(8, 8, 0.5, "expert, wrong 50%"), folder / "wrong")
    save_trajectories(expert_trajectories(4, 9, 0.0, "expert"), folder / "right")
    return folder


@pytest.mark.parametrize(
    ("runner", "words", "message"),
    [
        (run_sft, ["--env", "manako/ColorMatch-v0", "--dataset", "wrong"], "is of manako/GoTo-v0: expected one of"),
        (run_sft, ["--env_kwargs", '{"size": 4}', "--dataset", "wrong"], "but the environment shows 32 x 32 x 3"),
        (run_dpo, ["--pairs", "expert", "--dataset", "right"], "No two actions could be told apart"),
        (run_dpo, ["--pairs", "return", "--dataset", "right"], "No two actions could be told apart"),
        (run_dpo, ["--action_names", "n,s,w,e", "--dataset", "wrong"], "expected n, s, w, e"),
    ],
)
def test_data_that_do_not_fit_are_refused_before_anything_is_written(
    runner, words, message, recorded, tmp_path, monkeypatch, capsys
):
    *flags, name = words
    monkeypatch.setattr(
        sys, "argv", ["run", *flags, str(recorded / name), "--trainable", "full", "--output_dir", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as ended:
        run_main(runner.main)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_environments_without_an_end_are_refused(monkeypatch):
    monkeypatch.setattr("manako.experiments.common.collecting.PATIENCE", 7)
    env = corridor_env(8, {"length": 200, "limit": 100})
    collector = RolloutCollector(env, tiny_policy(env), 1, 0)
    with pytest.raises(UsageError, match="No episode of Corridor ended in 8 steps of 8 environments, and 0 of 8 had"):
        play_to_the_end(collector, [1] * 8, "Corridor")


def test_every_step_is_compared_with_all_before_it():
    """Three episodes more and none less: p = 2 / 2**3."""
    won = {"a": [False] * 3 + [True], "b": [True] * 4, "c": [True] * 4}
    assert compare_steps(won) == [
        {"step": "b", "against": "a", "difference": 0.75, "p": 0.25},
        {"step": "c", "against": "a", "difference": 0.75, "p": 0.25},
        {"step": "c", "against": "b", "difference": 0.0, "p": 1.0},
    ]


@pytest.mark.parametrize(("starts", "sampled", "tested"), [(1, False, False), (1, True, True), (9, False, True)])
def test_one_start_played_by_likeliest_actions_is_no_sample(starts, sampled, tested, capsys):
    row = {"from": None, "episodes": 20, "starts": starts, "success": 0.5, "success_ci95": [0.3, 0.7]}
    row |= {"return_mean": 0.5, "seconds": 1.0, "trained_parameters": 7, "perplexity": 30.0, "probes": 0.9}
    row |= {"parameters": 9, "controls": {}, "expert_agreement": None, "milliseconds_a_frame": 0.5}
    result = {"env": "Lake", "measure": "success", "sampled_actions": sampled, "demonstrations": {}, "random": row}
    result["steps"] = [{**row, "step": "start"}, {**row, "step": "sft"}]
    result["comparisons"] = [{"step": "sft", "against": "start", "difference": 0.1, "p": 0.25}]
    print_report(result, Path("report.json"))
    assert ("sft against start: +10.0 points, p = 0.25" in capsys.readouterr().out) == tested


def test_episodes_that_no_seed_fixes_are_compared_in_no_pairs(capsys):
    """Both steps won half of their episodes, but nobody knows whether of the same ones."""
    won = {"start": [True, False], "sft": [False, True]}
    comparisons = compare_steps(won, paired=False)
    assert comparisons == [{"step": "sft", "against": "start", "difference": 0.0, "p": None}]
    row = {"from": None, "episodes": 2, "starts": 2, "success": 0.5, "success_ci95": [0.3, 0.7], "fixed_by_seed": False}
    row |= {"return_mean": 0.5, "seconds": 1.0, "trained_parameters": 7, "perplexity": 30.0, "probes": 0.9}
    row |= {"parameters": 9, "controls": {}, "expert_agreement": None, "milliseconds_a_frame": 0.5}
    result = {
        "env": "Lake",
        "measure": "success",
        "sampled_actions": True,
        "demonstrations": {},
        "random": row,
        "comparisons": comparisons,
    }
    print_report({**result, "steps": [{**row, "step": "start"}, {**row, "step": "sft"}]}, Path("report.json"))
    text = capsys.readouterr().out
    assert "sft against start: +0.0 points\nno p: episodes are not fixed by seed" in text and "McNemar" not in text


FORGETFUL = {"env": "tests.helpers.small_envs:tests/Halves-v0", "env_kwargs": '{"forgetful": true}'}
BAD = {
    "no dataset": (run_sft, {"output_dir": "a"}, "--dataset is missing"),
    "no such dataset": (run_sft, {"output_dir": "a", "dataset": "nowhere"}, "There is no folder 'nowhere'"),
    "dataset to align": (
        run_sft,
        {"output_dir": "a", "stage": "align", "dataset": "x"},
        "is for --stage instruct",
    ),
    "actions to align": (
        run_sft,
        {"output_dir": "a", "stage": "align", "loss": "actions"},
        "for --stage instruct",
    ),
    "no captions": (run_sft, {"output_dir": "a", "stage": "align", "env": "CartPole-v1"}, "a method caption()"),
    "unknown pairs": (run_dpo, {"output_dir": "a", "pairs": "luck"}, "--pairs is 'luck': expected one of expert"),
    "no output": (collect, {}, "--output is missing"),
    "error of nobody": (
        collect,
        {"output": "a", "player": "random", "error_rate": 0.5},
        "--error_rate is the expert's",
    ),
    "no expert": (collect, {"output": "a", "env": "CartPole-v1"}, "CartPole-v1 has no expert"),
    "group": (
        collect,
        {"output": "a", "player": "random", "group_size": 2, **FORGETFUL},
        "so no --group_size 2 of them can begin alike",
    ),
    "pairs": (run_dpo, {"pairs": "return", **FORGETFUL}, "and --pairs return compares what follows from one seed"),
    "no ladder": (run_ladder, {}, "--ladder and --output_dir are needed"),
    "a flat ladder": (run_ladder, {"ladder": "flat.yaml", "output_dir": "a"}, "unknown section 'env'"),
    "a ladder's step": (run_ladder, {"ladder": "step.yaml", "output_dir": "a"}, "has the unknown key 'gamma' in sft"),
    "a ladder's key": (
        run_ladder,
        {"ladder": "key.yaml", "output_dir": "a"},
        "unknown key 'gama' in ppo: no runner has",
    ),
    "a ladder's table": (run_ladder, {"ladder": "flat.yaml", "table": "no/table.md"}, "The folder of --table"),
    "a preset's name": (
        run_ladder,
        {"ladder": "tiny.yaml", "output_dir": "a"},
        "is that of a preset",
    ),
    "an encoder's name": (run_ladder, {"ladder": "vit.yaml", "output_dir": "a"}, "expected another, such as vit_ppo"),
    "a strange ladder": (run_ladder, {"ladder": "strange.yaml", "output_dir": "a"}, "Step 1 of strange.yaml"),
}


@pytest.mark.parametrize(("runner", "given", "message"), BAD.values(), ids=BAD)
def test_bad_input(runner, given, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "strange.yaml").write_text("steps: [{name: a, runner: fly}]")
    (tmp_path / "tiny.yaml").write_text("steps: [{name: tiny, runner: sft}]")
    (tmp_path / "vit.yaml").write_text("steps: [{name: vit, runner: ppo}]")
    (tmp_path / "flat.yaml").write_text("common: {env: Lake-v0}\nsteps: [{name: a, runner: sft, dataset: b}]")
    (tmp_path / "step.yaml").write_text("steps: [{name: a, runner: sft, sft: {gamma: 1}}]")
    (tmp_path / "key.yaml").write_text("common: {ppo: {gama: 1}}\nsteps: [{name: a, runner: sft}]")
    monkeypatch.chdir(tmp_path)
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    monkeypatch.setattr(sys, "argv", ["run", *words])
    with pytest.raises(SystemExit) as ended:
        run_main(runner.main)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "a").exists()
