"""The faults of environments that a run survives: counted, written down, and the run's end where they are too many.

`errors.jsonl` of the run folder has a line for each: slot, episode seed, step, whether the episode was given up, a
sentence and the traceback, which is never printed.
"""

import json
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from manako.agent.errors import WorkersError
from manako.agent.interfaces import Fault
from manako.agent.rollout import Rollout
from manako.agent.workers.settings import WorkerSettings

ERRORS = "errors.jsonl"
JUDGED_STEPS = 1_000  # the rate is of the newest steps, so many or a little more
LEAST = 10  # faults, below which there is no rate


class FaultLog:
    """Counts the faults of consecutive rollouts.

    Args:
        max_rate: faults a step, above which the run ends.
        file: where each is written; None nowhere.

    Attributes:
        faults: so far, of this process.
        failed: episodes that were given up because of them.
    """

    def __init__(self, max_rate: float = WorkerSettings.max_fault_rate, file: Path | None = None) -> None:
        self.max_rate, self.file = max_rate, file
        self.faults = self.failed = 0
        self._recent: deque[tuple[int, int]] = deque()  # steps and faults of each rollout

    def take(self, rollout: Rollout, iteration: int) -> dict[str, float]:
        """Writes the faults of a rollout down and returns the metrics; none before the first fault.

        Raises:
            WorkersError: there are too many.
        """
        self.add(rollout.faults, rollout.rewards.numel(), iteration)
        return self.metrics()

    def metrics(self) -> dict[str, float]:
        """Returns the counts so far; none before the first fault."""
        return {"env_faults": self.faults, "episodes_failed": self.failed} if self.faults else {}

    def write(self, faults: Sequence[Fault], iteration: int) -> None:
        """Counts faults and writes them down, whatever their rate: of a rollout that broke off."""
        self.faults += len(faults)
        self.failed += sum(fault.given_up for fault in faults)
        if faults and self.file is not None:
            with self.file.open("a", encoding="utf-8") as opened:
                opened.writelines(json.dumps({"iteration": iteration, **fault._asdict()}) + "\n" for fault in faults)

    def add(self, faults: Sequence[Fault], steps: int, iteration: int) -> None:
        """Does the same for faults of so many steps."""
        self.write(faults, iteration)
        self._recent.append((steps, len(faults)))
        while sum(steps for steps, _ in self._recent) - self._recent[0][0] >= JUDGED_STEPS:
            self._recent.popleft()
        played, broke = (sum(column) for column in zip(*self._recent, strict=True))
        if broke >= LEAST and broke > self.max_rate * max(played, JUDGED_STEPS):
            raise WorkersError(
                f"Environments broke {broke} times in the last {played:,} steps, more often than --max_fault_rate "
                f"{self.max_rate:g} allows, the last time so: {_last_of(faults)}; "
                f"repair the environment, or allow more, and go on with --resume."
            )


def few_steps(rollout: Rollout, parts: int) -> WorkersError | None:
    """Returns what ends a run where environments broke in so many steps that the others fill no minibatches; else None.

    Args:
        rollout: what was played.
        parts: minibatches of an epoch.
    """
    if rollout.failed is None or (taken := int((~rollout.failed).sum())) >= parts:
        return None
    return WorkersError(
        f"Environments broke in {rollout.failed.numel() - taken} of the {rollout.failed.numel()} steps of a rollout, "
        f"which leaves too few for its {parts} minibatches, the last time so: {_last_of(rollout.faults)}; "
        "repair the environment, and go on with --resume."
    )


def _last_of(faults: Sequence[Fault]) -> str:
    return faults[-1].sentence if faults else f"see {ERRORS}"
