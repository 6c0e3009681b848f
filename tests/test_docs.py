"""What README.md and docs/ say is run: the whole files of docs/architecture.md, each named in its table and used."""

import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from manako.agent.backends import BACKENDS, RolloutPlan, make_rollouts
from manako.envs import EpisodeVectorEnv
from manako.policies import PolicySource, load_policy
from manako.policies.adapters import ADAPTERS
from manako.policies.answers import KINDS
from manako.policies.architectures import ROWS
from manako.policies.encoders import ENCODERS
from manako.policies.reading import SharedPrefix
from tests.helpers.foreign_models import FRAME, NAMES, frames, llava_folder

ROOT = Path(__file__).parents[1]
TABLES = {"ADAPTERS": ADAPTERS, "ENCODERS": ENCODERS, "ROWS": ROWS, "KINDS": KINDS, "BACKENDS": BACKENDS}


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
    folder = str(llava_folder(tmp_path))
    guessed = load_policy(PolicySource(policy=folder, trainable="adapter"), NAMES, FRAME)
    added("policies/architectures/llava.py")
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
