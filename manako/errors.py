"""The base class of all errors that a user can repair, and how a sentence of ours quotes somebody else's error."""

import errno

OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # it takes nothing more
_REFUSED = (  # what torch, safetensors and tokenizers say where a file could not be written
    "PytorchStreamWriter",
    "file write failed",
    "unexpected pos",
    "iostream error",
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "Read-only file system",
    "Input/output error",
)


class ManakoError(ValueError):
    """Bad input or a broken part of the user's own, in one sentence: what came, what was expected, what to do."""

    exit_code = 2  # of a runner: 2 for bad input, 1 for a fault


def first_line(error: BaseException, longest: int | None = 160) -> str:
    """Returns the first line of an error's text, or its type where it has none, without a full stop at the end."""
    return (_text(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")[:longest]


def full_text(error: BaseException) -> str:
    """Returns an error's whole text in one line, or its type where it has none."""
    return " ".join(_text(error).split()) or type(error).__name__


def type_and_text(error: BaseException) -> str:
    """Returns the type and the whole text of somebody else's error in one line."""
    return f"{type(error).__name__}: {' '.join(_text(error).split())}".removesuffix(": ")


def is_of_the_disk(error: BaseException) -> bool:
    """Says whether an error of Python or a library is a disk that refused to take something."""
    if isinstance(error, OSError):
        return error.errno in OF_THE_DISK
    return not isinstance(error, ManakoError) and any(words in _text(error) for words in _REFUSED)


def _text(error: BaseException) -> str:
    """What an error says; nothing where that raises as well."""
    try:
        return str(error)
    except Exception:
        return ""
