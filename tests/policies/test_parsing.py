"""From an answer in text to an action, and what stands in for an answer without one."""

import pytest

from manako.policies.answers.illegal import SKIP, stands_in
from manako.policies.answers.parsing import parse_action
from manako.policies.errors import PolicyError

NAMES = ("up", "down", "left", "turn left")
PLAIN = {
    "up": 0,
    " Up.\n": 0,
    '"DOWN"': 1,
    "**Left**": 2,
    "turn left": 3,
    "Turn left!": 3,
    "A": 0,
    "b": 1,
    "(C)": 2,
    "D.": 3,
    "B: down": 1,
    "(B) down": 1,
    "B down": 1,
    "B) since the ball is not above": 1,
    "Answer: B": 1,
    "The best action is left.": 2,
    "Action: turn left": 3,
    "I would go up here.": 0,
    "turn left, yes: turn left": 3,
    '{"action": "up"}': 0,
    '```json\n{"action": "B"}\n```': 1,
    "<think>up? no, left</think> down": 1,
}
NOTHING = [
    "",
    "...",
    "E",
    "a fish",
    "up or down",
    "left, then turn left",
    "A: down",
    "A down",
    "B) up",
    "don't go up",
    "do not go up",
    "upwards",
    "<think>up",
    '{"action": "fly"}',
    '{"action": 0}',
    '{"move": "up"}',
    '{"action": "up"',
    "[1]",
]


@pytest.mark.parametrize("text", PLAIN, ids=repr)
def test_an_action_is_named(text):
    assert parse_action(text, NAMES) == PLAIN[text]


@pytest.mark.parametrize("text", NOTHING, ids=repr)
def test_no_action_is_named(text):
    assert parse_action(text, NAMES) is None


def test_names_go_before_letters_and_spelling_before_case():
    assert parse_action("B", ("B", "A")) == 0 and parse_action("A", ("B", "A")) == 1
    assert parse_action("Up", ("up", "Up")) == 1 and parse_action("UP", ("up", "Up")) is None
    many = tuple(f"go {number}" for number in range(30))
    assert parse_action("a", many) == 26 and parse_action("A", many) == 0
    assert parse_action("go 1", many) == 1 and parse_action("I say go 12", many) == 12


def test_what_stands_in_for_an_action():
    assert stands_in(("up", "stay"), None) == SKIP and stands_in(("stay", "up"), "up") == 1
    with pytest.raises(PolicyError, match="--illegal_action is 'fly': expected one of up, down, or leave it out"):
        stands_in(("up", "down"), "fly")
