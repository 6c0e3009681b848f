"""What a run has learned survives: a full disk, SIGKILL at any moment, a second process on its folder."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from manako.experiments.common.command_line import UsageError
from manako.experiments.common.disk_room import check_disk_room, checkpoint_bytes
from tests.helpers.small_runs import difference, goto_policy

ROOT = Path(__file__).parents[2]
RUNNER = [sys.executable, str(ROOT / "experiments" / "run_ppo.py")]
SMALL = "--num_envs 8 --num_steps 4 --minibatch_size 16 --num_ppo_epochs 2 --eval_episodes 4 --gif_episodes 0 "
SMALL += "--torch_threads 1 --save_every 1 --total_steps"
TIMES = ("rollout_seconds", "rollout_steps_per_second")
KILLS = 20


def words(output_dir: Path | str, steps: int) -> list[str]:
    return [*RUNNER, *SMALL.split(), str(steps), "--output_dir", str(output_dir)]


def run(arguments: list[str], **options) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=1200, **options)


def rows(folder: Path) -> list[dict]:
    written = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines = [json.loads(line) for line in written if line.endswith("\n")]  # a kill may cut the last one short
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def assert_equal_runs(one: Path, other: Path) -> None:
    """Bit for bit: every metric of every iteration, the final weights, the episodes of the evaluation."""
    assert rows(one) == rows(other)
    for name in ("model.safetensors", "value_head.safetensors"):
        assert difference(load_file(one / "final" / name), load_file(other / "final" / name)) == 0
    assert (one / "episodes.json").read_text() == (other / "episodes.json").read_text()
    assert (one / "evaluation.json").read_text() == (other / "evaluation.json").read_text()


# ---- two processes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of six iterations."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(words(folder, 192)).returncode == 0
    return folder


@pytest.mark.slow
@pytest.mark.fault
def test_two_new_runs_at_once_and_a_second_resume(undisturbed, tmp_path):
    folder = tmp_path / "run"
    first, second = (
        subprocess.Popen(words(folder, 192), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    )
    for process in (first, second):
        process.communicate(timeout=1200)
    ends = {process.returncode for process in (first, second)}
    assert ends == {0, 2}
    assert_equal_runs(folder, undisturbed)


@pytest.mark.slow
@pytest.mark.fault
def test_a_second_resume_is_told_who_and_touches_nothing(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    for name in ("evaluation.json", "episodes.json", "learning_curve.png"):
        (folder / name).unlink()
    shutil.rmtree(folder / "final")
    shutil.rmtree(folder / "checkpoints" / "checkpoint-6")
    first = subprocess.Popen([*RUNNER, "--resume", str(folder)], stdout=subprocess.PIPE, text=True)
    while not (folder / ".lock").exists():
        time.sleep(0.02)
    for arguments in ([*RUNNER, "--resume", str(folder)], words(folder, 192)):
        second = run(arguments)
        assert second.returncode == 2 and f"is in use, process {first.pid} on " in second.stderr
        assert second.stderr.count("\n") == 1
    first.communicate(timeout=1200)
    assert first.returncode == 0
    assert_equal_runs(folder, undisturbed)


# ---- the disk ------------------------------------------------------------------------------------------------------


def limited(size: int):
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.parametrize(
    "largest", [600_000, 1_200_000]
)  # bytes of a file: the weights do not fit; the optimizer does not
def test_a_disk_that_takes_no_checkpoint(largest, undisturbed, tmp_path):
    """By a limit on the size of files, which every system has: the write itself is refused, as by a full disk."""
    folder = tmp_path / "run"
    stopped = subprocess.Popen(words(folder, 192), stdout=subprocess.PIPE, text=True)
    while not (folder / "checkpoints" / "checkpoint-2").exists():
        time.sleep(0.02)
    stopped.send_signal(signal.SIGINT)
    stopped.communicate(timeout=1200)
    before = sorted(path.name for path in (folder / "checkpoints").iterdir())
    refused = run([*RUNNER, "--resume", str(folder)], preexec_fn=limited(largest))
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    assert "could not be written" in refused.stderr and "make room and resume" in refused.stderr
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == before
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
    assert run([*RUNNER, "--resume", str(folder)]).returncode == 0
    assert_equal_runs(folder, undisturbed)


def can_mount(place: Path) -> bool:
    tried = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", str(place)], capture_output=True)
    return tried.returncode == 0


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(1200)
def test_a_full_disk(undisturbed, tmp_path):
    """A small tmpfs that something else fills while the run goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("unshare") is None or not can_mount(disk):
        pytest.skip("no tmpfs can be mounted here")
    script = f"""
        mount -t tmpfs -o size=60m tmpfs {disk}
        {" ".join(words(disk / "run", 192))} >/dev/null 2>{tmp_path}/first &
        until [ -d {disk}/run/checkpoints/checkpoint-1 ]; do sleep 0.02; done
        head -c 100m /dev/zero > {disk}/ballast 2>/dev/null
        wait $!; echo $? > {tmp_path}/codes
        ls -A {disk}/run {disk}/run/checkpoints > {tmp_path}/left
        {" ".join(RUNNER)} --resume {disk}/run 2>{tmp_path}/second; echo $? >> {tmp_path}/codes
        rm {disk}/ballast
        {" ".join(RUNNER)} --resume {disk}/run 2>{tmp_path}/third; echo $? >> {tmp_path}/codes
        cp -r {disk}/run {tmp_path}/run
    """
    subprocess.run(["unshare", "-m", "bash", "-c", script], check=True, timeout=1200, capture_output=True)
    codes = (tmp_path / "codes").read_text().split()
    first, second, left = ((tmp_path / name).read_text() for name in ("first", "second", "left"))
    assert codes == ["1", "2", "0"], first + second
    assert (
        first.startswith(("error: The checkpoint of iteration", "error: The disk refused")) and first.count("\n") == 1
    )
    assert "checkpoint-1" in left and ".staging" not in left and ".lock" not in left and ".tmp" not in left
    assert "The run needs about" in second and "0 MiB is free: make room" in second
    assert_equal_runs(tmp_path / "run", undisturbed)


