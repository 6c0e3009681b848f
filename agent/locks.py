"""Who writes into a folder: one process at a time, held to it by a lock of the kernel (flock).

A lock is a file `.lock` in the folder of a run, and `.NAME.lock` beside an output that is not there yet. It is held as
long as the process lives, and free the moment that it dies, however it dies; what is written in it (process, machine,
time) is for the sentence that a second process ends with. A file system without locks is said in a warning.
"""

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from manako.agent.errors import TrainingError
from manako.plain import printable

LOCK = ".lock"
TAKEN = (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN)
UNKNOWN = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)  # of file systems without locks
LONGEST = 200  # characters of what another process says of itself


class InUseError(TrainingError):
    """Another process writes there."""


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Makes a folder and holds it for a block; at its end a folder in which nothing was written is removed again.

    Raises:
        InUseError: another process holds it, or has written into it.
        OSError: it cannot be made.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        with _making(folder, folder / LOCK):
            if any(each.name != LOCK for each in folder.iterdir()):  # between the look of the caller and the lock
                raise InUseError(f"{folder} has just been written by another process: give another folder.")
            yield
    finally:
        _remove_empty(made)


@contextlib.contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Holds a folder that is there for a block.

    Raises:
        InUseError: another process holds it.
        OSError: nothing can be written there.
    """
    with _held(folder / LOCK, folder):
        yield


@contextlib.contextmanager
def held_beside(*outputs: Path | str | None) -> Iterator[None]:
    """Holds the names of files or folders that are to be written for a block; None is no output.

    Raises:
        InUseError: another process holds one of them, or has written it since the caller looked.
        OSError: nothing can be written there.
    """
    with contextlib.ExitStack() as stack:
        for output in [Path(name) for name in outputs if name]:
            folder = output.absolute().parent
            made = [place for place in (folder, *folder.parents) if not place.exists()]
            stack.callback(_remove_empty, made)
            stack.enter_context(_making(folder, folder / f".{output.name}{LOCK}", output))
            if os.path.lexists(output):
                raise InUseError(f"{output} has just been written by another process: give another name.")
        yield


def refuse_held(folder: Path) -> None:
    """Raises where a process holds the folder of a run.

    Raises:
        InUseError: the one that holds it.
    """
    if (folder / LOCK).is_file():
        with held_folder(folder):
            pass


@contextlib.contextmanager
def _making(folder: Path, file: Path, what: Path | None = None) -> Iterator[None]:
    """Holds a lock in a folder that is made for it; another process may remove its own empty one meanwhile."""
    for _ in range(100):
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(_held(file, what or folder))
            except FileNotFoundError:
                continue
            yield
            return
    raise InUseError(f"{what or folder}: other processes make and remove its folder; give another place.")


@contextlib.contextmanager
def _held(file: Path, what: Path) -> Iterator[None]:
    descriptor = _acquire(file, what)
    try:
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):  # removed by someone else
                file.unlink()
            os.close(descriptor)  # frees the lock


def _acquire(file: Path, what: Path) -> int | None:
    """Returns the open file of a lock that is now held; None where the file system has none."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            said = os.read(descriptor, LONGEST).decode(errors="replace")
            os.close(descriptor)
            if error.errno in TAKEN:
                by = printable(" ".join(said.split())) or "another process"
                raise InUseError(
                    f"{what} is in use, {by} writes there: wait until it has ended, or give another place."
                ) from error
            if error.errno not in UNKNOWN:
                raise
            with contextlib.suppress(OSError):
                file.unlink()
            print(
                f"warning: the file system of {what} has no locks ({error.strerror}), so nothing keeps a second "
                "process out: start none there",
                file=sys.stderr,
            )
            return None
        if _is_at(descriptor, file):
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            with contextlib.suppress(OSError):  # a full disk: the lock is held all the same
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode())
            return descriptor
        os.close(descriptor)  # the one before has removed it since


def _is_at(descriptor: int, file: Path) -> bool:
    """Says whether an open file is still the one of that name."""
    try:
        there = os.stat(file, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def _remove_empty(places: list[Path]) -> None:
    for place in places:
        try:
            place.rmdir()
        except OSError:
            return
