"""No damage is silent: every file of a checkpoint, of a policy, of a dataset and of a run's settings, in every way."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import yaml

from manako.agent.checkpoint import OF_A_RUN, latest_checkpoint
from manako.agent.data.trajectories import load_trajectories, save_trajectories
from manako.agent.report.callbacks import CheckpointCallback
from manako.errors import ManakoError
from manako.experiments import seal_folder
from manako.experiments.common.command_line import UsageError
from manako.experiments.common.run_folder import is_run, read_run_settings, write_settings
from manako.manifest import CARD, MANIFEST, fault, sha256, write_manifest
from manako.policies import PolicyError, PolicySource, load_policy, save_policy
from manako.policies.sealed import check_folder
from tests.helpers.small_runs import expert_trajectories, goto_policy, make_trainer

NAMES, FRAME = ("up", "down", "left", "right"), (24, 24, 3)


def flipped(place: float):
    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(place * (len(content) - 1))] ^= 1
        file.write_bytes(content)

    return flip


DAMAGES = {
    "deleted": Path.unlink,
    "emptied": lambda file: file.write_bytes(b""),
    "cut in half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "cut by a byte": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer by a byte": lambda file: file.write_bytes(file.read_bytes() + b" "),
    **{f"a bit flipped at {place:.0%}": flipped(place) for place in (0, 0.3, 0.7, 1)},
    "a link to nothing": lambda file: (file.unlink(), file.symlink_to("nowhere")),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A checkpoint, policies with all weights and with LoRA, and a dataset, each beside what reads it."""
    place = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(place / "staging", num_iterations=1)
    trainer.add_callback(CheckpointCallback(trainer, place / "run", 1))
    trainer.train()
    for trainable in ("full", "lora"):
        (place / trainable).mkdir()
        save_policy(goto_policy(trainable=trainable), place / trainable)
    save_trajectories(expert_trajectories(2, 40, 0.3, "expert"), place / "data")
    return place


def read_checkpoint(folder: Path) -> None:
    if latest_checkpoint(folder.parents[1], OF_A_RUN) is None:
        raise ManakoError("no whole checkpoint")


READERS = {
    "run/checkpoints/checkpoint-1": read_checkpoint,
    "full": lambda folder: load_policy(PolicySource(policy=str(folder)), NAMES, FRAME),
    "lora": lambda folder: load_policy(PolicySource(policy=str(folder), trainable="lora"), NAMES, FRAME),
    "data": lambda folder: load_trajectories(str(folder)),
}


@pytest.mark.filterwarnings("ignore:Passed over")
@pytest.mark.parametrize("name", READERS)
def test_no_damage_to_any_file_is_silent(name, whole, tmp_path):
    read, files = READERS[name], sorted(path for path in (whole / name).rglob("*") if path.is_file())
    files = [file for file in files if file.name != CARD]  # PEFT writes one; a card may be edited
    assert len(files) >= 4 and MANIFEST in [file.name for file in files]
    folder = tmp_path / name
    shutil.copytree(whole / name, folder)
    read(folder)
    silent = []
    for file in files:
        at = folder / file.relative_to(whole / name)
        for damage, change in DAMAGES.items():
            change(at)
            try:
                read(folder)
                silent.append(f"{at.name} {damage}")
            except ManakoError as error:
                assert "\n" not in str(error)
            shutil.rmtree(at) if at.is_dir() else at.unlink(missing_ok=True)
            shutil.copy2(file, at)
    assert not silent
    read(folder)


