"""The best policy of a run: evaluated while it trains, on episodes for that alone, and kept by a stated rule.

The last policy of a training need not be its best. Which one is the best is asked of validation episodes, whose seeds
are neither training's nor the final evaluation's: the best of many looks better than it is on the episodes that chose
it, so what is reported of it is measured on others.

    iteration -> checkpoint -> validation episodes -> better? best/ is replaced -> a row in metrics.jsonl

In this order nothing is lost and nothing played twice, whatever ends the process: a run that goes on from a checkpoint
whose evaluation is due and has no row plays it then, or what is left of it. The generators of the process come back as
they were, so that a run learns the same with evaluations and without.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import TrainerCallback

from manako import manifest
from manako.agent.checkpoint import BEST, recover_folder, replace_folder
from manako.agent.errors import NotFiniteError
from manako.agent.report.callbacks import VALIDATION, Checkpoints, finite, is_validation, read_metrics
from manako.agent.rng import chance_kept
from manako.bounded import json_object, read_text

BEST_FILE = "validation.json"  # in it: how it was chosen
RULE = (
    "the highest success on the validation episodes, or the highest mean return where not all of them were judged; of "
    "equal ones the higher mean return, then the earlier"
)


class Place(NamedTuple):
    """How the places of a training are called and counted, such as iteration 20, env_steps 10240.

    Args:
        number: what a checkpoint is numbered by.
        samples: what is counted between two evaluations.
        count: samples up to a number.
    """

    number: str
    samples: str
    count: Callable[[int], int]


class Looked(NamedTuple):
    """What an evaluation found."""

    place: dict[str, int]  # number and samples, by their names
    summary: dict[str, Any]  # of `Evaluation.summary`
    is_best: bool  # so far


def is_better(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Says by `RULE` whether a policy is better than one that was evaluated earlier.

    Args:
        one: of `Evaluation.summary`.
        other: of the earlier one, on the same episodes.
    """
    rates = one["success"], other["success"]
    if None not in rates and rates[0] != rates[1]:
        return bool(rates[0] > rates[1])
    return bool(one["return_mean"] > other["return_mean"])


def find_best(run_dir: Path) -> dict[str, Any] | None:
    """Returns how a run's best policy was chosen; None where there is none.

    One that a process was replacing when it died is put in its place. A damaged one is set aside as damaged-best/, and
    said: then the best of what comes is kept.

    Returns:
        `rule`, the number and samples by their names, and the `validation` that chose it.
    """
    folder = run_dir / BEST
    recover_folder(folder)
    if not folder.is_dir():
        return None
    fault = manifest.fault(folder, (BEST_FILE,))
    if fault is None:
        return json_object(read_text(folder / BEST_FILE))
    place = folder.with_name(f"damaged-{BEST}")
    shutil.rmtree(place, ignore_errors=True)
    folder.rename(place)
    print(f"warning: {folder} is damaged ({fault}) and now {place}: the best of what comes is kept", flush=True)
    return None


class BestPolicy(TrainerCallback):
    """Evaluates at fixed places of a training, each behind a checkpoint, and keeps the best policy in best/.

    The places are the first numbers (iterations, steps) at which another `every` samples are full, and the last one.

    Args:
        saver: writes the checkpoints; added to the trainer before this.
        play: plays the validation episodes, greedily, and returns `Evaluation.summary`; a signal may end it.
        run_dir: the run folder.
        every: samples between two evaluations.
        place: what the trainer counts.
        last: returns the training's last number.
        write: appends a row to metrics.jsonl.
        heard: hears of each evaluation.
        describe: writes something for people into the folder of a new best policy.
    """

    def __init__(
        self,
        saver: Checkpoints,
        play: Callable[[], dict[str, Any]],
        run_dir: Path,
        every: int,
        place: Place,
        last: Callable[[], int],
        write: Callable[[dict[str, Any]], None],
        heard: Callable[[Looked], None],
        describe: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        self.saver, self.play, self.run_dir, self.every = saver, play, run_dir, every
        self.place, self.last, self.write, self.heard, self.describe = place, last, write, heard, describe
        self.best: dict[str, Any] | None = None
        self._done: set[int] = set()
        saver.also = self.due

    def due(self, number: int) -> bool:
        """Says whether the policy is evaluated there."""
        full = self.place.count(number) // self.every > self.place.count(number - 1) // self.every if number else False
        return full or 0 < number == self.last()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finds what earlier starts have left, and plays what they have not."""
        self.best = find_best(self.run_dir)
        rows = read_metrics(self.run_dir, (self.place.number, self.place.samples))
        self._done = {row[self.place.number] for row in rows if is_validation(row)}
        self._look()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluates what was saved, where that is due."""
        self._look()

    def _look(self) -> None:
        number, policy = self.saver.number(), self.saver.trainer.policy
        if self.saver.interrupted or number in self._done or not self.due(number):
            return
        if not all(torch.isfinite(weight).all() for weight in policy.parameters() if weight.requires_grad):
            raise NotFiniteError(
                f"The weights are not finite in {self.place.number} {number}: expected numbers, which a smaller "
                "learning_rate keeps."
            )
        began = time.perf_counter()
        with chance_kept():
            summary = self.play()
        at = {self.place.number: number, self.place.samples: self.place.count(number)}
        found = {"rule": RULE, **at, "validation": summary}
        # a start that was killed before it wrote the row has perhaps replaced best/ already
        is_best = self.best is None or self.best == found or is_better(summary, self.best["validation"])
        if is_best and self.best != found:
            replace_folder(self.run_dir / BEST, lambda folder: self._fill(folder, found))
            self.best = found
        values = {f"{VALIDATION}{name}": finite(value) for name, value in summary.items()}
        self.write({**at, **values, f"{VALIDATION}seconds": time.perf_counter() - began})
        self._done.add(number)
        self.heard(Looked(at, summary, is_best))

    def _fill(self, folder: Path, found: dict[str, Any]) -> None:
        self.saver.trainer.policy.save(folder)
        (folder / BEST_FILE).write_text(json.dumps(found, indent=2), encoding="utf-8")
        self.describe(folder)
