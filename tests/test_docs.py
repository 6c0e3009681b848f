"""What README.md, CONTRIBUTING.md and docs/ say holds: links, files, flags, commands and every block of Python.

Every command of a runner is read by that runner's own command line. Those that the README shows, and those in fenced
blocks anywhere, are run as well, with small sizes added (`RUN`, `RUN_SLOWLY`), or stand in a list that says why they
are not (`READ_ONLY`, `NOT_OURS`). The whole files of docs/architecture.md are added to their tables and used.
"""

import re
import shlex
import subprocess
import sys
import types
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from manako.agent.backends import BACKENDS, RolloutPlan, make_rollouts
from manako.envs import EpisodeVectorEnv
from manako.experiments.common.command_line import UsageError, run_main
from manako.policies import PolicySource, load_policy
from manako.policies.adapters import ADAPTERS
from manako.policies.answers import KINDS
from manako.policies.architectures import ROWS
from manako.policies.encoders import ENCODERS
from manako.policies.reading import SharedPrefix
from tests.helpers.families.more import got_ocr2
from tests.helpers.foreign_models import FRAME, NAMES, frames
from tests.helpers.words import last_of_each

ROOT = Path(__file__).parents[1]
DOCS = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
RUNNER = re.compile(r"(?:\S*/)?python (?:/path/to/)?experiments/([\w/]+)\.py ?(.*)", re.S)
TABLES = {"ADAPTERS": ADAPTERS, "ENCODERS": ENCODERS, "ROWS": ROWS, "KINDS": KINDS, "BACKENDS": BACKENDS}


class Command(NamedTuple):
    """A shell command of a document, on one line."""

    doc: str
    fenced: bool
    text: str

    @property
    def runner(self) -> str | None:
        """`run_ppo`, `benchmarks/speed`; None if it is no runner's."""
        found = RUNNER.fullmatch(self.text)
        return found and found[1]

    @property
    def words(self) -> list[str]:
        """What the runner is given."""
        return shlex.split(RUNNER.fullmatch(self.text)[2])


def blocks(doc: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return [text for name, text in FENCE.findall((ROOT / doc).read_text()) if name == language]


def inline(doc: str) -> list[str]:
    """What stands between backticks outside fenced blocks."""
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", FENCE.sub("", (ROOT / doc).read_text()))]


def commands() -> list[Command]:
    """Every command in a fenced block, and every runner's command inside a sentence."""
    lines = [(doc, line.split("  #")[0]) for doc in DOCS for text in blocks(doc, "bash") for line in text.splitlines()]
    pieces = [(doc, piece.strip()) for doc, line in lines for piece in re.split(r" && | -- (?=python)", line)]
    found = [Command(doc, True, re.sub(r"^\S*/python ", "python ", piece)) for doc, piece in pieces if piece]
    return found + [Command(doc, False, text) for doc in DOCS for text in inline(doc) if RUNNER.fullmatch(text)]


# ---- the documents ---------------------------------------------------------------------------------------------------


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 148
    prose = FENCE.sub("", (ROOT / "README.md").read_text()).splitlines()
    assert max(len(line) for line in prose if not line.startswith(("|", "- "))) <= 162


def test_the_readme_is_in_order():
    """What a reader looks for, in the order in which it is asked."""
    parts = ["# manako", "docs/goto.gif", "env.render()", "<!-- main job -->", "import PolicySource", "## Results"]
    parts += [
        "## Parts",
        "class Corridor",
        "## Other commands",
        "## Folders",
        "<!-- tests -->",
        "CONTRIBUTING.md",
        "LICENSE",
    ]
    text = (ROOT / "README.md").read_text()
    places = [text.find(part) for part in parts]
    assert -1 not in places and places == sorted(places)


@pytest.mark.parametrize("doc", DOCS)
def test_links_and_paths(doc):
    text = (ROOT / doc).read_text()
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in link]
    missing = [link for link in links if not (ROOT / doc).parent.joinpath(link).exists()]
    ours = r"(?:agent|envs|policies|experiments|manako|tests|docs|\.ci|\.mypy)/[\w./]*"
    paths = [text for text in inline(doc) if re.fullmatch(ours, text) and "NAME" not in text]
    assert not missing + [path for path in paths if not (ROOT / path).exists()]