@pytest.mark.filterwarnings("ignore:Passed over")
@pytest.mark.parametrize("name", READERS)
def test_files_that_were_added_are_said(name, whole, tmp_path):
    folder = tmp_path / name
    shutil.copytree(whole / name, folder)
    for harmless in ("README.md", "LICENSE", ".gitattributes", ".cache/huggingface/download.lock", "curve.png"):
        (folder / harmless).parent.mkdir(parents=True, exist_ok=True)
        (folder / harmless).touch()
    READERS[name](folder)
    for file in ("chat_template.jinja", "additional_chat_templates/tool.jinja", "pytorch_model.bin", "data-2.arrow"):
        if (folder / file).exists():
            continue
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()
        with pytest.raises(ManakoError):
            READERS[name](folder)
        (folder / file).unlink()


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "rollout_state.json"])
def test_a_checkpoint_without_a_file_that_a_run_needs(missing, whole, tmp_path):
    """Neither there nor in its manifest: nothing is damaged, and a run would go on with a new optimizer."""
    folder = tmp_path / "checkpoints" / "checkpoint-1"
    shutil.copytree(whole / "run/checkpoints/checkpoint-1", folder)
    (folder / missing).unlink()
    write_manifest(folder)
    with pytest.warns(UserWarning, match=f"does not name {missing}, which has to be there"):
        assert latest_checkpoint(tmp_path, OF_A_RUN) is None


def test_a_folder_of_another_program_has_no_manifest(whole, tmp_path):
    folder = tmp_path / "foreign"
    shutil.copytree(whole / "full", folder)
    for name in ("policy.json", MANIFEST, "value_head.safetensors"):
        (folder / name).unlink()
    load_policy(PolicySource(policy=str(folder)), NAMES, FRAME)


def test_a_manifest_of_another_program(whole, tmp_path):
    folder = tmp_path / "foreign"
    shutil.copytree(whole / "full", folder)
    for name in ("policy.json", "value_head.safetensors"):
        (folder / name).unlink()
    (folder / MANIFEST).write_text('{"name": "an extension"}')
    load_policy(PolicySource(policy=str(folder)), NAMES, FRAME)


def test_a_policy_saved_beside_folders_of_others(whole, tmp_path):
    """As a script does that has a trainer's checkpoints, or its own results, in folders below."""
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "state").write_text("1")
    policy = goto_policy()
    policy.save(tmp_path)
    (tmp_path / "checkpoint-1" / "state").write_text("2")
    (tmp_path / "runs" / "1").mkdir(parents=True)
    (tmp_path / "runs" / "1" / "events").touch()
    load_policy(PolicySource(policy=str(tmp_path)), NAMES, FRAME)
    assert "/" not in "".join(json.loads((tmp_path / MANIFEST).read_text())["files"])


# ---- what a manifest may not lead to -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/../../secret", "link", "down/secret", "x\0y", "", "."]
)
def test_nothing_outside_the_folder_is_opened(name, tmp_path, monkeypatch):
    secret, folder = tmp_path / "secret", tmp_path / "folder"
    secret.write_text("mine")
    folder.mkdir()
    (folder / "link").symlink_to(secret)
    (folder / "down").symlink_to(tmp_path)
    entry = {"sha256": hashlib.sha256(b"mine").hexdigest(), "bytes": 4}
    manifest = {"format": 1, "files": {name: entry}}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    opened = []
    real = Path.open
    monkeypatch.setattr(Path, "open", lambda path, *words, **more: opened.append(path) or real(path, *words, **more))
    found = fault(folder)
    assert found and ("leads out of the folder" in found or "does not list files" in found)
    assert {Path(os.path.realpath(path)) for path in opened} <= {folder / MANIFEST}


def test_a_manifest_that_is_a_link_or_endless(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / MANIFEST).write_text("{}")
    (tmp_path / "folder" / MANIFEST).symlink_to(tmp_path / MANIFEST)
    assert "is no file of this folder" in str(fault(tmp_path / "folder"))
    (tmp_path / "folder" / MANIFEST).unlink()
    os.mkfifo(tmp_path / "folder" / MANIFEST)
    assert "is no file of this folder" in str(fault(tmp_path / "folder"))
    (tmp_path / "folder" / MANIFEST).unlink()
    (tmp_path / "folder" / MANIFEST).write_text("[" * 100_000)
    assert "cannot be read" in str(fault(tmp_path / "folder"))


