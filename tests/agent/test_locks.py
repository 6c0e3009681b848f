"""One process writes into a folder; a second one is told who, and leaves everything as it is."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from manako.agent import locks
from manako.agent.locks import InUseError, held_beside, held_folder, new_folder, refuse_held

ROOT = Path(__file__).parents[2]


def holder(folder: Path, how: str = "held_folder") -> subprocess.Popen:
    """Another process that holds a folder until it is killed."""
    code = f"""
        import time
        from pathlib import Path
        from manako.agent.locks import {how}
        with {how}(Path({str(folder)!r})):
            print("held", flush=True)
            time.sleep(60)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    return process


def everything(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}


def test_a_second_process_is_told_who_and_touches_nothing(tmp_path):
    process = holder(tmp_path)
    try:
        before = everything(tmp_path)
        for refused in (held_folder, new_folder, refuse_held):
            with pytest.raises(InUseError) as caught:
                enter(refused(tmp_path))
            who = f"process {process.pid} on {socket.gethostname()}, since 20"
            assert f"{tmp_path} is in use, {who}" in str(caught.value)
        assert everything(tmp_path) == before
    finally:
        process.kill()
        process.wait()


def enter(manager):
    if manager is not None:
        with manager:
            pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_dies_frees_its_folder(number, tmp_path):
    process = holder(tmp_path)
    process.send_signal(number)
    process.wait()
    assert (tmp_path / locks.LOCK).exists()  # nobody was left to remove it
    with held_folder(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / locks.LOCK).read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_that_stays_empty_is_removed_with_those_above_it(tmp_path):
    with new_folder(tmp_path / "runs" / "1"):
        assert (tmp_path / "runs" / "1" / locks.LOCK).is_file()
    assert list(tmp_path.iterdir()) == []
    with new_folder(tmp_path / "runs" / "1"):
        (tmp_path / "runs" / "1" / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "runs" / "1").iterdir()] == ["config.yaml"]
    with pytest.raises(InUseError, match="has just been written by another process"), new_folder(tmp_path / "runs/1"):
        pass
    assert [path.name for path in (tmp_path / "runs" / "1").iterdir()] == ["config.yaml"]


def race(folder: str, start: float, found) -> None:
    time.sleep(max(0, start - time.time()))
    try:
        with new_folder(Path(folder)):
            (Path(folder) / f"{os.getpid()}").touch()
            time.sleep(0.3)
            found.put("won")
    except InUseError:
        found.put("refused")


def test_of_several_that_start_at_once_one_wins(tmp_path):
    context = multiprocessing.get_context("fork")
    for number in range(5):
        found, start = context.Queue(), time.time() + 0.2
        racers = [context.Process(target=race, args=(str(tmp_path / f"{number}/run"), start, found)) for _ in range(6)]
        for racer in racers:
            racer.start()
        ends = sorted(found.get(timeout=30) for _ in racers)
        for racer in racers:
            racer.join()
        assert ends == ["refused"] * 5 + ["won"]
        assert len(list((tmp_path / f"{number}/run").iterdir())) == 1


def test_outputs_that_are_not_there_yet(tmp_path):
    with held_beside(tmp_path / "data" / "goto", tmp_path / "table.json", None):
        with pytest.raises(InUseError, match="table.json is in use"), held_beside(tmp_path / "table.json"):
            pass
        with held_beside(tmp_path / "data" / "other"):
            pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "table.json").touch()
    with pytest.raises(InUseError, match="table.json has just been written"), held_beside(tmp_path / "table.json"):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(locks.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    with held_folder(tmp_path):
        assert list(tmp_path.iterdir()) == []
    assert "has no locks (No locks available), so nothing keeps a second process out" in capsys.readouterr().err


def test_what_another_process_says_of_itself_is_plain_text(tmp_path):
    process = holder(tmp_path)
    try:
        (tmp_path / locks.LOCK).write_text("\x1b[2J" + "x" * 10_000)
        with pytest.raises(InUseError) as caught, held_folder(tmp_path):
            pass
        assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 500
    finally:
        process.kill()
        process.wait()


def test_a_link_is_no_lock(tmp_path):
    (tmp_path / "secret").write_text("mine")
    (tmp_path / locks.LOCK).symlink_to(tmp_path / "secret")
    with pytest.raises(OSError), held_folder(tmp_path):
        pass
    assert (tmp_path / "secret").read_text() == "mine"
