"""From an answer in text to the action that it names: plainly, or not at all.

up        UP.       "up"      **Up**          the name, whatever its case and what stands around it
B         b)        B: up     (B) up          its letter in the list of actions, alone or with its own name
{"action": "up"}                              JSON, also inside a fence
I would go up.      Answer: B                 the only name in a sentence, a letter behind its heading
up or left          A: left   don't go up     no action: two names, a letter with another's name, a negation
"""

import json
import re
from collections.abc import Sequence

from manako.policies.answers.choice import LABELS

_THOUGHT = re.compile(r"\A\s*<think>.*?</think>", re.S)
_FENCE = re.compile(r"\A\s*```\w*\n(.*?)\n?```\s*\Z", re.S)
_LEAD = re.compile(
    r"\A(?:the\s+)?(?:best\s+|final\s+|next\s+)?(?:answer|action|choice|move)\b\s*(?:is\b)?\s*[:=]?\s*", re.I
)
_LETTER = re.compile(r"\(?([A-Za-z])(\s*[).:=-]+\s*|\s+|\Z)(.*)", re.S)
_NEGATION = re.compile(r"\b(not|never|avoid|cannot|instead of|rather than)\b|n['’]t\b", re.I)
_AROUND = " \t\r\n\"'`*_.,:;!?()[]{}<>“”‘’«»"


def parse_action(text: str, names: Sequence[str]) -> int | None:
    """Returns the action that an answer names; None where it names none or several.

    Args:
        text: the answer.
        names: the A actions; the first 52 have the letters A to Z, a to z.
    """
    text = _THOUGHT.sub("", text).strip()
    if text.startswith("<think>"):  # it was never closed: no answer behind it
        return None
    fenced = _FENCE.match(text)
    text = (fenced[1] if fenced else text).strip()
    if text.startswith("{"):
        return _parse_json(text, names)
    return _parse_plain(text, names)


def _parse_json(text: str, names: Sequence[str]) -> int | None:
    try:
        value = json.loads(text).get("action")
    except (ValueError, RecursionError):
        return None
    return _parse_plain(value, names) if isinstance(value, str) else None


def _parse_plain(text: str, names: Sequence[str]) -> int | None:
    whole = _named(text, names)
    if whole is not None:
        return whole
    said = _LEAD.sub("", text.strip(_AROUND.replace("(", ""))).strip(_AROUND.replace("(", ""))
    letter = _LETTER.fullmatch(said)
    index = _of_letter(letter[1], names) if letter else None
    if letter and index is not None:
        if not letter[2].isspace():  # a letter with a mark behind it, or alone
            return index if _names_in(letter[3], names) <= {index} else None
        named = _named(letter[3], names)
        if named is not None:
            return index if named == index else None
    found = set() if _NEGATION.search(text) else _names_in(text, names)
    return found.pop() if len(found) == 1 else None


def _named(text: str, names: Sequence[str]) -> int | None:
    """The action whose name this is: as it is spelled, else but for its case, if one alone is."""
    bare = text.strip(_AROUND)
    for candidate in (text, bare):
        if candidate in names:
            return list(names).index(candidate)
    folded = [name.strip(_AROUND).casefold() for name in names]
    return folded.index(bare.casefold()) if bare and folded.count(bare.casefold()) == 1 else None


def _of_letter(letter: str, names: Sequence[str]) -> int | None:
    if len(names) <= 26:
        letter = letter.upper()
    index = LABELS.index(letter)
    return index if index < len(names) else None


def _names_in(text: str, names: Sequence[str]) -> set[int]:
    """The actions whose names stand in a text as whole words; a name inside a longer one does not count."""
    folded = [name.casefold() for name in names]
    found: set[int] = set()
    for name in sorted(set(folded), key=len, reverse=True):
        pattern = rf"(?<!\w){re.escape(name)}(?!\w)"
        if re.search(pattern, text, re.I):
            found |= {index for index, other in enumerate(folded) if other == name}
            text = re.sub(pattern, "\0", text, flags=re.I)
    return found
