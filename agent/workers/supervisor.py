"""Keeps rollout workers alive: one that was killed, hangs or raises is replaced, and its segment is played again.

`max_restarts` is 0: a worker that Ray restarts by itself comes back without weights and environments, and nobody knows.
"""

import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from manako.agent.errors import HeadLostError, TrainingError, WorkersError
from manako.agent.workers.cluster import is_anything_held, reason_of, resources
from manako.agent.workers.env_worker import SegmentNotHere
from manako.agent.workers.head import lost
from manako.agent.workers.options import WorkerOptions
from manako.errors import ManakoError
from manako.policies import PolicyError

Submit = Callable[[Any, int, int], Any]  # (actor, number of the segment, failures so far) -> ObjectRef of its result
LOOK_EVERY = 2.0  # seconds between two looks at the head while nothing comes
MAX_FAILURES = 3  # of the same segment, or of the same worker's start, in a row
log = logging.getLogger("manako.workers")


@dataclass
class _Worker:
    number: int
    actor: Any
    starting: Any  # ObjectRef of ready(), None once it has answered
    since: float  # when it was made, or when its job was submitted
    job: Any = None  # ObjectRef
    segment: int = -1  # of the job
    failed_starts: int = 0
    lost_at: float | None = None


class Supervisor:
    """Gets one job done for each segment, by workers that may die, hang or raise at any time.

    Args:
        worker: class of the workers; it has a method `ready`.
        arguments: of its constructor.
        options: how many workers, and with what.
        num_segments: jobs of a round.

    Attributes:
        restarts: workers replaced so far.
        actor_class: Ray's class of the workers, of which new ones are made.
    """

    def __init__(self, worker: type, arguments: tuple, options: WorkerOptions, num_segments: int) -> None:
        import ray

        self.options, self.num_segments, self.restarts = options, num_segments, 0
        self.actor_class: Any = ray.remote(worker).options(
            num_cpus=options.cpus, num_gpus=options.gpus, max_restarts=0, max_task_retries=0
        )
        self._arguments = arguments
        self._owner = [segment % options.num_workers for segment in range(num_segments)]
        self._workers = [self._new(number) for number in range(options.num_workers)]
        self._pending: deque[int] = deque()
        self._results: dict[int, Any] = {}
        self._failures: Counter[int] = Counter()
        self._submit: Submit | None = None
        self.last_reason = ""
        self.losses: Counter[int] = Counter()  # of the round: workers that were lost with a segment's job
        try:
            self._await_places()
        except BaseException:
            self.close()
            raise

    def pids(self) -> list[int]:
        """Returns the workers' process ids."""
        import ray

        return [ray.get(worker.actor.ready.remote())["pid"] for worker in self._workers]

    def run(self, submit: Submit) -> list[Any]:
        """Plays one round and returns the results of all segments."""
        self.begin(submit)
        return self.finish()

    def owners(self) -> list[int]:
        """Returns the number of the worker that each segment belongs to."""
        return list(self._owner)

    def settle_starts(self) -> int:
        """Notes which new workers have started since; returns how many have not."""
        for worker in list(self._workers):
            if worker.starting and _is_done(worker.starting):
                self._settle(worker)
        return sum(worker.starting is not None for worker in self._workers)

    def begin(self, submit: Submit) -> None:
        """Starts a round without waiting for it."""
        self._submit = submit
        self.settle_starts()
        self._pending, self._results, self._failures = deque(range(self.num_segments)), {}, Counter()
        self.losses = Counter()
        self._balance()
        self._assign()

    def finish(self) -> list[Any]:
        """Waits for the round's results, replacing workers and repeating jobs where it must.

        Raises:
            WorkersError: a segment failed three times in a row, or no worker is left.
            TrainingError: a worker's policy or settings are at fault, which no repetition changes.
        """
        import ray

        while len(self._results) < self.num_segments:
            self._assign()
            waiting = {
                worker.starting or worker.job: worker for worker in self._workers if worker.starting or worker.job
            }
            deadline = min(worker.since + self._limit(worker) for worker in waiting.values())
            left = min(LOOK_EVERY, max(0.01, deadline - time.monotonic()))
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=left)
            self._check_head()
            for reference in done:
                self._settle(waiting[reference])
            self._check_clocks()
        return [self._results[segment] for segment in range(self.num_segments)]

    def close(self) -> None:
        """Ends the workers."""
        import ray

        if lost() is not None:  # they end by themselves, and nobody answers here
            self._workers = []
        for worker in self._workers:
            with contextlib.suppress(Exception):  # whatever state it is in
                ray.kill(worker.actor)
        self._workers = []

    def _new(self, number: int) -> _Worker:
        actor = self.actor_class.remote(*self._arguments)
        return _Worker(number, actor, actor.ready.remote(), time.monotonic())

    def _limit(self, worker: _Worker) -> float:
        return self.options.placement_timeout if worker.starting else self.options.timeout

    def _await_places(self) -> None:
        import ray

        until = time.monotonic() + self.options.placement_timeout
        while starting := {worker.starting: worker for worker in self._workers if worker.starting}:
            left = until - time.monotonic()
            done, _ = ray.wait(list(starting), num_returns=1, timeout=max(0.0, left))
            if not done:
                placed = self.options.num_workers - len(starting)
                raise WorkersError(
                    f"Only {placed} of {self.options.num_workers} rollout workers found a place in "
                    f"{self.options.placement_timeout:g} s: asked for {self.options}, and the cluster has "
                    f"{resources()}; use fewer --num_workers, smaller --worker_cpus or --worker_gpus, or a longer "
                    "--placement_timeout."
                )
            for reference in done:
                self._settle(starting[reference])

    def _balance(self) -> None:
        """Gives a segment back to a worker that was replaced."""
        for worker in self._workers:
            owned = Counter(self._owner)
            busiest = max(owned, key=lambda number: owned[number])
            if not worker.starting and owned[worker.number] == 0 and owned[busiest] > 1:
                self._owner[self._owner.index(busiest)] = worker.number

    def _assign(self) -> None:
        """Gives every free worker its own segment, else one whose worker is not there."""
        assert self._submit is not None
        gone = {worker.number for worker in self._workers if worker.starting}
        for worker in self._workers:
            if worker.starting or worker.job:
                continue
            owned = [segment for segment in self._pending if self._owner[segment] == worker.number]
            orphans = [segment for segment in self._pending if self._owner[segment] in gone]
            for segment in (owned or orphans)[:1]:
                self._pending.remove(segment)
                self._owner[segment] = worker.number
                worker.segment, worker.since = segment, time.monotonic()
                worker.job = self._submit(worker.actor, segment, self._failures[segment])

    def _settle(self, worker: _Worker) -> None:
        """Takes what a worker answered."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            answer = ray.get(worker.starting or worker.job)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, TrainingError | PolicyError):
                raise cause from error
            if worker.starting:
                self._lose(worker, cause)
                return
            if not isinstance(cause, ManakoError | SegmentNotHere):
                log.debug("%s", error)  # the traceback of something that nobody expected
            worker.job = None
            self._failed(worker.segment, cause)
        except RayError as error:
            self._lose(worker, error)
        else:
            if worker.starting:
                worker.starting, worker.failed_starts = None, 0
                if worker.lost_at is not None:
                    log.warning("worker %d is replaced after %.1f s", worker.number, time.monotonic() - worker.lost_at)
            else:
                worker.job = None
                self._results[worker.segment] = answer

    def _check_clocks(self) -> None:
        """Ends workers that hang, and the run once no worker is there."""
        now = time.monotonic()
        for worker in self._workers:
            if worker.job and now > worker.since + self.options.timeout and not _is_done(worker.job):
                self._lose(worker, f"no answer in {self.options.timeout:g} s")
        gone = min((now - worker.since if worker.starting else 0.0) for worker in self._workers)
        if gone <= self.options.replacement_timeout:
            return
        # one that has its place may take long to start on a busy machine
        if gone > self.options.placement_timeout or not is_anything_held():
            raise WorkersError(
                f"All {self.options.num_workers} rollout workers are dead, and none found a new place in "
                f"{gone:.0f} s: asked for {self.options}, and the cluster has {resources()}; "
                "repair the cluster and go on with --resume."
            )

    @staticmethod
    def _check_head() -> None:
        """Ends the run where nobody can give it another worker."""
        if why := lost():
            raise HeadLostError(
                f"Ray's head is lost: {why}, and no worker can be reached or started; start Ray again, or take another "
                "--rollout_backend, and go on with --resume."
            )

    def _lose(self, worker: _Worker, why: BaseException | str) -> None:
        """Replaces a worker that is dead, hangs or did not start."""
        import ray

        if not isinstance(why, str):
            time.sleep(0 if lost() else LOOK_EVERY / 2)  # with the head they are lost all at once
        self._check_head()
        with contextlib.suppress(Exception):  # it may be gone already
            ray.kill(worker.actor)
        self.restarts += 1
        reason = reason_of(why)
        log.warning("worker %d is lost (%s)", worker.number, reason)
        failed_starts = worker.failed_starts + 1 if worker.starting else 0
        if failed_starts >= MAX_FAILURES:
            raise WorkersError(
                f"A rollout worker failed to start {MAX_FAILURES} times in a row ({reason}): expected the project, its "
                "packages and your environment's module on every node of the cluster."
            )
        had_job, segment = worker.job is not None, worker.segment
        new = self._new(worker.number)
        new.failed_starts, new.lost_at = failed_starts, time.monotonic()
        self._workers[worker.number] = new
        if had_job:
            self.losses[segment] += 1
            self._failed(segment, f"its worker was lost ({reason})")

    def _failed(self, segment: int, why: BaseException | str) -> None:
        """Queues a segment again, three times in a row at most."""
        self._failures[segment] += 1
        self.last_reason = reason_of(why)
        self._pending.appendleft(segment)
        if self._failures[segment] >= MAX_FAILURES:
            text = reason_of(why)
            raise WorkersError(
                f"Segment {segment} of the environments failed {MAX_FAILURES} times in a row, the last time because "
                f"{text}: repair the environment, or the machine, and go on with --resume."
            )
        log.warning("segment %d failed (%s), once more", segment, reason_of(why))


def _is_done(reference: Any) -> bool:
    import ray

    return bool(ray.wait([reference], timeout=0)[0])
