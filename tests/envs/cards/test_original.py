"""The plugin in docs/gym_cards.md, on a stand-in for the original package: its ids, spaces and use of `random`."""

import random
import re
import sys
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from manako import envs
from manako.envs.check import check_vlm_env

DOC = Path(__file__).parents[3] / "docs" / "gym_cards.md"
ACTIONS = {"NumberLine": 2, "EZPoints": 13, "Points24": 17, "Blackjack": 2}


class Original(gym.Env):
    """Draws its cards as the original does: from Python's `random`, whatever the seed."""

    observation_space = gym.spaces.Box(0, 255, (300, 300, 3), np.uint8)

    def __init__(self, count, has_formula):
        self.action_space, self.has_formula = gym.spaces.Discrete(count), has_formula

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cards = [random.randint(1, 13) for _ in range(4)]
        if self.has_formula:
            self.formula = []
        return self._frame(), {"Cards": self.cards}

    def step(self, action):
        if self.has_formula:
            self.formula.append(" " if action == 0 else int(action))
        over = action == self.action_space.n - 1
        return self._frame(), int(over) * 10, bool(over), False, {"Cards": self.cards}

    def _frame(self):
        frame = np.full((300, 300, 3), 90, np.uint8)
        for place, card in enumerate(self.cards):
            frame[90:150, 60 * place : 60 * place + 50] = 18 * card
        return frame


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "original_cards.py").write_text(re.findall(r"```python\n(.*?)```", DOC.read_text(), re.S)[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "gym_cards", types.ModuleType("gym_cards"))
    monkeypatch.delitem(sys.modules, "original_cards", raising=False)
    for game, count in ACTIONS.items():
        make = lambda count=count, game=game: Original(count, "Points" in game)  # noqa: E731
        gym.register(f"gym_cards/{game}-v0", make, max_episode_steps=300)
    yield
    for name in [name for name in gym.registry if name.startswith(("gym_cards/", "Original"))]:
        del gym.registry[name]


@pytest.mark.parametrize("game", ACTIONS)
def test_it_names_the_actions_and_follows_the_seed(game, plugin):
    name = f"original_cards:Original{game}-v0"
    assert not [fault for fault in check_vlm_env(name, success_return=1) if not fault.startswith("warning")]
    before = random.getstate()
    env = envs.make_vlm_env(name, success_return=1)
    assert len(env.action_names) == ACTIONS[game]
    shown = [env.reset(seed=seed)[0]["image"] for seed in (1, 2, 1)]
    assert np.array_equal(shown[0], shown[2]) and not np.array_equal(shown[0], shown[1])
    assert random.getstate() == before  # what others draw from it is theirs


def test_the_formula_stands_in_the_instruction(plugin):
    env = envs.make_vlm_env("original_cards:OriginalPoints24-v0")
    env.reset(seed=0)
    for action in (0, 3):
        shown = env.step(action)[0]
    assert shown["instruction"] == "make 24: _ 3"
