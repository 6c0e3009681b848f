"""What learns where nobody says it: by where the language model comes from."""

import json
from dataclasses import asdict

import pytest

from manako.experiments.common.settings import DPOCommand, PPOCommand, SFTCommand
from manako.experiments.common.what_learns import with_trainable
from manako.policies import PolicySource, load_policy
from manako.policies.architectures.presets import PRESETS
from manako.policies.default_trainable import IS_RANDOM, POLICY_FILE, default_trainable
from manako.policies.language_models import LANGUAGE_MODELS
from manako.policies.saving import save_policy
from tests.helpers.foreign_models import FRAME, NAMES

PRETRAINED = {"smollm2"}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets(preset):
    assert default_trainable(PolicySource(preset))[0] == ("lora" if preset in PRETRAINED else "full")


@pytest.mark.parametrize("language_model", [*LANGUAGE_MODELS, "some/model", "/a/folder"])
def test_a_language_model_of_ones_own(language_model):
    learns = default_trainable(PolicySource("tiny", language_model=language_model))[0]
    assert learns == ("full" if language_model == "tiny-llama" else "lora")


def test_models_from_elsewhere_are_pretrained(tmp_path):
    assert default_trainable(PolicySource("org/model"))[0] == "lora"
    assert default_trainable(PolicySource(str(tmp_path)))[0] == "lora"
    (tmp_path / POLICY_FILE).write_text("{damaged")
    assert default_trainable(PolicySource(str(tmp_path)))[0] == "lora"


def test_a_saved_policy_knows_where_it_began(tmp_path):
    """Whatever was trained of it since; one that an older version saved is followed to its start."""
    policy = load_policy(PolicySource("tiny", trainable="adapter"), NAMES, FRAME)
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    save_policy(policy, first)
    again = load_policy(PolicySource(str(first), trainable="auto"), NAMES, FRAME)
    assert again.origin["source"]["trainable"] == "full" and again.origin[IS_RANDOM]
    assert all(parameter.requires_grad for parameter in again.vlm.parameters())
    save_policy(again, second)
    for folder in (second, first):
        description = json.loads((folder / POLICY_FILE).read_text())
        assert description.pop(IS_RANDOM) is True
        (folder / POLICY_FILE).write_text(json.dumps(description))
    assert default_trainable(PolicySource(str(second)))[0] == "full"
    description["source"] = asdict(PolicySource("smollm2"))
    (first / POLICY_FILE).write_text(json.dumps(description))
    assert default_trainable(PolicySource(str(second)))[0] == "lora"
    description["source"] = asdict(PolicySource(str(second)))  # two that name each other
    (first / POLICY_FILE).write_text(json.dumps(description))
    assert default_trainable(PolicySource(str(second)))[0] == "lora"


@pytest.mark.parametrize("kind", [PPOCommand, SFTCommand, DPOCommand])
def test_every_runner_says_what_learns_and_why(kind, capsys):
    command = with_trainable(kind())
    assert command.policy.trainable == "full"
    assert "learns       full, since its language model began with random weights" in capsys.readouterr().out
    asked = kind(policy=PolicySource("smollm2", trainable="adapter"))
    assert with_trainable(asked) is asked and capsys.readouterr().out == ""
