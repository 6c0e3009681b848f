"""Words of a command line in which a test puts other values behind those that it shares with its neighbours."""

from collections.abc import Sequence


def last_of_each(words: Sequence[str]) -> list[str]:
    """Returns the words with each flag once, as it came last, since a runner refuses one that comes twice."""
    flags: dict[str, list[str]] = {"": []}
    at = ""
    for word in words:
        if word.startswith("--"):
            at = word
            flags.pop(at, None)
            flags[at] = []
        else:
            flags[at].append(word)
    return [word for flag, values in flags.items() for word in ([flag] if flag else []) + values]
