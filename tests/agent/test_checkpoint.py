"""A checkpoint is whole or not there, whatever is done to it and whenever the process dies."""

import errno
import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from manako.agent.checkpoint import (
    MANIFEST,
    finalize_folder,
    latest_checkpoint,
    recover_folder,
    replace_folder,
    verify_folder,
    write_folder,
)
from manako.agent.errors import TrainingError

ROOT = Path(__file__).parents[2]
CONTENT = {"weights.safetensors": bytes(range(256)) * 40, "state.json": b"{}", "sub/rng.json": b"[1, 2, 3]"}


def fill(folder: Path) -> None:
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_whole_folder(tmp_path):
    final = tmp_path / "run" / "checkpoints" / "checkpoint-7"
    write_folder(final, fill)
    assert {name: (final / name).read_bytes() for name in CONTENT} == CONTENT
    manifest = json.loads((final / MANIFEST).read_text())
    assert manifest["format"] == 1
    assert manifest["files"]["state.json"] == {
        "sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",  # printf '{}' | sha256sum
        "bytes": 2,
    }
    assert set(manifest["files"]) == set(CONTENT)
    assert names(final.parent) == ["checkpoint-7"]
    verify_folder(final)


def test_a_folder_filled_elsewhere(tmp_path):
    filled = tmp_path / "filled"
    filled.mkdir()
    fill(filled)
    finalize_folder(filled, tmp_path / "checkpoints" / "checkpoint-1")
    verify_folder(tmp_path / "checkpoints" / "checkpoint-1")
    assert names(tmp_path) == ["checkpoints"]


def test_a_folder_filled_under_a_temporary_name(tmp_path):
    (tmp_path / ".tmp-checkpoint-1").mkdir()
    (tmp_path / ".tmp-old").mkdir()
    fill(tmp_path / ".tmp-checkpoint-1")
    finalize_folder(tmp_path / ".tmp-checkpoint-1", tmp_path / "checkpoint-1")
    verify_folder(tmp_path / "checkpoint-1")
    assert names(tmp_path) == ["checkpoint-1"]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path):
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "damage", "sentence"),
    [
        ("weights.safetensors", truncate, "weights.safetensors is cut short, 10239 bytes where 10240 were written"),
        ("weights.safetensors", lengthen, "weights.safetensors is longer than it was, 10241 bytes where 10240"),
        ("weights.safetensors", flip, "weights.safetensors has changed since it was written"),
        ("sub/rng.json", Path.unlink, "sub/rng.json is missing"),
        (MANIFEST, Path.unlink, "manifest.json is missing"),
        (MANIFEST, truncate, "manifest.json has changed since it was written"),  # by its last byte, a newline
        (MANIFEST, lambda path: path.write_text(path.read_text().replace("  ", " ", 1)), "manifest.json has changed"),
        (MANIFEST, lambda path: path.write_text("{"), "manifest.json cannot be read"),
        (MANIFEST, lambda path: path.write_text('{"format": 1}'), "manifest.json does not list files"),
        (MANIFEST, lambda path: path.write_text('{"format": 2, "files": {}}'), "manifest.json is not of format 1"),
        (
            MANIFEST,
            lambda path: path.write_text('{"format": 1, "files": {"../x": {"sha256": "", "bytes": 0}}}'),
            "manifest.json does not list files",
        ),
    ],
)
def test_damage_is_named(tmp_path, name, damage, sentence):
    final = tmp_path / "checkpoint-1"
    write_folder(final, fill)
    damage(final / name)
    with pytest.raises(TrainingError) as caught:
        verify_folder(final)
    assert sentence in str(caught.value)
    assert str(final) in str(caught.value)
    assert str(caught.value).endswith("use an older checkpoint.")


def test_nothing_is_overwritten(tmp_path):
    final = tmp_path / "checkpoint-1"
    write_folder(final, fill)
    with pytest.raises(TrainingError, match="checkpoint-1 exists already: a checkpoint is never overwritten"):
        write_folder(final, fill)
    (tmp_path / "filled").mkdir()
    with pytest.raises(TrainingError, match="exists already"):
        finalize_folder(tmp_path / "filled", final)
    verify_folder(final)

    def slow_writer(folder: Path) -> None:
        (tmp_path / "checkpoint-2").mkdir()  # someone else was faster; an empty folder would be replaced by a rename
        fill(folder)

    with pytest.raises(TrainingError, match="checkpoint-2 exists already"):
        write_folder(tmp_path / "checkpoint-2", slow_writer)
    assert names(tmp_path / "checkpoint-2") == []


