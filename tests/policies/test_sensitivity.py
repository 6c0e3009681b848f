"""How far the state that is read moves: against a hand sum, of policies that see, are blind, and are deaf."""

import math

import numpy as np
import pytest
import torch

from manako.envs.settings import EnvSettings
from manako.experiments import check_model
from manako.experiments.common.command_line import run_main
from manako.experiments.common.environments import sights
from manako.policies import PolicySource, load_policy
from manako.policies.sensitivity import Sensitivity, sensitivity
from tests.helpers.foreign_models import FRAME, NAMES, frames

TEXTS = ["go up", "go to the far end of the red room", "go up"]


@pytest.fixture(scope="module")
def tiny():
    return load_policy(PolicySource(), NAMES, FRAME)


def by_hand(policy, images, texts, other_images, other_texts):
    """The definition, sample by sample, of the library's own last hidden states."""
    changes = []
    for row in range(len(images)):
        states = []
        for image, text in ((images[row], texts[row]), (other_images[row], other_texts[row])):
            given = policy.processing.call([policy.prompt(text)], image[None])
            with torch.no_grad():
                state = policy.base_vlm.model(**given).last_hidden_state[0, -1].double().numpy()
            states.append((state - state.mean()) / state.std())
        changes.append(((states[1] - states[0]) ** 2).mean())
    return math.sqrt(sum(changes) / len(changes))


def test_it_is_the_root_mean_square_of_the_change(tiny):
    images = frames(3)
    found = sensitivity(tiny, images, TEXTS)
    assert found.frame == pytest.approx(by_hand(tiny, images, TEXTS, images[[1, 2, 0]], TEXTS), abs=1e-4)
    # the second text is exchanged for the third, the third, which is the first again, for the second
    others = [TEXTS[1], TEXTS[2], TEXTS[1]]
    assert found.instruction == pytest.approx(by_hand(tiny, images, TEXTS, images, others), abs=1e-4)
    assert found.frame > 0.1 and found.instruction > 0.1 and not found.warnings


def test_a_blind_and_a_deaf_policy_are_told():
    policy = load_policy(PolicySource(), NAMES, FRAME)
    with torch.no_grad():
        for parameter in policy.base_vlm.model.adapter.down.parameters():
            parameter.zero_()
    found = sensitivity(policy, frames(3), TEXTS)
    assert found.frame == 0 and found.instruction > 0.1
    assert len(found.warnings) == 1 and "starts blind" in found.warnings[0]
    assert "starts deaf" in Sensitivity(0.5, 0.05).warnings[0]


def test_what_cannot_be_exchanged_is_said(tiny):
    found = sensitivity(tiny, np.repeat(frames(1), 3, axis=0), ["go up"] * 3)
    assert found == Sensitivity(None, None)
    assert "there is one frame, there is one instruction" in found.text


def test_sights_of_an_environment_with_one_start_are_walked_to():
    images, texts = sights(EnvSettings(env="FrozenLake-v1"), seed=0)
    assert len({image.tobytes() for image in images}) > 1 and len(images) == len(texts)
    images, texts = sights(EnvSettings(env="manako/GoTo-v0"), seed=0)
    assert len({image.tobytes() for image in images}) == len(images) == 6 and len(set(texts)) > 1


def test_check_model_warns_of_closed_gates(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["check_model.py", "flamingo", "--num_envs", "2"])
    with pytest.raises(SystemExit):
        run_main(check_model.main)
    said = capsys.readouterr().out
    assert "another frame moves it by 0.00" in said and "warning: the policy starts blind" in said
