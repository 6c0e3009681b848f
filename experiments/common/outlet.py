r"""What a runner's words are written to: streams that neither end it nor obey what they are given.

    a pipe whose reader has gone (`| head -1`), a full disk    the rest of the words is lost, the run goes on
    a closed descriptor (`>&-`)                                taken by /dev/null, else the next file opened would be it
    a locale that lacks a letter (LC_ALL=C)                    it is written as `\u76ee`
    control characters in a name or text from elsewhere        written out; a terminal obeys none but the console's own

A runner whose locale is not of UTF-8 starts itself again in Python's UTF-8 mode: names of files, the words of the
command line and what libraries write are UTF-8 then, and the standard streams stay as they were.
"""

import contextlib
import errno
import io
import locale
import os
import sys
from pathlib import Path
from typing import Any, TextIO

from manako.plain import printable

DESCRIPTORS = {"stdout": 1, "stderr": 2}


class Outlet(io.TextIOWrapper):
    """A standard stream."""

    def write(self, text: str) -> int:
        """Writes a text, its control characters as text."""
        super().write(printable(text))
        return len(text)


class Terminal:
    """An outlet to which a console writes control characters of its own.

    Args:
        outlet: below it.
    """

    def __init__(self, outlet: Outlet) -> None:
        self._outlet = outlet

    def write(self, text: str) -> int:
        """Writes a text as it is."""
        return io.TextIOWrapper.write(self._outlet, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._outlet, name)


class _Descriptor(io.FileIO):
    """A descriptor that takes everything: once it refuses, the rest goes nowhere."""

    def write(self, data: Any) -> Any:
        try:
            return super().write(data)
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if error.errno != errno.EPIPE and self.fileno() == DESCRIPTORS["stdout"]:
                with contextlib.suppress(OSError):
                    os.write(2, f"warning: what is printed is lost from here on ({error.strerror})\n".encode())
            return len(data)


def be_utf8() -> None:
    """Starts this program again in UTF-8 mode, where it is a runner and its locale is another."""
    encodings = {sys.getfilesystemencoding(), locale.getpreferredencoding(False)}
    if sys.flags.utf8_mode or {name.lower().replace("-", "") for name in encodings} == {"utf8"}:
        return
    program = getattr(sys.modules["__main__"], "__file__", None)
    if program is None or Path(__file__).resolve().parents[1] not in Path(program).resolve().parents:
        return
    stream = sys.stdout or sys.stderr
    if stream is not None:
        os.environ.setdefault("PYTHONIOENCODING", stream.encoding)
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def open_outlets() -> None:
    """Puts outlets in place of the standard streams; those that somebody else has put there stay."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free
    for name, descriptor in DESCRIPTORS.items():
        before: TextIO | None = getattr(sys, name)
        if before is not getattr(sys, f"__{name}__") or isinstance(before, Outlet):
            continue
        encoding = "utf-8"
        if before is not None:
            encoding = before.encoding
            with contextlib.suppress(OSError):
                before.flush()
        stream = io.BufferedWriter(_Descriptor(descriptor, "wb", closefd=False))
        at_once = name == "stderr" or os.isatty(descriptor)
        setattr(sys, name, Outlet(stream, encoding=encoding, errors="backslashreplace", line_buffering=at_once))


def console_file() -> Any:
    """Returns what a console on standard output writes to; None where it finds that itself."""
    return Terminal(sys.stdout) if isinstance(sys.stdout, Outlet) else None