def test_bad_contents_are_refused(tmp_path):
    with pytest.raises(TrainingError, match="expected a folder without one"):
        write_folder(tmp_path / "checkpoint-1", lambda folder: (folder / MANIFEST).touch())
    with pytest.raises(TrainingError, match=r"link.*copy what it points to"):
        write_folder(tmp_path / "checkpoint-1", lambda folder: (folder / "link").symlink_to(ROOT / "README.md"))
    with pytest.raises(TrainingError, match="nowhere is not a folder"):
        finalize_folder(tmp_path / "nowhere", tmp_path / "checkpoint-1")
    assert names(tmp_path) == []


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    def fails(folder: Path) -> None:
        fill(folder)
        raise KeyError("no such tensor")

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(KeyError, match="no such tensor"):
        write_folder(tmp_path / "checkpoint-1", fails)
    with pytest.raises(TrainingError, match=r"checkpoint-1 could not be written .*No space left.*make room and resume"):
        write_folder(tmp_path / "checkpoint-1", full)
    assert names(tmp_path) == []


@pytest.mark.parametrize("moment", ["in the writer", "before the rename"])
def test_killed_half_way(tmp_path, moment):
    """SIGKILL leaves the older checkpoint and a leftover, which the next write removes."""
    checkpoints = tmp_path / "checkpoints"
    write_folder(checkpoints / "checkpoint-1", fill)
    script = textwrap.dedent(
        f"""
        import os, signal
        from pathlib import Path
        from manako.agent import checkpoint

        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)

        def writer(folder):
            (folder / "weights.safetensors").write_bytes(b"half")
            if {moment == "in the writer"}:
                die()

        checkpoint.os.replace = die
        checkpoint.write_folder(Path({str(checkpoints)!r}) / "checkpoint-2", writer)
        """
    )
    killed = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert names(checkpoints) == [".tmp-checkpoint-2", "checkpoint-1"]
    assert latest_checkpoint(tmp_path) == checkpoints / "checkpoint-1"
    write_folder(checkpoints / "checkpoint-2", fill)
    assert names(checkpoints) == ["checkpoint-1", "checkpoint-2"]
    assert latest_checkpoint(tmp_path) == checkpoints / "checkpoint-2"


@pytest.mark.parametrize("moment", range(12))
def test_killed_while_a_folder_is_replaced(tmp_path, moment):
    """At each change of a name or removal: one whole folder is there, the older one until the new one is whole."""
    best = tmp_path / "best"
    replace_folder(best, lambda folder: (folder / "age").write_text("older"))
    script = textwrap.dedent(
        f"""
        import os, shutil, signal
        from pathlib import Path
        from manako.agent import checkpoint

        calls, remove = [], shutil.rmtree

        def counted(call):
            def counting(*arguments, **options):
                if len(calls) == {moment}:
                    if call is remove and Path(arguments[0]).is_dir():
                        os.unlink(Path(arguments[0]) / "age")  # half-way
                    os.kill(os.getpid(), signal.SIGKILL)
                calls.append(call)
                return call(*arguments, **options)
            return counting

        os.replace, os.fsync, shutil.rmtree = map(counted, (os.replace, os.fsync, shutil.rmtree))
        checkpoint.replace_folder(Path({str(best)!r}), lambda folder: (folder / "age").write_text("newer"))
        raise SystemExit(len(calls))
        """
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60, check=False).returncode
    whole = [path for path in (best, tmp_path / ".next-best") if path.exists()]
    for path in whole:
        verify_folder(path)
    ages = {(path / "age").read_text() for path in whole}
    assert done == -signal.SIGKILL and ages and ("newer" in ages) >= (not best.exists())
    recover_folder(best)
    verify_folder(best)
    assert (best / "age").read_text() == ("newer" if "newer" in ages else "older")
    replace_folder(best, fill)
    assert names(tmp_path) == ["best"]
    verify_folder(best)


def test_a_disk_that_is_full_leaves_the_older_folder(tmp_path):
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    replace_folder(tmp_path / "best", fill)
    with pytest.raises(TrainingError, match="could not be written"):
        replace_folder(tmp_path / "best", full)
    verify_folder(tmp_path / "best")
    assert names(tmp_path) == ["best"] and (tmp_path / "best/state.json").read_bytes() == b"{}"


def test_the_latest_is_the_highest_whole_one(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for iteration in (2, 9, 10):
        write_folder(tmp_path / "checkpoints" / f"checkpoint-{iteration}", fill)
    (tmp_path / "checkpoints" / "checkpoint-best").mkdir()
    (tmp_path / "checkpoints" / "checkpoint-99").write_text("a file")
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "checkpoint-10"
    flip(tmp_path / "checkpoints" / "checkpoint-10" / "weights.safetensors")
    with pytest.warns(UserWarning, match=r"Passed over: .*checkpoint-10 is damaged: weights.safetensors has changed"):
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoints" / "checkpoint-9"
