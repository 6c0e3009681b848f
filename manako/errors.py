"""The base class of all errors that a user can repair, and how a sentence of ours quotes somebody else's error."""


class ManakoError(ValueError):
    """Bad input or a broken part of the user's own, in one sentence: what came, what was expected, what to do."""

    exit_code = 2  # of a runner that it ends: bad input; 1 is a fault of a run that had begun


def first_line(error: BaseException, longest: int | None = 160) -> str:
    """Returns the first line of an error's text, or its type where it has none, without a full stop at the end."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")[:longest]


def full_text(error: BaseException) -> str:
    """Returns an error's whole text in one line, or its type where it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def type_and_text(error: BaseException) -> str:
    """Returns the type and the whole text of somebody else's error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
