"""Rows that are run again: their commands, the figures that the documents state, and the verdict."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from manako.experiments import reproduce
from manako.experiments.common.command_line import UsageError, build, checked_sections, parse, read_yaml, run_main
from manako.experiments.common.settings import PPOCommand
from manako.experiments.run_ladder import COMMANDS, check_ladder, own_sections, settings_of

ROOT = Path(__file__).parents[2]
ROWS = read_yaml(reproduce.ROWS)
STATED = "".join((ROOT / f"docs/{name}.md").read_text() for name in ("results", "gym_cards", "babyai"))


def main(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *words])
    with pytest.raises(SystemExit) as ended:
        run_main(reproduce.main)
    return ended.value.code, *capsys.readouterr()


@pytest.mark.parametrize("name", ROWS)
def test_every_row_has_a_command_that_its_runner_takes(name, tmp_path):
    row = ROWS[name]
    assert {"what", "minutes", "tried", "figures"} <= set(row)
    for seed in row["figures"]:
        words = reproduce.command(row, seed, tmp_path / name)
        if "ladder" not in row:
            assert row["run"] == "experiments/run_ppo.py"
            assert parse(PPOCommand, "", words[1:]).run.seed == seed
            assert set(row["figures"][seed]) == {"policy"}
            continue
        ladder = read_yaml(Path(words[words.index("--ladder") + 1]))
        steps = {step["name"]: step for step in check_ladder(ladder, name)}
        assert ladder["common"]["run"]["seed"] == seed
        for figure in row["figures"][seed]:
            step, _, evaluation = figure.partition(".")
            kind = COMMANDS[steps[step]["runner"]]
            settings = settings_of(steps[step]["runner"], own_sections(steps[step]), ladder["common"])
            assert build(kind, checked_sections(kind, settings, step)).run.seed == seed
            assert not evaluation or evaluation in ladder["evaluations"]


@pytest.mark.parametrize("name", ROWS)
def test_every_figure_is_stated_in_the_documents(name):
    row = ROWS[name]
    unit = "" if row.get("measure") == "return" else " %"
    for figures in row["figures"].values():
        for stated, low, high in figures.values():
            text = f"{stated}{unit} ({low} to {high}"
            assert text in STATED, text


def test_the_verdict_on_figures_by_hand(capsys):
    row = {"what": "a row", "tried": 3, "figures": {4: {"policy": [97.4, 95.6, 98.5], "random": [30, 25.0, 35.0]}}}
    assert reproduce.compare("row", row, 4, {"policy": {"success": 0.956}, "random": {"success": 0.35}})
    assert not reproduce.compare("row", row, 4, {"policy": {"success": 0.9549}, "random": {"success": 0.35}})
    said = capsys.readouterr().out
    assert "row, seed 4, policy: success 95.6 %, stated 97.4 % (95.6 to 98.5): inside" in said
    assert "success 95.5 %, stated 97.4 % (95.6 to 98.5): OUTSIDE the interval" in said
    assert "configurations tried before the one stated: 3" in said
    of_return = {"measure": "return", "figures": {0: {"clone.strict": [-253, -282, -225]}}}
    steps = [{"step": "clone", "return_mean": 1.0, "evaluations": {"strict": {"return_mean": -281.96}}}]
    assert reproduce.compare("row", of_return, 0, {"steps": steps})
    assert "return -282.0, stated -253 (-282 to -225): inside" in capsys.readouterr().out
    with pytest.raises(UsageError, match="no figure 'cloned'"):
        reproduce.figure_of({"steps": steps}, "cloned", "success")


def test_rows_and_seeds_that_are_none(monkeypatch, capsys):
    code, _, err = main(monkeypatch, capsys, "gotoo")
    assert code == 2 and err.startswith("error: There is no row 'gotoo': did you mean goto? expected one of goto,")
    code, _, err = main(monkeypatch, capsys, "goto", "--seed", "9")
    assert code == 2 and err.strip() == "error: --seed is 9: expected one that goto states a figure for, 0, 1, 2."
    assert main(monkeypatch, capsys)[0] == 2


def test_a_row_is_run_and_then_only_read(monkeypatch, capfd, tmp_path):
    """A row of seconds; its interval is that of anything, and then of nothing that can come out."""
    words = (
        "--env manako/ColorMatch-v0 --num_envs 8 --num_steps 4 --minibatch_size 32 --total_steps 64 --gif_episodes 0"
    )
    row = {"what": "a test", "run": "experiments/run_ppo.py", "minutes": 1, "tried": 0, "figures": {5: {}}}
    row["flags"] = [*words.split(), "--eval_episodes", 8]
    file = tmp_path / "results.yaml"
    monkeypatch.setattr(reproduce, "ROWS", file)
    monkeypatch.chdir(tmp_path)
    for interval, code in (([50, 0, 100], 0), ([101, 100.1, 102], 1)):
        row["figures"][5] = {"policy": interval}
        file.write_text(yaml.safe_dump({"small": row}))
        ended, out, err = main(monkeypatch, capfd, "small")
        assert ended == code, err
        assert "small, seed 5, policy: success" in out
    summary = json.loads((tmp_path / "runs/reproduced/small-seed5/evaluation.json").read_text())
    assert summary["policy"]["episodes"] == 8 and "trained in" not in out
    assert re.search(f"success {100 * summary['policy']['success']:.1f} %, stated 101", out)
