r"""Control characters as text: written as Python writes them (`\x1b`), so that nothing is lost and no terminal obeys.

Environments hand on no other text, and policies read no other. No two texts are written alike: of backslashes that
stand before a control character each is doubled, and so they are before what only looks like one written out.
"""

import re

_CONTROL = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff"  # lone surrogates too; newline, tab and \r are text
_HELD = re.compile(f"[{_CONTROL}]")
_WRITTEN = re.compile(rf"(\\*)([{_CONTROL}])|(\\+)(?=x[01][0-9a-f]|x7f|x[89][0-9a-f]|ud[89a-f][0-9a-f]{{2}})")


def holds_control_characters(text: str) -> bool:
    r"""Returns whether a text holds a control character other than newline, tab and `\r`, or a lone surrogate."""
    return not text.isprintable() and _HELD.search(text) is not None


def written_out(text: str) -> str:
    r"""Returns the text with its control characters written out: an escape as the four characters `\x1b`."""
    if "\\" not in text and not holds_control_characters(text):
        return text
    return _WRITTEN.sub(_write, text)


def printable(text: str) -> str:
    """Returns the text as it is printed: control characters written out, and nothing else touched."""
    return text if text.isprintable() else _HELD.sub(lambda found: _code(found[0]), text)


def _write(found: re.Match[str]) -> str:
    before, char, like = found.groups()
    if char is None:
        return like * 2
    return before * 2 + _code(char)


def _code(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