def test_the_hubs_cache_keeps_files_as_links(whole, tmp_path):
    snapshot, blobs = tmp_path / "models--me--goto/snapshots/0a1b", tmp_path / "models--me--goto/blobs"
    shutil.copytree(whole / "full", snapshot)
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        blob = blobs / hashlib.sha256(file.read_bytes() + file.name.encode()).hexdigest()
        shutil.move(file, blob)
        file.symlink_to(Path("../../blobs") / blob.name)
    check_folder(snapshot)
    flipped(0.5)((snapshot / "model.safetensors").resolve())
    with pytest.raises(PolicyError, match="model.safetensors has changed"):
        check_folder(snapshot)


# ---- changes that were meant ---------------------------------------------------------------------------------------


def seal(monkeypatch, *words) -> int:
    monkeypatch.setattr("sys.argv", ["seal_folder.py", *map(str, words)])
    return seal_folder.main()


def test_an_edit_is_refused_until_its_owner_says_that_it_was_meant(whole, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "final"
    shutil.copytree(whole / "full", folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "\n")
    with pytest.raises(
        PolicyError, match=r"chat_template.jinja is longer .*`python experiments/seal_folder.py"
    ) as told:
        load_policy(PolicySource(policy=str(folder)), NAMES, FRAME)
    assert str(folder) in str(told.value)
    before = (folder / MANIFEST).read_bytes()
    with pytest.raises(UsageError, match="give --accept true"):
        seal(monkeypatch, "--folder", folder)
    assert (folder / MANIFEST).read_bytes() == before and "chat_template.jinja is longer" in capsys.readouterr().out
    assert seal(monkeypatch, "--folder", folder, "--accept", "true") == 0
    load_policy(PolicySource(policy=str(folder)), NAMES, FRAME)
    assert seal(monkeypatch, "--folder", folder) == 0
    with pytest.raises(UsageError, match="is no policy and no dataset"):
        seal(monkeypatch, "--folder", tmp_path, "--accept", "true")


def test_the_settings_of_a_run(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    write_settings(file, {"environment": {"env": "manako/GoTo-v0", "instruction": "gehe über 目"}})
    content = file.read_bytes()
    assert yaml.safe_load(content) == read_run_settings(file)
    assert capsys.readouterr().out == ""
    for damage, change in DAMAGES.items():
        change(file)
        try:
            read_run_settings(file)
            assert "nothing says that the settings" in capsys.readouterr().out, damage
            assert file.read_bytes().partition(b"\n")[2].strip() == content.partition(b"\n")[2].strip(), damage
        except UsageError:
            pass
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        file.write_bytes(content)
    file.write_bytes(content.partition(b"\n")[2])  # as the sentence says
    assert read_run_settings(file)["environment"]["env"] == "manako/GoTo-v0"
    assert "nothing says" in capsys.readouterr().out


def test_a_run_that_lacks_what_describes_it(tmp_path):
    write_settings(tmp_path / "config.yaml", {})
    assert not is_run(tmp_path)
    (tmp_path / "final").mkdir()
    with pytest.raises(UsageError, match="lacks run.json"):
        is_run(tmp_path)
    (tmp_path / "run.json").touch()
    assert is_run(tmp_path)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(UsageError, match="lacks config.yaml"):
        is_run(tmp_path)
    (tmp_path / "run.json").unlink()
    (tmp_path / "config.yaml").write_text("of: another program")
    assert not is_run(tmp_path)


# ---- what it costs -------------------------------------------------------------------------------------------------


def test_each_file_is_hashed_once_a_process(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(b"1" * 1000)
    young = sha256(file)
    old = time.time() - 60
    read, real = [], hashlib.file_digest
    monkeypatch.setattr("manako.manifest.hashlib.file_digest", lambda *words: read.append(1) or real(*words))
    monkeypatch.setattr("manako.manifest.time.time_ns", lambda: int((old + 120) * 1e9))
    assert sha256(file) == sha256(file) == young and len(read) == 1
    file.write_bytes(b"2" * 1000)
    assert sha256(file) != young
