r"""An environment's text is data: what of it reaches a tokenizer.

All of it, white space and rare characters as well; only special tokens are broken up, each by a backslash behind its
first character: `<image>` is read as `<\image>`, and so that this stays reversible, `<\image>` as `<\\image>`.
"""

import re

from manako.plain import holds_control_characters, written_out

ESCAPES = "\\^~|`"  # the first that stands in no special token


def as_plain_text(text: str, special_tokens: list[str]) -> str:
    r"""Returns text of an env as plain data: no special token in it, and no two texts alike.

    Where a token stands is looked for in the text without its backslashes, which escaping does not change: so one
    backslash can be taken out again at each of the same places. Tokens of one character, and of white space, cannot be
    broken up and stay. Control characters, which environments do not hand on, are written out.
    """
    if holds_control_characters(text):
        text = written_out(text)
    tokens = sorted({token for token in special_tokens if len(token.strip()) > 1})
    if not tokens:
        return text
    escape = next(char for char in ESCAPES if not any(char in token for token in tokens) or char == ESCAPES[-1])
    bare = text.replace(escape, "")
    found = {match.start() for match in re.finditer(f"(?={'|'.join(map(re.escape, tokens))})", bare)}
    if not found:
        return text
    parts, place = [], 0
    for char in text:
        parts.append(char)
        if char != escape:
            if place in found:
                parts.append(escape)
            place += 1
    return "".join(parts)
