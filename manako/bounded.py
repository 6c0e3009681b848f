"""Text of others, read within bounds: JSON, YAML and values of it in sentences, whatever somebody put there.

A file may be endless, nested thousands deep, hold numbers of thousands of digits, name a key twice, or mean gigabytes
by a few anchors. Each is a `BadText` here, in a few words, before anything takes long or much memory. Light to import.
"""

import json
import math
import reprlib
from pathlib import Path
from typing import Any

MANY_DIGITS = 40  # of a whole number: tokenizers say 10^30 where they mean no limit
DEEPEST = 100  # lists and objects inside each other
YAML_BYTES = 2**18  # the reader takes seconds for more
YAML_VALUES = 100_000  # of a file whose anchors are written out
JSON_BYTES = 2**26
LONGEST_SENTENCE = 1_000


class BadText(ValueError):
    """A text that cannot be read; the message is what is wrong with it, to stand in a sentence."""


# ---- in sentences ----------------------------------------------------------------------------------------------------


class _Shown(reprlib.Repr):
    """`repr`, cut short; it never writes out more than it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 120
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 6
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        """Returns a whole number, or how long it is."""
        digits = math.ceil(abs(x).bit_length() * math.log10(2))
        return repr(x) if digits <= MANY_DIGITS else f"a whole number of some {digits:,} digits"


_shown = _Shown()


def shown(value: Any) -> str:
    """Returns a value for a sentence, as `repr` writes it and cut in the middle where it is long."""
    return _shown.repr(value)


def cut(text: str, longest: int = LONGEST_SENTENCE) -> str:
    """Returns a text without its middle where it is longer than that."""
    half = (longest - 5) // 2
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


# ---- files -----------------------------------------------------------------------------------------------------------


def read_text(file: Path, most: int = JSON_BYTES) -> str:
    """Returns the text of a file.

    Raises:
        BadText: it is longer than `most` bytes, or not in UTF-8.
        OSError: it cannot be read.
    """
    with file.open("rb") as opened:
        content = opened.read(most + 1)
    if len(content) > most:
        raise BadText(f"it is longer than {most:,} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadText("it is no text file") from error


def from_json(text: str) -> Any:
    """Returns what a JSON text holds.

    Raises:
        BadText: it is no JSON, names a key twice with two values, is nested too deep, or holds a number too long.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_int=_whole_number)
        _check_depth(value)
    except json.JSONDecodeError as error:
        raise BadText(str(error)) from error
    except RecursionError as error:
        raise BadText(_too_deep()) from error
    return value


def json_object(text: str) -> dict[str, Any]:
    """Returns the object in a JSON text.

    Raises:
        BadText: as `from_json`, or it is no object.
    """
    value = from_json(text)
    if not isinstance(value, dict):
        raise BadText(f"it is no JSON object but {shown(value)}")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise BadText(f"{shown(key)} stands there twice, with two values")
    return found


def _whole_number(text: str) -> int:
    if len(text) > MANY_DIGITS + 1:
        raise BadText(f"a number has {len(text):,} digits")
    return int(text)


def _too_deep() -> str:
    return f"it is nested more than {DEEPEST} deep"


def _check_depth(value: Any) -> None:
    """Raises where lists and objects stand too deep; a level at a time, so that the check itself needs no depth."""
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            part
            for whole in level
            if isinstance(whole, dict | list)
            for part in (whole.values() if isinstance(whole, dict) else whole)
            if isinstance(part, dict | list)
        ]
        if not level:
            return
    raise BadText(_too_deep())


# ---- YAML ------------------------------------------------------------------------------------------------------------


def from_yaml(text: str) -> Any:
    """Returns what a YAML text holds, plain values alone.

    Raises:
        BadText: it is no YAML, or longer, deeper or with more values than a configuration has, or a key stands twice.
    """
    import yaml

    if len(text) > YAML_BYTES:
        raise BadText(f"it is longer than {YAML_BYTES:,} characters")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, 0)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise BadText(f"line {mark.line + 1}, column {mark.column + 1}" if mark else "") from error
    except RecursionError as error:
        raise BadText(_too_deep()) from error
    except BadText:
        raise
    except Exception as error:  # of a constructor: a date that is none, `!!int` of a word, a number of 5,000 digits
        raise BadText("a value is not what its form or tag says") from error
    finally:
        loader.dispose()


def _count(node: Any, known: dict[int, int], depth: int) -> int:
    """Counts the values below a node, anchors written out; keys have to be different."""
    import yaml

    if id(node) in known:
        if not known[id(node)]:
            raise BadText(f"line {node.start_mark.line + 1} refers to itself")
        return known[id(node)]
    if depth > DEEPEST:
        raise BadText(_too_deep())
    known[id(node)] = 0  # until it is counted
    total = 1
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in keys and key.value != "<<":
                raise BadText(f"{shown(key.value)} in line {key.start_mark.line + 1} stands there twice")
            keys |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
        children = [part for pair in node.value for part in pair]
    else:
        children = node.value if isinstance(node, yaml.SequenceNode) else []
    for child in children:
        total += _count(child, known, depth + 1)
    if total > YAML_VALUES:
        raise BadText(f"its anchors stand for more than {YAML_VALUES:,} values")
    known[id(node)] = total
    return total
