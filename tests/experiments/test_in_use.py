"""Every runner that writes leaves an output alone that another process is writing."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from manako.experiments import collect, evaluate, export_lerobot, imagine, run_dpo, run_ladder, run_ppo, run_sft
from manako.experiments.common.command_line import run_main
from manako.experiments.common.run_folder import write_settings

ROOT = Path(__file__).parents[2]
TOY = ["--env", "manako/ColorMatch-v0"]
NEW = {  # runner, words; the output is `out`
    "ppo": (run_ppo.main, [*TOY, "--output_dir", "out"]),
    "sft": (run_sft.main, [*TOY, "--stage", "align", "--output_dir", "out"]),
    "dpo": (run_dpo.main, [*TOY, "--output_dir", "out"]),
    "ladder": (run_ladder.main, ["--ladder", "ladder.yaml", "--output_dir", "out"]),
    "ppo resumed": (run_ppo.main, ["--resume", "out"]),
    "ladder resumed": (run_ladder.main, ["--resume", "out"]),
}
BESIDE = {
    "collect": (collect.main, [*TOY, "--output", "out"]),
    "evaluate": (evaluate.main, [*TOY, "--policy", "tiny", "--output", "out"]),
    "evaluate's GIF": (evaluate.main, [*TOY, "--policy", "tiny", "--gif", "out"]),
    "imagine": (imagine.main, [*TOY, "--policy", "tiny", "--output", "out"]),
    "export": (export_lerobot.main, ["--dataset", "data", "--output", "out"]),
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ladder.yaml").write_text("steps:\n- name: one\n  runner: ppo\n")
    return tmp_path


def hold(manager: str, place: Path) -> subprocess.Popen:
    code = f"""
        import time
        from pathlib import Path
        from manako.agent.locks import held_beside, held_folder
        with {manager}(Path("out")):
            print("held", flush=True)
            time.sleep(60)
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", textwrap.dedent(code)]
    process = subprocess.Popen(words, cwd=place, stdout=subprocess.PIPE, env=environment)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def everything(place: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in [place, *place.rglob("*")]}


@pytest.mark.parametrize("case", [*NEW, *BESIDE])
def test_an_output_in_use(case, place, monkeypatch, capfd):
    main, words = {**NEW, **BESIDE}[case]
    if case in NEW:
        (place / "out").mkdir()
    if "resumed" in case:
        write_settings(place / "out" / "config.yaml", {"environment": {"env": TOY[1]}})
        (place / "out" / "ladder.yaml").write_text((place / "ladder.yaml").read_text())
    process = hold("held_folder" if case in NEW else "held_beside", place)
    try:
        before = everything(place)
        monkeypatch.setattr(sys, "argv", ["runner.py", *words])
        with pytest.raises(SystemExit) as stop:
            run_main(main)
        written = capfd.readouterr().err
        assert stop.value.code == 2 and written.count("\n") == 1, written
        assert f"out is in use, process {process.pid} on {socket.gethostname()}, since " in written
        assert everything(place) == before
    finally:
        process.kill()
        process.wait()


def test_a_step_of_a_ladder_that_outlived_it(place, monkeypatch, capfd):
    """A ladder was killed and its runner was not: the folder of the step is not thrown away below it."""
    (place / "ladder").mkdir()
    (place / "ladder" / "ladder.yaml").write_text((place / "ladder.yaml").read_text())
    (place / "ladder" / "one").mkdir()
    (place / "ladder" / "one" / "metrics.jsonl").write_text(json.dumps({"iteration": 1}))
    (place / "out").symlink_to(place / "ladder" / "one")
    process = hold("held_folder", place)
    try:
        monkeypatch.setattr(sys, "argv", ["runner.py", "--resume", "ladder"])
        with pytest.raises(SystemExit) as stop:
            run_main(run_ladder.main)
        assert stop.value.code == 2 and f"process {process.pid}" in capfd.readouterr().err
        assert (place / "ladder" / "one" / "metrics.jsonl").is_file()
    finally:
        process.kill()
        process.wait()
