"""Checkpoint folders that are either whole or not there.

A folder is filled beside its final place under a name that starts with `.tmp-`, every file is synced to disk, a
`manifest.json` with the size and the SHA-256 sum of each file is added, and only then is the folder renamed, which
a file system does in one piece. A crash at any moment leaves the previous checkpoints as they were and at most one
`.tmp-` folder, which the next write removes. What is inside a checkpoint is its writer's business.

Writers hold their `.tmp-` folder by a lock of the kernel, so that nobody removes one that is still being filled.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from manako import manifest
from manako.agent.errors import DiskError, TrainingError
from manako.errors import is_of_the_disk

MANIFEST = manifest.MANIFEST
TEMPORARY = ".tmp-"
BEST = "best"  # of a run, beside its final/: the policy of `manako.agent.report.validation`
NEXT, BEFORE = ".next-", ".before-"  # of a folder that is being replaced
OF_A_RUN = (  # what a checkpoint that a run goes on from has to hold, beside the policy's own files
    "policy.json",
    "value_head.safetensors",
    "model.safetensors|model.safetensors.index.json|adapter_model.safetensors",
    "rollout_state.json",
    "trainer_state.json",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
)
OF_A_TUNING = tuple(name for name in OF_A_RUN if name != "rollout_state.json")  # of SFT, DPO and what is like them

_OLDER = "use an older checkpoint"


def write_folder(final_path: Path | str, writer: Callable[[Path], None]) -> None:
    """Lets `writer` fill a folder, and puts it at `final_path` once all of it is on disk.

    Args:
        final_path: must not exist; its parents are made.
        writer: is given an empty temporary folder beside `final_path`. If it raises, the folder is removed.

    Raises:
        TrainingError: `final_path` exists already, or the disk refused (full, read-only).
    """
    final_path = Path(final_path)
    temporary = final_path.with_name(TEMPORARY + final_path.name)
    _refuse_existing(final_path)
    try:
        final_path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(final_path.parent)
        with _filling(temporary, final_path):
            try:
                writer(temporary)
                _seal(temporary, final_path)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
    except Exception as error:  # torch, safetensors and tokenizers have errors of their own for a full disk
        if isinstance(error, OSError) or is_of_the_disk(error):
            raise disk_refused(final_path, error) from error
        raise


def replace_folder(path: Path | str, writer: Callable[[Path], None]) -> None:
    """Lets `writer` fill a folder, and puts it in the place of the one that is there once all of it is on disk.

    At any moment the older one or the new one is there, whole; where a crash has left it under another name,
    `recover_folder` gives it its own again.

    Args:
        path: of the folder; it need not be there yet.
        writer: as of `write_folder`.

    Raises:
        TrainingError: the disk refused; the older one is untouched.
    """
    path = Path(path)
    recover_folder(path)
    write_folder(path.with_name(NEXT + path.name), writer)
    recover_folder(path)


def recover_folder(path: Path | str) -> None:
    """Ends what `replace_folder` was doing when the process died, if it was; of two whole folders the newer one stays.

    Raises:
        TrainingError: the disk refused.
    """
    path = Path(path)
    following, before = path.with_name(NEXT + path.name), path.with_name(BEFORE + path.name)
    try:
        if following.exists():  # whole, since `write_folder` put it there
            if path.exists():
                shutil.rmtree(before, ignore_errors=True)
                os.replace(path, before)
            os.replace(following, path)
            _sync(path.parent)
        shutil.rmtree(before, ignore_errors=True)
    except OSError as error:
        raise disk_refused(path, error) from error


def finalize_folder(folder: Path | str, final_path: Path | str) -> None:
    """Puts a folder that something else has filled at `final_path`, as `write_folder` does.

    Args:
        folder: on the file system of `final_path`; it is moved, not copied.
        final_path: must not exist; its parents are made.

    Raises:
        TrainingError: `folder` is no folder, `final_path` exists already, or the disk refused.
    """
    folder, final_path = Path(folder), Path(final_path)
    if not folder.is_dir():
        raise TrainingError(f"{folder} is not a folder: expected one that holds the files of {final_path.name}.")
    _refuse_existing(final_path)
    try:
        final_path.parent.mkdir(parents=True, exist_ok=True)
        _seal(folder, final_path)
        _remove_leftovers(final_path.parent)
    except OSError as error:
        raise disk_refused(final_path, error) from error


def verify_folder(path: Path | str, needed: Iterable[str] = ()) -> None:
    """Reads every file of a checkpoint and compares it with the manifest.

    Args:
        path: a folder that `write_folder` or `finalize_folder` made.
        needed: files that have to be there, as `manifest.fault` takes them.

    Raises:
        TrainingError: names the first file that is missing, cut short, longer, changed, or not in the manifest.
    """
    path = Path(path)
    if not path.is_dir():
        raise TrainingError(f"Checkpoint {path} is not a folder: expected one with a {MANIFEST}; look at the path.")
    found = manifest.fault(path, needed)
    if found:
        raise TrainingError(f"Checkpoint {path} is damaged: {found}; {_OLDER}.")


def latest_checkpoint(run_dir: Path | str, needed: Iterable[str] = ()) -> Path | None:
    """Returns the whole checkpoint of the highest iteration in `run_dir`/checkpoints/checkpoint-<iteration>.

    Damaged ones are passed over with a warning that names the fault.

    Args:
        run_dir: a run folder.
        needed: files that each has to hold, such as `OF_A_RUN`.

    Returns:
        The folder, verified, or None where there is no whole one.
    """
    found = [
        (int(match[1]), path)
        for path in Path(run_dir).glob("checkpoints/checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir()
    ]
    for _, path in sorted(found, reverse=True):
        try:
            verify_folder(path, needed)
        except TrainingError as error:
            warnings.warn(f"Passed over: {error}", stacklevel=2)
        else:
            return path
    return None


def _refuse_existing(final_path: Path) -> None:
    if os.path.lexists(final_path):
        raise TrainingError(
            f"{final_path} exists already: a checkpoint is never overwritten, so remove it or choose another run."
        )


@contextlib.contextmanager
def filled(folder: Path, what: str) -> Iterator[None]:
    """Gives a folder that a block fills its manifest; one that the disk refused is removed again.

    Args:
        folder: a checkpoint before it has its place.
        what: it is, for the sentence.

    Raises:
        DiskError: the disk refused.
    """
    try:
        yield
        manifest.write_manifest(folder, trusted=True)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)
        if not is_of_the_disk(error):
            raise
        raise disk_refused(what, error) from error


def disk_refused(what: Path | str, error: BaseException) -> DiskError:
    """Returns the sentence for what a disk refused to take."""
    return DiskError(
        f"{what} could not be written ({' '.join(str(error).split())[:200]}): expected a writable disk with room "
        "for it; the checkpoints before it are untouched, so make room and resume from the last one."
    )


@contextlib.contextmanager
def _filling(temporary: Path, final_path: Path) -> Iterator[None]:
    """Makes the folder and holds it, so that no other writer takes it for a leftover."""
    try:
        temporary.mkdir()
    except FileExistsError:
        raise TrainingError(
            f"{final_path} is being written by another process: expected one writer, so wait, or choose another place."
        ) from None
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(parent: Path) -> None:
    """Removes what writers have left that died; what is still being written is theirs."""
    for leftover in parent.glob(TEMPORARY + "*"):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            descriptor = os.open(leftover, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    continue
            finally:
                os.close(descriptor)
            shutil.rmtree(leftover)


def _seal(folder: Path, final_path: Path) -> None:
    """Syncs the files, adds the manifest, renames; what a crash leaves is `folder` or `final_path`, whole."""
    try:
        files = manifest.write_manifest(folder, trusted=True)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    for path in [*files, *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _sync(path)
    _refuse_existing(final_path)  # made by someone else while the writer worked
    os.replace(folder, final_path)
    _sync(final_path.parent)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