def test_every_block_is_of_a_kind_that_is_tested():
    for doc in DOCS:
        kinds = {name for name, _ in FENCE.findall((ROOT / doc).read_text())}
        assert kinds <= {"", "bash", "python"}, doc
        assert not any(re.search(r"^\s*(\S*python|pip|ray|bash) ", text, re.M) for text in blocks(doc, "")), doc
    python = {doc: len(blocks(doc, "python")) for doc in DOCS}
    assert {doc: count for doc, count in python.items() if count} == {
        "README.md": 2,
        "docs/architecture.md": len(files()),
        "docs/gym_cards.md": 1,  # tests/envs/cards/test_original.py
    }


# ---- the README's Python ---------------------------------------------------------------------------------------------


def smaller(source: str, **sizes: tuple[str, str]) -> str:
    """The source with other sizes; each must be there."""
    for here, there in sizes.values():
        assert source.count(here) == 1, here
        source = source.replace(here, there)
    return source


def ten_lines() -> str:
    source = blocks("README.md", "python")[0]
    assert len([line for line in source.splitlines() if line]) == 10 and max(map(len, source.splitlines())) <= 100
    return source


def test_the_ten_lines(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = smaller(ten_lines(), steps=("num_iterations=24", "num_iterations=2"), seeds=("seeds(200)", "seeds(20)"))
    names: dict[str, Any] = {}
    exec(compile(source, "ten lines", "exec"), names)
    assert names["result"]["episodes"] == 20 and "95 % interval" in capsys.readouterr().out
    assert (tmp_path / "runs/ten-lines/final/config.json").is_file()


@pytest.mark.slow
def test_the_ten_lines_learn(tmp_path, monkeypatch):
    """About 20 s; a random policy has 27 %."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(ten_lines(), "ten lines", "exec"), names)
    assert names["result"]["episodes"] == 200 and names["result"]["success"] > 0.95


# ---- commands --------------------------------------------------------------------------------------------------------

EVALUATION = "--eval_episodes 8 --gif_episodes 0 --torch_threads 1"
PPO = f"--num_envs 8 --num_steps 4 --minibatch_size 16 --total_steps 64 {EVALUATION}"
# Command -> what is added (of two flags alike the last one counts), in the order in which they build on one another.
RUN = {
    "python experiments/run_ppo.py": f"{PPO} --output_dir runs/...",
    "python experiments/run_ppo.py --resume runs/...": "",
    "python experiments/evaluate.py --policy runs/...": "--num_envs 8 --episodes 8",
    "python experiments/check_model.py runs/.../final": "--num_envs 4",
    "python experiments/run_ppo.py --action_format text --constrain_actions true": (
        f"{PPO} --answer_tokens 8 --output_dir runs/text"
    ),
    "python experiments/run_ppo.py --env manako/Spell-v0 --answer_tokens 5 --constrain_actions true": (
        f"{PPO} --output_dir runs/spell"
    ),
    "python experiments/run_ppo.py --frames 4 --history 2": f"{PPO} --output_dir runs/past",
    "python experiments/run_ppo.py --eval_every 10000": f"{PPO} --validation_episodes 4 --output_dir runs/validated",
    "python experiments/run_ppo.py --env manako/Pendulum-v0": (
        f"{PPO} --env_kwargs '{{\"max_episode_steps\": 8}}' --output_dir runs/pendulum"
    ),
    "python experiments/run_ppo.py --advantage grpo": f"{PPO} --num_steps 12 --output_dir runs/grpo",
    "python experiments/collect.py --episodes 8000 --num_envs 64 --output data/goto": "--episodes 16 --num_envs 8",
    "python experiments/run_sft.py --dataset data/goto --loss actions --epochs 4": (
        f"{EVALUATION} --output_dir runs/imitation"
    ),
    "python experiments/run_dpo.py --policy runs/.../final --pairs expert": (
        f"{EVALUATION} --episodes 16 --num_envs 8 --output_dir runs/preferences"
    ),
    "python experiments/export_lerobot.py --dataset data/goto --output data/lerobot": "",
    "python experiments/run_sft.py --stage represent --policy vision_tokens --output_dir runs/codes": "--captions 64",
    "python experiments/run_sft.py --policy runs/codes/final --dataset data/goto --loss actions "
    "--next_frame_coef 1 --output_dir runs/world": EVALUATION,
    "python experiments/imagine.py --policy runs/world/final --gif imagined.gif": "--episodes 8",
    # docs/ladder.md
    "python experiments/collect.py --env manako/GoTo-v0 --error_rate 0.3 --episodes 6000 --num_steps 64 "
    "--output data/goto": ("--episodes 16 --num_steps 16 --num_envs 8 --output data/demonstrations"),
    "python experiments/run_sft.py --dataset data/goto --epochs 9 --batch_size 128 --learning_rate 2e-3 "
    "--output_dir runs/sft": f"{EVALUATION} --dataset data/demonstrations --epochs 1 --batch_size 16",
    "python experiments/run_dpo.py --policy runs/sft/final --pairs expert --beta 1.0 --learning_rate 5e-4 "
    "--output_dir runs/dpo": f"{EVALUATION} --episodes 16 --num_envs 8",
    "python experiments/run_ppo.py --env manako/GoTo-v0 --policy runs/dpo/final --total_steps 40000 "
    "--output_dir runs/ppo": PPO,
}
# In processes of their own, as they start some.
RUN_SLOWLY = {
    "python experiments/run_ladder.py --ladder experiments/configs/ladder_goto_tiny.yaml --output_dir runs/ladder": (
        "--ladder small.yaml --eval_episodes 8"
    ),
    "python experiments/run_ppo.py --rollout_backend ray-replica --num_workers 2": f"{PPO} --output_dir runs/ray",
    "python experiments/benchmarks/speed.py --policy tiny": "--quick --threads 1",
}
RUN_IN_A_USERS_FOLDER = {
    "python /path/to/experiments/check_env.py my_env:Corridor-v0": "",
    "python /path/to/experiments/run_ppo.py --env my_env:Corridor-v0": f"{PPO} --output_dir runs/corridor",
}
SMALL_LADDER = """
common:
  environment: {env: manako/ColorMatch-v0, num_envs: 8}
  run: {eval_episodes: 8, gif_episodes: 0, torch_threads: 1}
steps:
  - {name: ppo, runner: ppo, ppo: {num_steps: 4, minibatch_size: 16}, run: {total_steps: 32}}
"""
READ_ONLY = {
    "python experiments/run_ppo.py --seed 0": "a run of the first command",
    "python experiments/run_ppo.py --config ": "minutes; tests/experiments/test_run_ppo.py reads every configuration",
    "python experiments/run_ladder.py --ladder experiments/configs/architectures.yaml": "an hour; read there",
    "python experiments/reproduce.py ": "minutes; tests/experiments/test_reproduce.py runs a row of seconds",
    "python experiments/play.py": "a person plays in a window; tests/agent/data has its recordings",
    "python experiments/submit_ray_job.py": "a cluster's; tests/agent/workers submits to one of its own",
    "python /path/to/experiments/submit_ray_job.py": "likewise",
    "python experiments/run_ppo.py --rollout_backend ray-replica --output_dir /shared/": "the entrypoint of a job",
    "python experiments/evaluate.py --policy remote": "a server's; tests/experiments/test_remote.py has its own",
    "python experiments/collect.py --player remote": "likewise",
    "python experiments/run_dpo.py --policy runs/.../final --pairs remote": "likewise",
    "python experiments/check_model.py families/": "tests/experiments/test_check_model.py compares what it writes",
}
NOT_OURS = {
    "python3 -m venv": "makes the environment that these tests run in",
    "source ": "enters it",
    ".venv/bin/pip install": "fills it",
    "pip install -c": "fills it",
    "python -m pytest": "this",
    "python -m tests.helpers.families": "tests/experiments/test_check_model.py makes the same folders",
    "pytest": "this",
    "bash .ci/run": "runs this",
    "pre-commit install": "changes the git repository",
    "export RAY_AUTH_MODE": "of a cluster",
    "export OPENAI_API_KEY": "of a server",
    "ray ": "a cluster of several machines",
    "ssh ": "another machine",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with `experiments/` in it, so that the documents' paths hold."""
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runner_of(name: str) -> types.ModuleType:
    return import_module(f"manako.experiments.{name.replace('/', '.')}")


@pytest.mark.parametrize("command", [c for c in commands() if c.runner], ids=lambda c: f"{c.doc}: {c.text[-60:]}")
def test_a_command_is_read_by_its_runner(command, folder):
    assert (ROOT / f"experiments/{command.runner}.py").is_file()
    runner_of(command.runner).read_line(command.words)
    files = [word for word in command.words if word.startswith("experiments/")]
    assert all((ROOT / word).is_file() for word in files), files


def test_flags_in_sentences_exist(folder):
    """`--seed 1`: some runner has it."""
    runners = [runner_of(name) for name in sorted({command.runner for command in commands() if command.runner})]

    def known(flag: str) -> bool:
        for runner in runners:
            try:
                runner.read_line([flag])
            except UsageError as error:
                if str(error).startswith("There is no flag"):
                    continue
            return True
        return False

    texts = [text for doc in DOCS for text in inline(doc) if text.startswith("--")]
    flags = {flag for text in texts for flag in re.findall(r"--[a-z_-]+", text)} - {"--entrypoint-num-gpus"}  # Ray's
    assert len(flags) > 15 and [flag for flag in sorted(flags) if not known(flag)] == []


def test_every_command_is_run_or_in_a_list():
    shown = [command for command in commands() if command.fenced or command.doc == "README.md"]
    texts, run = [command.text for command in shown], {**RUN, **RUN_SLOWLY, **RUN_IN_A_USERS_FOLDER}
    lists = {**READ_ONLY, **NOT_OURS}
    assert [text for text in texts if text not in run and not text.startswith(tuple(lists))] == []
    assert [text for text in run if text not in texts] == []
    assert [start for start in lists if not any(text.startswith(start) for text in texts if text not in run)] == []


def test_commands_run(folder, monkeypatch, capfd):
    """Those of README and docs/ladder.md, in this process: one after another on what the ones before left."""
    for text, small in RUN.items():
        command = Command("", True, text)
        if "--resume" in command.words:
            (folder / "runs/.../evaluation.json").unlink()  # as if stopped while it was evaluated
        monkeypatch.setattr(sys, "argv", [f"{command.runner}.py", *last_of_each([*command.words, *shlex.split(small)])])
        with pytest.raises(SystemExit) as stop:
            run_main(runner_of(command.runner).main)
        assert stop.value.code == 0, f"{text}: {capfd.readouterr().err}"
    runs = {path.parent.name for path in (folder / "runs").glob("*/evaluation.json")}
    assert runs == {
        "...",
        "past",
        "validated",
        "pendulum",
        "text",
        "spell",
        "grpo",
        "imitation",
        "preferences",
        "world",
        "sft",
        "dpo",
        "ppo",
    }
    assert (folder / "data/lerobot/meta/info.json").is_file()


def run_as_a_program(text: str, small: str, folder: Path) -> str:
    command = Command("", True, text)
    words = [str(ROOT / f"experiments/{command.runner}.py"), *command.words, *shlex.split(small)]
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{text}: {done.stdout[-500:]} {done.stderr[-2000:]}"
    return done.stdout


def test_the_readmes_environment(tmp_path):
    """From a folder of its own, which is not the project's."""
    (tmp_path / "my_env.py").write_text(blocks("README.md", "python")[1])
    told = [run_as_a_program(text, small, tmp_path) for text, small in RUN_IN_A_USERS_FOLDER.items()]
    assert "no faults" in told[0] and "warning" not in told[0] and "go to the green end" in told[0]
    assert (tmp_path / "runs/corridor/evaluation.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("text", RUN_SLOWLY, ids=lambda text: RUNNER.fullmatch(text)[1])
def test_commands_that_start_processes(text, folder):
    (folder / "small.yaml").write_text(SMALL_LADDER)
    run_as_a_program(text, RUN_SLOWLY[text], folder)


# ---- the whole files of docs/architecture.md -------------------------------------------------------------------------


def files():
    """Path -> (source, table, key, value) of the whole files in docs/architecture.md."""
    text = (ROOT / "docs/architecture.md").read_text()
    found = re.findall(r'<!-- (\S+\.py): (\w+)\["(\w+)"\] = (\S+) -->\n```python\n(.*?)```', text, re.S)
    return {path: (source, table, key, value) for path, table, key, value, source in found}


@pytest.fixture
def added(monkeypatch):
    """Adds a file of docs/architecture.md as a module and the line that names it, for one test."""

    def add(path):
        source, table, key, value = files()[path]
        assert not (ROOT / path).exists(), f"{path} exists now: take another example"
        name = "manako." + path.removesuffix(".py").replace("/", ".")
        module = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, module)
        exec(compile(source, path, "exec"), module.__dict__)
        named = {"ROWS": key, "BACKENDS": name}.get(table)
        monkeypatch.setitem(TABLES[table], key, named or eval(value, module.__dict__))
        return key

    return add


def test_there_is_an_example_for_each_kind_of_file():
    assert [table for _, table, _, _ in files().values()] == ["ADAPTERS", "ENCODERS", "ROWS", "KINDS", "BACKENDS"]
    for path, (source, *_) in files().items():
        assert len(source.splitlines()) <= (42 if "workers" in path else 30), path


@torch.no_grad()
def actions(policy):
    """Log-probabilities (3, A) on three frames."""
    return policy.distribution(policy.prepare(frames(3), ["go", "go up", "stay"]))[0]


def test_the_adapter(added):
    policy = load_policy(PolicySource(adapter=added("policies/adapters/pool.py")), NAMES, FRAME)
    plain = load_policy(PolicySource(adapter="linear"), NAMES, FRAME)
    assert 4 * policy.processor.num_image_tokens == plain.processor.num_image_tokens == 16
    assert isinstance(policy.reading, SharedPrefix) and torch.isfinite(actions(policy)).all()


def test_the_encoder(added):
    policy = load_policy(PolicySource(vision_encoder=added("policies/encoders/dinov2.py")), NAMES, FRAME)
    assert policy.base_vlm.model.vision_tower.config.model_type == "dinov2"
    assert (actions(policy)[0] - actions(policy)[1]).abs().max() > 1e-4


def test_the_architecture(added, tmp_path):
    folder = str(got_ocr2(tmp_path))
    guessed = load_policy(PolicySource(policy=folder, trainable="adapter"), NAMES, FRAME)
    added("policies/architectures/got_ocr2.py")
    named = load_policy(PolicySource(policy=folder, trainable="adapter"), NAMES, FRAME)
    assert named.parts[2:7] == guessed.parts[2:7]
    assert torch.equal(actions(named), actions(guessed))
    learns = [{name for name, p in policy.named_parameters() if p.requires_grad} for policy in (named, guessed)]
    assert learns[0] == learns[1]


def test_the_kind_of_answer(added):
    policy = load_policy(PolicySource(action_format=added("policies/answers/number.py")), NAMES, FRAME)
    assert policy.codec.answers == ("1", "2", "3", "4")
    assert f"1: {NAMES[0]}, 2: {NAMES[1]}" in policy.prompt("go")
    assert torch.allclose(actions(policy).exp().sum(-1), torch.ones(3), atol=1e-5)


def test_the_backend(added):
    name = added("agent/workers/halves.py")
    env = EpisodeVectorEnv("manako/ColorMatch-v0", 1)
    policy = load_policy(PolicySource(), env.action_names, env.frame_shape)

    def make_env(first, count):
        return EpisodeVectorEnv("manako/ColorMatch-v0", count, seed=3, first_slot=first)

    plan = RolloutPlan(make_env, policy, lambda: policy, 8, 4, 2, seed=3, batch_size=2, record=True)
    halves, whole = make_rollouts(name, plan), make_rollouts("local", plan)
    for iteration in range(2):
        one, other = halves.collect(iteration), whole.collect(iteration)
        assert torch.equal(one.logprobs, other.logprobs) and torch.equal(one.rewards, other.rewards)
        assert np.array_equal(one.record.to_env, other.record.to_env)