def test_room_is_estimated(tmp_path, monkeypatch):
    policy = goto_policy()
    weights = sum(parameter.numel() * 4 for parameter in policy.parameters())
    assert checkpoint_bytes(policy) == 3 * weights  # the weights, and two moments of AdamW
    free = 20 * 2**20
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(free, 0, free))
    check_disk_room(policy, tmp_path / "runs" / "1", kept=0)
    with pytest.raises(UsageError, match=r"needs about \d+ MiB on the disk of .*\(9 checkpoints of \d MiB, one more"):
        check_disk_room(policy, tmp_path / "runs" / "1", kept=9)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint").write_bytes(bytes(10 * checkpoint_bytes(policy)))  # what is there makes room
    check_disk_room(policy, tmp_path / "run", kept=9)


# ---- SIGKILL -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(3000)
def test_killed_at_random_moments(tmp_path):
    """Runs from their first start to their last evaluation: killed, gone on with, killed again, 20 times in all."""
    assert run(words(tmp_path / "whole", STEPS)).returncode == 0
    chance, folder = random.Random(os.environ.get("MANAKO_KILL_SEED", 0)), tmp_path / "run"
    moments: list[str] = []
    finished = 0
    while len(moments) < KILLS or folder.exists():
        begun = any(folder.glob("checkpoints/checkpoint-*"))
        if not begun:
            shutil.rmtree(folder, ignore_errors=True)  # nothing was learned yet, and --resume says so
        arguments = [*RUNNER, "--resume", str(folder)] if begun else words(folder, STEPS)
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if len(moments) < KILLS:
            assert process.stdout is not None
            if not begun:  # a start without a checkpoint has nothing that could be lost
                while process.poll() is None and not any(folder.glob("checkpoints/checkpoint-*")):
                    time.sleep(0.01)
            elif chance.random() < 0.8:  # else any moment from the start of the process
                next((line for line in process.stdout if line.startswith("counted")), None)
            time.sleep(chance.uniform(0, LONGEST))
            process.kill()
            process.wait()
            assert rows(folder) == rows(tmp_path / "whole")[: iterations(folder)]
            moments.append(f"{iterations(folder)} of {STEPS // 32}" + ", final" * (folder / "final").exists())
        written = process.communicate(timeout=1200)[1]
        if (folder / "evaluation.json").exists():  # a run's last file: a kill may come after it
            finished += 1
            assert_equal_runs(folder, tmp_path / "whole")
            shutil.rmtree(folder)
        else:
            assert process.returncode == -signal.SIGKILL, written
    assert finished
    print(f"{KILLS} kills, at iterations {'; '.join(moments)}: {finished} runs finished, equal to the undisturbed one")


STEPS, LONGEST = 640, 5.0  # 20 iterations; seconds from the header, or the start, to a kill


def iterations(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0
