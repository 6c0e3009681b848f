"""Templates of answers in text: what they write is what they read, and nothing else is."""

import pytest

from manako.policies import PolicyError
from manako.policies.answers.template import TEMPLATES, Parsed, Template, action_named

JSON = '{"thoughts": "%s", "action": "%s"}'


@pytest.mark.parametrize("form", [*TEMPLATES, "Thought: {thought}\nAction: {action}", "[{action}]"])
@pytest.mark.parametrize("thought", ["", "the goal is left, so I go left", 'a "word" {1}\nand a line'])
def test_what_is_written_is_read(form, thought):
    template = Template(form)
    answer = template.write("go left", thought)
    assert template.parse(answer) == Parsed(thought if template.has_thought else "", "go left")
    assert template.parse(f" {answer}\n") == template.parse(answer)
    place = template.action_part(answer)
    assert answer[place:].startswith("go left")


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "up",
        JSON % ("x", "up") + "}",
        (JSON % ("x", "up"))[1:],
        (JSON % ("x", "up"))[:-1],
        '{"action": "up"}',
        '{"thoughts": "x"}',
        'I think: {"thoughts": "x", "action": "up"}',
        '{"thoughts": "x" , "action": "up"}',
    ],
)
def test_what_has_another_form_is_not_read(answer):
    assert Template("json").parse(answer) is None


def test_the_first_cue_ends_a_thought():
    answer = JSON % ("a", "up") + JSON % ("b", "down")
    assert Template("json").parse(answer) == Parsed("a", 'up"}{"thoughts": "b", "action": "down')
    with pytest.raises(PolicyError, match="which ends a thought"):
        Template("json").write("up", 'x", "action": "down')
    with pytest.raises(PolicyError, match="which ends a thought"):
        Template("{thought}aa{action}").write("up", "xa")  # with the cue's first letter it would end too early


@pytest.mark.parametrize("form", ["", "up", "{thought}", "{action}{action}", "{action} {thought}", "{thought}{action}"])
def test_what_is_no_template(form):
    with pytest.raises(PolicyError, match=r"expected one of json, tags, plain, or a text with \{action\} once"):
        Template(form)


def test_how_a_prompt_shows_it():
    assert Template("tags").form == "<think>...</think><action>...</action>"


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("up", 1),
        (" up\n", 1),
        ("UP", 1),
        ("Go", 0),
        ("go", 2),
        ("GO", None),
        ("", None),
        ("upp", None),
        ("go up", None),
    ],
)
def test_names_of_actions(text, action):
    assert action_named(text, ("Go", "up", "go")) == action
