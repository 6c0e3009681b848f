"""How a run ends that ends badly: what is kept, what is said, with which exit code.

One sentence on stderr says what happened, and before it two lines on stdout what is kept and how to go on. Errors that
nobody foresaw go, with their traceback, into error.txt of the run folder. Ctrl-C and SIGTERM are no errors.
"""

import contextlib
import shlex
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from manako.agent.errors import NotFiniteError
from manako.errors import ManakoError, full_text, type_and_text
from manako.experiments.common import stopping
from manako.experiments.common.command_line import UsageError

ERROR_FILE = "error.txt"
STAGING = ".staging"


class RunEndedError(ManakoError):
    """A run that had begun was ended by a fault; what it learned is kept."""

    exit_code = 1


def ended_by(error: Exception, folder: Path) -> ManakoError:
    """Returns the sentence for what ended a run; the traceback of what nobody foresaw goes into its folder.

    What its user can put right before it goes on, such as a full disk at its start, stays bad input.
    """
    if isinstance(error, UsageError):
        return error
    if isinstance(error, ManakoError):
        return RunEndedError(full_text(error))
    file = folder / ERROR_FILE
    with contextlib.suppress(OSError):
        file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    return RunEndedError(f"{type_and_text(error)}; the traceback is in {file}.")


class Ending:
    """Watches a run, and says how it ended.

    Args:
        run_dir: the run folder.
        lower_rate: a learning rate to try where numbers broke; None where the runner has none.

    Attributes:
        begun: whether the run folder is there, so that there is something to go on with.
        described: whether this start has written down what it is.
        kept: says what is kept, once the training has begun.
        stopped: whether a signal ended it.
    """

    def __init__(self, run_dir: Path, lower_rate: float | None = None) -> None:
        self.run_dir, self.lower_rate = run_dir, lower_rate
        self.begun = self.described = self.stopped = False
        self.kept: Callable[[], str] = lambda: "Stopped before the first iteration: nothing was learned yet."

    def __enter__(self) -> "Ending":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        with contextlib.suppress(OSError):
            shutil.rmtree(self.run_dir / STAGING)
        if error is None:
            return False
        if isinstance(error, KeyboardInterrupt):
            self.stopped = True
            print(self._how_to_go_on(error) if self.begun else "Stopped before the run began: start it again.")
            return True
        if not self.begun or not isinstance(error, Exception):
            return False
        print(self._how_to_go_on(error), flush=True)
        if (ended := ended_by(error, self.run_dir)) is error:
            return False
        raise ended from error

    def _how_to_go_on(self, error: BaseException) -> str:
        words = ["python", sys.argv[0], "--resume", str(self.run_dir)]
        if isinstance(error, NotFiniteError) and self.lower_rate is not None:
            words += ["--learning_rate", f"{self.lower_rate:g}"]
        return f"{self.kept()} Go on with:\n  {shlex.join(words)}"


def watched(
    run_dir: Path,
    goes_on: bool,
    learning_rate: float | None,
    work: Callable[[Ending], None],
    kept: Callable[[], str] | None = None,
) -> int:
    """Runs a training, and ends it well whatever ends it.

    Args:
        run_dir: the run folder.
        goes_on: whether it was there before.
        learning_rate: of which a tenth is to be tried where numbers broke.
        work: the training.
        kept: see `Ending`.

    Returns:
        The exit code.
    """
    with Ending(run_dir, lower_rate=None if learning_rate is None else learning_rate / 10) as ending:
        stopping.tidy_up_from_here()
        ending.begun = goes_on
        ending.kept = kept or ending.kept
        work(ending)
    return stopping.STOPPED if ending.stopped else 0


@contextlib.contextmanager
def only_warned(what: str) -> Iterator[None]:
    """Lets the rest of a run go on where a part fails that nothing depends on.

    Args:
        what: the part, for the warning.
    """
    try:
        yield
    except Exception as error:
        text = full_text(error) if isinstance(error, ManakoError) else type_and_text(error)
        print(f"warning: {what} failed and is left out: {text}", file=sys.stderr, flush=True)
