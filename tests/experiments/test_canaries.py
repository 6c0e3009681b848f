"""Nothing that comes in a file runs: each of these writes a file `ran` if it is executed, and none does."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from manako.agent.data.trajectories import load_trajectories, save_trajectories
from manako.agent.errors import TrainingError
from manako.agent.report.callbacks import CheckpointCallback
from manako.experiments import evaluate, export_lerobot, imagine, run_ladder, run_ppo, run_sft
from manako.experiments.common import named_modules
from manako.experiments.common.command_line import UsageError, run_main
from manako.experiments.common.run_folder import write_settings
from manako.manifest import write_manifest
from manako.policies import PolicyError, PolicySource, load_policy, save_policy
from tests.helpers.small_runs import expert_trajectories, goto_policy, make_trainer

NAMES, FRAME = ("up", "down", "left", "right"), (24, 24, 3)
CANARY = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
import gymnasium
import manako.envs
spec = gymnasium.registry["manako/GoTo-v0"]
gymnasium.register("Canary-v0", spec.entry_point, max_episode_steps=20)
"""
ENV = "canary:Canary-v0"


class Touch:
    """A pickle that runs a command when it is read."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The current folder, with a module in it that nobody has named."""
    (tmp_path / "canary.py").write_text(CANARY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    yield tmp_path
    sys.modules.pop("canary", None)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "final"
    folder.mkdir()
    save_policy(goto_policy(), folder)
    return folder


@pytest.fixture(scope="module")
def dataset():
    return expert_trajectories(2, 40, 0.3, "expert")


def foreign_run(place: Path, policy: Path) -> Path:
    """A run as somebody else would send it."""
    run = place / "downloaded"
    shutil.copytree(policy, run / "final")
    write_settings(run / "config.yaml", {"environment": {"env": ENV}, "run": {"seed": 0}})
    (run / "run.json").write_text("{}")
    return run


def refusal(main, words, monkeypatch, capfd) -> str:
    monkeypatch.setattr(sys, "argv", ["runner.py", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    written = capfd.readouterr().err
    assert stop.value.code == 2 and written.count("\n") == 1 and written.startswith("error: "), written
    return written


# ---- modules -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("main", [evaluate.main, imagine.main])
@pytest.mark.parametrize("of", ["downloaded", "downloaded/final"])
def test_the_module_of_a_foreign_run(main, of, policy, place, monkeypatch, capfd):
    foreign_run(place, policy)
    said = refusal(main, ["--policy", of], monkeypatch, capfd)
    assert f"module 'canary', which lies in {place}/canary.py and was never named by you" in said
    assert f"give --env {ENV}" in said and not (place / "ran").exists()


def test_the_module_of_a_foreign_run_that_is_resumed(policy, place, monkeypatch, capfd):
    foreign_run(place, policy)
    said = refusal(run_ppo.main, ["--resume", "downloaded"], monkeypatch, capfd)
    assert f"give --env {ENV}" in said and not (place / "ran").exists()
    said = refusal(run_ppo.main, ["--resume", "downloaded", "--env", "FrozenLake-v1"], monkeypatch, capfd)
    assert f"the run in 'downloaded' is of {ENV}: leave it out" in said and not (place / "ran").exists()


@pytest.mark.parametrize("main", [run_ppo.main, run_sft.main])
def test_the_module_of_a_foreign_configuration(main, place, monkeypatch, capfd):
    (place / "foreign.yaml").write_text(f"environment:\n  env: {ENV}\n")
    said = refusal(main, ["--config", "foreign.yaml"], monkeypatch, capfd)
    assert f"give --env {ENV}" in said and not (place / "ran").exists()


def test_the_module_of_a_foreign_ladder(place, monkeypatch, capfd):
    ladder = f"common:\n  environment:\n    env: {ENV}\nsteps:\n- name: one\n  runner: ppo\n"
    (place / "ladder.yaml").write_text(ladder)
    said = refusal(run_ladder.main, ["--ladder", "ladder.yaml", "--output_dir", "out"], monkeypatch, capfd)
    assert f"run `python experiments/check_env.py {ENV}` once" in said and not (place / "ran").exists()


def test_the_module_of_a_foreign_dataset(dataset, place, monkeypatch):
    about = json.loads(dataset.info.description)
    copy = dataset.select(range(len(dataset)))
    copy.info.description = json.dumps({**about, "env_id": ENV})
    save_trajectories(copy, place / "data")
    assert export_lerobot.render_fps(load_trajectories("data")[1]) is None and not (place / "ran").exists()
    named_modules.remember(ENV)
    assert export_lerobot.render_fps(load_trajectories("data")[1]) == 4 and (place / "ran").exists()


def test_a_module_that_was_named_is_named_for_the_users_own_runs(policy, place, monkeypatch):
    foreign_run(place, policy)
    read = ["--policy", "downloaded/final"]
    named = evaluate.read_line([*read, "--env", ENV])  # on this command line; and from here on
    assert evaluate.with_the_runs(named).environment.env == ENV
    assert evaluate.with_the_runs(evaluate.read_line(read)).environment.env == ENV
    (place / "mine.yaml").write_text(f"environment:\n  env: {ENV}\n")
    assert run_ppo.read_line(["--config", "mine.yaml"]).settings.environment.env == ENV
    assert not (place / "ran").exists()  # reading settings imports nothing


def test_a_module_of_the_same_name_elsewhere_is_another(place, monkeypatch):
    named_modules.remember(ENV)
    assert named_modules.is_named(ENV) and named_modules.is_named("FrozenLake-v1")
    (place / "other").mkdir()
    (place / "other" / "canary.py").write_text(CANARY)
    monkeypatch.chdir(place / "other")
    with pytest.raises(UsageError, match="other/canary.py and was never named"):
        named_modules.check_named(ENV, "It")
    assert not named_modules.is_named("os:Evil-v0") and not named_modules.is_named("no.such:Evil-v0")


@pytest.mark.parametrize("how", ["writable by others", "a link", "not there", "a folder"])
def test_a_list_of_names_that_is_not_the_users(how, place):
    named_modules.remember(ENV)
    file = place / "state" / "manako" / "named_modules"
    assert named_modules.is_named(ENV) and file.stat().st_mode & 0o777 == 0o600
    if how == "writable by others":
        file.chmod(0o666)
    else:
        file.rename(file.with_name("moved"))
        if how == "a link":
            file.symlink_to("moved")
        elif how == "a folder":
            file.mkdir()
    assert not named_modules.is_named(ENV)
    named_modules.remember(ENV)
    assert named_modules.is_named(ENV) == (how == "not there")


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
@pytest.mark.parametrize("by", ["torch", "pickle"])
def test_pickles_of_a_checkpoint(file, by, tmp_path):
    trainer = make_trainer(tmp_path / "staging", num_iterations=1)
    trainer.add_callback(CheckpointCallback(trainer, tmp_path, 1))
    trainer.train()
    folder = tmp_path / "checkpoints" / "checkpoint-1"
    content = Touch(tmp_path / "ran")
    torch.save(content, folder / file) if by == "torch" else (folder / file).write_bytes(pickle.dumps(content))
    write_manifest(folder)
    again = make_trainer(tmp_path / "again", num_iterations=2)
    if file == "training_args.bin":  # nothing reads it
        again.train(resume_from_checkpoint=str(folder))
    else:
        with pytest.raises(TrainingError, match=f"{file} .*cannot be read as numbers alone .*; use an older"):
            again.train(resume_from_checkpoint=str(folder))
    assert not (tmp_path / "ran").exists()


def test_pickles_of_a_model(policy, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(policy, folder)
    for name in ("policy.json", "manifest.json", "model.safetensors"):
        (folder / name).unlink()
    for name in ("pytorch_model.bin", "adapter_model.bin"):
        torch.save({"weight": Touch(tmp_path / "ran")}, folder / name)
    with pytest.raises(PolicyError):
        load_policy(PolicySource(policy=str(folder)), NAMES, FRAME)
    assert not (tmp_path / "ran").exists()


TEMPLATES = [
    "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__()[100] }}",
    "{% set x = messages.append(1) %}{{ self.__init__.__globals__ }}",
    "{% include '/etc/hostname' %}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates(template, policy, place):
    shutil.copytree(policy, place / "model")
    (place / "model" / "chat_template.jinja").write_text(template)
    write_manifest(place / "model")
    with pytest.raises(PolicyError) as caught:
        load_policy(PolicySource(policy="model"), NAMES, FRAME)
    assert "\n" not in str(caught.value) and not (place / "ran").exists()


@pytest.mark.parametrize("given", ["--config", "--resume", "--policy", "--ladder"])
def test_yaml(given, policy, place, monkeypatch, capfd):
    evil = "environment: !!python/object/apply:os.system ['touch ran']\n"
    run = foreign_run(place, policy)
    (run / "config.yaml").write_text(evil)
    (place / "evil.yaml").write_text(evil)
    main = {"--policy": evaluate.main, "--ladder": run_ladder.main}.get(given, run_ppo.main)
    words = [given, "evil.yaml" if given in ("--config", "--ladder") else run]
    words += ["--output_dir", "out"] if given == "--ladder" else []
    monkeypatch.setattr(sys, "argv", ["runner.py", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        run_main(main)
    written = capfd.readouterr()
    assert stop.value.code == 2 and "is no YAML" in written.err and not (place / "ran").exists()


def test_lora_settings_that_name_code(place):
    folder = place / "lora"
    folder.mkdir()
    save_policy(goto_policy(trainable="lora"), folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["auto_mapping"] = {"base_model_class": "Evil", "parent_library": "canary"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write_manifest(folder)
    load_policy(PolicySource(policy="lora", trainable="lora"), NAMES, FRAME)
    assert not (place / "ran").exists()


@pytest.mark.slow
@pytest.mark.fault
def test_code_is_refused_without_a_question(policy, place):
    """`trust_remote_code` left to the library asks on the terminal, and waits."""
    folder = place / "model"
    shutil.copytree(policy, folder)
    for name in ("policy.json", "manifest.json"):
        (folder / name).unlink()
    (folder / "evil.py").write_text(CANARY)
    (folder / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    runner = Path(evaluate.__file__)
    for flag in ("--policy", "--language_model", "--vision_encoder"):
        words = ["--policy", "tiny", flag, "model"] if flag != "--policy" else [flag, "model"]
        program = runner if flag == "--policy" else runner.with_name("run_ppo.py")
        done = subprocess.run(
            ["script", "-qec", f"{sys.executable} {program} {' '.join(words)} --env manako/GoTo-v0", "/dev/null"],
            capture_output=True,
            timeout=60,
            stdin=subprocess.DEVNULL,
        )
        assert b"brings custom code, which is not run here" in done.stdout and done.returncode == 2, done.stdout
    assert not list(place.rglob("ran"))
