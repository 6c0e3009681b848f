"""Text of others, read within bounds."""

import pytest

from manako.bounded import BadText, cut, from_json, from_yaml, json_object, read_text, shown


def fault(read, text):
    with pytest.raises(BadText) as caught:
        read(text)
    return str(caught.value)


def test_what_is_well_is_read_as_it_is():
    assert from_json('{"a": [1, -2.5, null, true, "x"], "b": {"a": 1, "a": 1}}') == {
        "a": [1, -2.5, None, True, "x"],
        "b": {"a": 1},
    }
    assert from_json("1" + "0" * 30) == 10**30  # as tokenizers say that there is no limit
    assert from_yaml("a: &x {b: 1}\nc: {<<: *x, d: [*x, *x]}") == {"a": {"b": 1}, "c": {"b": 1, "d": [{"b": 1}] * 2}}
    assert from_yaml("") is None and from_yaml("3") == 3
    assert from_json("[" * 100 + "]" * 100)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 102 + "]" * 102, "it is nested more than 100 deep"),
        ("[" * 100_000, "it is nested more than 100 deep"),
        ("9" * 42, "a number has 42 digits"),
        ('{"a": 1, "a": 2}', "'a' stands there twice, with two values"),
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
    ],
)
def test_bad_json(text, said):
    assert fault(from_json, text) == said


def test_an_object_is_expected():
    assert fault(json_object, "[1]") == "it is no JSON object but [1]"


@pytest.mark.parametrize("text", ["!!int x", "2001-02-31", "!!timestamp x", "!!float x", "9" * 5_000, "!!binary é"])
def test_values_that_are_not_what_they_say(text):
    fault(from_yaml, f"a: {text}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: \x04", "it holds a character that YAML does not allow"),
        ("a: \ud800", "it holds a character that YAML does not allow"),
        ("a: [1", "line 1, column 6"),
        ("a: 1\n---\nb: 2", "line 2, column 1"),
        ("a: *b", "line 1, column 4"),
        ("a: &a [*a]", "line 1 refers to itself"),
        ("a: 1\na: 1", "'a' in line 2 stands there twice"),
    ],
)
def test_bad_yaml(text, said):
    assert fault(from_yaml, text) == said


def test_files(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff")
    (tmp_path / "b").write_text("xyz")
    assert fault(read_text, tmp_path / "a") == "it is no text file"
    assert read_text(tmp_path / "b", 3) == "xyz"
    with pytest.raises(BadText, match="it is longer than 2 bytes"):
        read_text(tmp_path / "b", 2)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        pytest.param(10**5_000 - 1, "a whole number of some 5,000 digits", id="long"),
        (12, "12"),
        ("a'b", '"a\'b"'),
        ([1] * 9, "[1, 1, 1, 1, 1, 1, ...]"),
    ],
)
def test_values_in_sentences(value, text):
    assert shown(value) == text


def test_long_ones_lose_their_middle():
    assert len(shown("x" * 10**6)) == 120 and len(shown({"a": ["y" * 10**6] * 99})) < 1_000
    assert cut("x" * 5_000, 15) == "xxxxx ... xxxxx" and cut("short") == "short"
