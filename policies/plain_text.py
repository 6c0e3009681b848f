"""An environment's text is data: what of it reaches a tokenizer."""

import re
import unicodedata

MAX_INSTRUCTION_CHARS = 2000


def as_plain_line(text: str, special_tokens: list[str], max_chars: int = MAX_INSTRUCTION_CHARS) -> str:
    """Returns text of an env as plain data: one line of `max_chars` characters at most, no special tokens in it.

    Removal is repeated until nothing changes, since removing one token, or a second space, can join the halves of
    another.
    """
    text = " ".join(text[: 10 * max_chars].split())
    text = "".join(char for char in text if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    tokens = sorted((token for token in special_tokens if token.strip()), key=len, reverse=True)
    pattern = re.compile("|".join([*map(re.escape, tokens), " (?= )"]))
    while pattern.search(text):
        text = pattern.sub("", text)
    return text.strip()[:max_chars].strip()
