"""Rollout workers on Ray: a supervisor that keeps them alive, and the two backends that use it.

    ray-env       workers hold environments only; the learner's policy acts for all of them (RayVectorEnv)
    ray-replica   workers hold environments and a copy of the policy, and play whole rollouts (ReplicaRollouts)

Both give the trajectories of the local backend for the same seed and weights, with any number of workers, and through
any fault: a worker that was killed, hangs or raises is replaced, and its segment of the slots is played again from its
last known state, by the new worker or by another one that is free. `max_restarts` is 0: a worker that Ray restarts by
itself comes back without weights and environments, and nobody knows. This is the one module that imports ray.
"""

import contextlib
import logging
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from manako.agent.errors import TrainingError, WorkersError
from manako.agent.rollout import Observations, Rollout, RolloutCollector, merge
from manako.agent.workers.worker import (
    ROUND,
    EnvWorker,
    History,
    Played,
    ReplicaWorker,
    Segment,
    State,
    as_arrays,
    frozen_digest,
    merge_states,
    split_state,
    trainable_tensors,
    unpack,
)
from manako.policies import PolicyError, VLMPolicy

Submit = Callable[[Any, int, int], Any]  # (actor, number of the segment, failures so far) -> ObjectRef of its result
MAX_FAILURES = 3  # of the same segment, or of the same worker's start, in a row
SNAPSHOT_EVERY = 64  # steps between the states that RayVectorEnv keeps
log = logging.getLogger("manako.workers")


@dataclass(frozen=True)
class WorkerOptions:
    """What workers are given.

    Args:
        num_workers: how many.
        cpus: CPU cores of each.
        gpus: GPUs of each, may be a fraction.
        timeout: seconds after which a call that has not returned counts as hung.
        placement_timeout: seconds that a worker may wait for its place in the cluster.
    """

    num_workers: int
    cpus: float = 1.0
    gpus: float = 0.0
    timeout: float = 300.0
    placement_timeout: float = 60.0

    def __str__(self) -> str:
        return f"{self.num_workers} x ({self.cpus:g} CPU, {self.gpus:g} GPU)"


# ---- the cluster -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cluster(address: str | None = None, paths: Sequence[str] = (), num_cpus: int | None = None) -> Iterator[None]:
    """Inside: connected to the Ray cluster at `address`, else to that of RAY_ADDRESS, else to one of our own.

    One of our own has no dashboard, sends no usage statistics and ends with the block.

    Args:
        address: host:port of a head, `auto` for the cluster that runs on this machine, `local` for one of our own.
        paths: folders from which workers import, after those of PYTHONPATH: the user's modules, then `manako`.
        num_cpus: CPU cores that a cluster of our own counts; by default those of the machine.

    Raises:
        WorkersError: nobody answers.
    """
    _prepare_environment()
    import ray

    if ray.is_initialized():  # somebody else's session: used, and left as it is
        yield
        return
    own = address == "local" or (address is None and not os.environ.get("RAY_ADDRESS"))
    if address is not None:
        _check_address(address)
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*([inherited] if inherited else []), *paths])
    # A cluster of our own inherits this process' environment; elsewhere the runtime environment brings it.
    runtime = None if own or in_job() else {"env_vars": {"PYTHONPATH": path}}
    if own:
        os.environ["PYTHONPATH"] = path
    try:
        ray.init(
            address="local" if own else address,  # without it Ray joins whatever runs on this machine
            include_dashboard=False if own else None,
            num_cpus=num_cpus if own else None,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env=runtime,
        )
    except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
        reason = _first_line(error)
        where = address or os.environ.get("RAY_ADDRESS") or "this machine"
        raise WorkersError(
            f"No Ray cluster at {where!r} ({reason}): start one or give another --ray_address."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
        if own:
            os.environ.pop("PYTHONPATH")
            if inherited is not None:
                os.environ["PYTHONPATH"] = inherited


def _prepare_environment() -> None:
    """What Ray reads when it is imported: no usage statistics, and the token of this user where there is one.

    Answers up to 1 MiB (a step's frames) come with the reply and not by shared memory, which is slower for them.
    """
    os.environ.setdefault("RAY_max_direct_call_object_size", str(1 << 20))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    token = os.environ.get("RAY_AUTH_TOKEN_PATH", os.path.expanduser("~/.ray/auth_token"))
    if "RAY_AUTH_TOKEN" in os.environ or os.path.isfile(token):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def in_job() -> bool:
    """Whether this process was started by `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def job_client(address: str | None) -> Any:
    """Ray's JobSubmissionClient for the cluster whose dashboard is at `address`.

    Raises:
        WorkersError: nobody answers.
    """
    _prepare_environment()
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        reason = _first_line(error)
        raise WorkersError(
            f"No Ray dashboard at {address or 'http://127.0.0.1:8265'!r} ({reason}): expected the address that "
            "`ray start --head` prints, such as http://127.0.0.1:8265, and RAY_AUTH_MODE=token with its token where "
            "the cluster wants one."
        ) from error


def _check_address(address: str) -> None:
    """ray.init waits for a minute where nobody answers."""
    if address in ("auto", "local"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        raise WorkersError(f"--ray_address is {address!r}: expected host:port, or auto for a cluster on this machine.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise WorkersError(
            f"Nobody answers at --ray_address {address!r} ({error.strerror or error}): start a cluster there with `ray "
            "start --head`, or give another address."
        ) from error


def _resources() -> str:
    """What the cluster has and what of it is free, in words."""
    import ray

    has, free = ray.cluster_resources(), ray.available_resources()
    parts = [f"{has.get(name, 0):g} {name} ({free.get(name, 0):g} free)" for name in ("CPU", "GPU")]
    return " and ".join(parts)


# ---- the supervisor --------------------------------------------------------------------------------------------------


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
    """

    def __init__(self, worker: type, arguments: tuple, options: WorkerOptions, num_segments: int) -> None:
        import ray

        self.options, self.num_segments, self.restarts = options, num_segments, 0
        self._class: Any = ray.remote(worker).options(
            num_cpus=options.cpus, num_gpus=options.gpus, max_restarts=0, max_task_retries=0
        )
        self._arguments = arguments
        self._owner = [segment % options.num_workers for segment in range(num_segments)]
        self._workers = [self._new(number) for number in range(options.num_workers)]
        self._pending: deque[int] = deque()
        self._results: dict[int, Any] = {}
        self._failures: Counter[int] = Counter()
        self._submit: Submit | None = None
        try:
            self._await_places()
        except BaseException:
            self.close()
            raise

    def pids(self) -> list[int]:
        """The workers' processes."""
        import ray

        return [ray.get(worker.actor.ready.remote())["pid"] for worker in self._workers]

    def run(self, submit: Submit) -> list[Any]:
        """One round: the results of all segments."""
        self.begin(submit)
        return self.finish()

    def settle_starts(self) -> None:
        """Notes which new workers have started since."""
        for worker in list(self._workers):
            if worker.starting and _is_done(worker.starting):
                self._settle(worker)

    def begin(self, submit: Submit) -> None:
        """Starts a round without waiting for it."""
        self._submit = submit
        self.settle_starts()
        self._pending, self._results, self._failures = deque(range(self.num_segments)), {}, Counter()
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
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=max(0.01, deadline - time.monotonic()))
            for reference in done:
                self._settle(waiting[reference])
            self._check_clocks()
        return [self._results[segment] for segment in range(self.num_segments)]

    def close(self) -> None:
        """Ends the workers."""
        import ray

        for worker in self._workers:
            with contextlib.suppress(Exception):  # whatever state it is in
                ray.kill(worker.actor)
        self._workers = []

    def _new(self, number: int) -> _Worker:
        actor = self._class.remote(*self._arguments)
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
                    f"{_resources()}; use fewer --num_workers, smaller --worker_cpus or --worker_gpus, or a longer "
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
            mine = [segment for segment in self._pending if self._owner[segment] == worker.number]
            orphans = [segment for segment in self._pending if self._owner[segment] in gone]
            for segment in (mine or orphans)[:1]:
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
            if not type(cause).__module__.startswith("manako.envs") and type(cause).__module__ != "builtins":
                log.warning("%s", error)  # the traceback of something that nobody expected
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
        if all(worker.starting and now > worker.since + self.options.placement_timeout for worker in self._workers):
            raise WorkersError(
                f"All {self.options.num_workers} rollout workers are dead, and none found a new place in "
                f"{self.options.placement_timeout:g} s: asked for {self.options}, and the cluster has {_resources()}; "
                "repair the cluster and go on with --resume."
            )

    def _lose(self, worker: _Worker, why: object) -> None:
        """Replaces a worker that is dead, hangs or did not start."""
        import ray

        with contextlib.suppress(Exception):  # it may be gone already
            ray.kill(worker.actor)
        self.restarts += 1
        reason = _first_line(why)
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
            self._failed(segment, f"its worker was lost ({reason})")

    def _failed(self, segment: int, why: object) -> None:
        """Queues a segment again, three times in a row at most."""
        self._failures[segment] += 1
        self._pending.appendleft(segment)
        if self._failures[segment] >= MAX_FAILURES:
            text = _first_line(why)
            raise WorkersError(
                f"Segment {segment} of the environments failed {MAX_FAILURES} times in a row, the last time because "
                f"{text}: repair the environment, or the machine, and go on with --resume."
            )
        log.warning("segment %d failed (%s), once more", segment, _first_line(why))


def _is_done(reference: Any) -> bool:
    import ray

    return bool(ray.wait([reference], timeout=0)[0])


def _first_line(why: object) -> str:
    if isinstance(why, BaseException):
        lines = [line.strip() for line in str(why).splitlines() if line.strip()]
        # Ray's errors go on for lines, and end with the cause where a constructor failed; ours are one sentence
        lines = lines[-1:] if lines and "creation task" in lines[0] else lines
        text = lines[0].rstrip(".") if lines else type(why).__name__
        ours = type(why).__module__.startswith("manako.")
        return text if ours or type(why).__module__.startswith("ray") else f"{type(why).__name__}: {text}"
    return str(why)


def call_seconds(calls: int = 200) -> float:
    """Median seconds of a call to a worker that answers at once."""
    import ray

    worker: Any = ray.remote(EnvWorker).options(num_cpus=0.5).remote(None)
    took = []
    for _ in range(calls):
        start = time.perf_counter()
        ray.get(worker.ready.remote())
        took.append(time.perf_counter() - start)
    ray.kill(worker)
    return float(np.median(took))


def segments_of(num_envs: int, num_workers: int) -> list[Segment]:
    """N slots in equal neighbouring ranges, one a worker.

    Raises:
        TrainingError: they do not divide.
    """
    if num_workers < 1 or num_envs % num_workers:
        raise TrainingError(
            f"{num_envs} environments cannot be divided among {num_workers} workers: expected a number of workers that "
            "divides --num_envs."
        )
    size = num_envs // num_workers
    return [Segment(first, size) for first in range(0, num_envs, size)]


# ---- backend ray-env -------------------------------------------------------------------------------------------------


class RayVectorEnv:
    """N environments in workers, stepped together: to the learner a vector env like the local one.

    Args:
        make_env: makes a segment's environments, on the worker; see `agent.workers`.
        num_envs: N.
        action_names: (A,).
        options: the workers.

    Raises:
        WorkersError: the workers find no place, or an environment cannot be made.
    """

    first_slot = 0

    def __init__(self, make_env: Any, num_envs: int, action_names: tuple[str, ...], options: WorkerOptions) -> None:
        self.num_envs, self.action_names = num_envs, action_names
        self.segments = segments_of(num_envs, options.num_workers)
        self.episode_returns = np.zeros(num_envs, np.float64)  # (N,)
        self.episode_lengths = np.zeros(num_envs, np.int64)
        self.episode_seeds: list[int] = [0] * num_envs
        self._histories = [History(None, ()) for _ in self.segments]
        self._holders: list[Any] = [None] * len(self.segments)  # the actor that has played the history
        self._ended = np.zeros(num_envs, bool)
        self._upcoming: Observations | None = None  # after the new episodes' start
        self.supervisor = Supervisor(EnvWorker, (make_env,), options, len(self.segments))

    def reset(self, seeds: Sequence[int] | None = None) -> Observations:
        """Starts an episode in every slot."""
        if seeds is not None:
            raise TrainingError("Workers play the episodes of the run's own seeds: expected no others.")
        return self._observe()

    def reset_done(self, mask: np.ndarray, seeds: Sequence[int] | None = None) -> Observations:
        """The next episodes, which the workers have started with the step that ended the last ones."""
        if seeds is not None or not np.array_equal(mask, self._ended) or self._upcoming is None:
            raise TrainingError("Workers start the next episode in every slot whose episode has ended, and no other.")
        return self._upcoming

    def start_round(self, number: int) -> Observations:
        """Starts a new episode in every slot; `number` selects the episodes."""
        self._histories = [History({ROUND: number}, ()) for _ in self.segments]
        return self._observe()

    def expert_actions(self) -> np.ndarray:
        """What the env's scripted expert would do now, (N,)."""

        def submit(actor: Any, segment: int, failures: int) -> Any:
            history = self._histories[segment]
            known = not failures and self._holders[segment] == actor
            self._holders[segment] = actor
            return actor.experts.remote(self.segments[segment], len(history.actions), None if known else history)

        return np.concatenate(self.supervisor.run(submit))

    def step(self, actions: np.ndarray) -> Played:
        """One action (N,) in every slot."""
        parts = [actions[first : first + size] for first, size in self.segments]
        snapshot = [len(history.actions) + 1 >= SNAPSHOT_EVERY for history in self._histories]

        def submit(actor: Any, segment: int, failures: int) -> Any:
            history = self._histories[segment]
            known = not failures and self._holders[segment] == actor
            self._holders[segment] = actor
            return actor.step.remote(
                self.segments[segment],
                len(history.actions),
                parts[segment],
                None if known else history,
                snapshot[segment],
            )

        played: list[Played] = self.supervisor.run(submit)
        for segment, part in enumerate(played):
            history = self._histories[segment]
            self._histories[segment] = (
                History(part.state, ())
                if part.state is not None
                else History(history.state, (*history.actions, parts[segment]))
            )
        whole = _join(played)
        self.episode_returns, self.episode_lengths = whole.returns, whole.lengths
        self.episode_seeds = whole.seeds.tolist()
        self._ended = whole.terminated | whole.truncated
        self._upcoming = _Seen(whole.next_images, whole.next_instructions)
        return whole

    def state_dict(self) -> State:
        """As the local vector env would write it."""

        def submit(actor: Any, segment: int, failures: int) -> Any:
            history = self._histories[segment]
            self._holders[segment] = actor
            return actor.state.remote(self.segments[segment], history)

        states = self.supervisor.run(submit)
        self._histories = [History(state, ()) for state in states]
        return merge_states(states)

    def load_state_dict(self, state: State) -> Observations | None:
        """Brings every slot back to where it was."""
        self._histories = [History(part, ()) for part in split_state(state, self.segments)]
        return None if state["slots"] is None else self._observe()

    def close(self) -> None:
        """Ends the workers."""
        self.supervisor.close()

    def _observe(self) -> Observations:
        def submit(actor: Any, segment: int, failures: int) -> Any:
            self._holders[segment] = actor
            return actor.observe.remote(self.segments[segment], self._histories[segment])

        seen = self.supervisor.run(submit)
        return _Seen(np.concatenate([images for images, _ in seen]), tuple(text for _, texts in seen for text in texts))


class CentralRollouts(RolloutCollector):
    """Rollouts of the learner's policy in the environments of workers."""

    env: RayVectorEnv
    _state: State | None = None

    def collect(self, iteration: int) -> Rollout:
        """Plays the T steps, and keeps the state after them: once an environment is lost nobody can ask it."""
        rollout = super().collect(iteration)
        self._state = self.env.state_dict()
        return rollout

    def state_dict(self) -> State:
        """Where the environments were after the last rollout."""
        return self.env.state_dict() if self._state is None else self._state

    def load_state_dict(self, state: State, tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Brings the environments back to where they were."""
        super().load_state_dict(state, tensors)
        self._state = state

    def metrics(self) -> dict[str, float]:
        """Replaced workers so far."""
        return {"restarts": self.env.supervisor.restarts}


@dataclass(frozen=True)
class _Seen:
    images: Any  # (N, H, W, 3)
    instructions: tuple[str, ...]


class _Whole(Played):
    """A step of all slots, with the name that the learner reads its observations under."""

    @property
    def observations(self) -> _Seen:
        return _Seen(self.images, self.instructions)


def _join(parts: Sequence[Played]) -> _Whole:
    arrays = ("images", "rewards", "terminated", "truncated", "success", "returns", "lengths", "seeds")
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays}
    upcoming = joined["images"].copy()
    upcoming[joined["terminated"] | joined["truncated"]] = np.concatenate([part.next_images for part in parts])
    return _Whole(
        **joined,
        instructions=tuple(text for part in parts for text in part.instructions),
        next_images=upcoming,
        next_instructions=tuple(text for part in parts for text in part.next_instructions),
        state=None,
    )


# ---- backend ray-replica ---------------------------------------------------------------------------------------------


class ReplicaRollouts:
    """Rollouts played by workers, each with a copy of the policy.

    The trainable weights are put into Ray's object store once an update, under a version, and every call names the
    version that it wants. With `asynchronous`, the next rollout is collected while the learner learns from this one:
    always one version behind, whatever the workers' speed, so a run stays reproducible.

    Args:
        worker_arguments: of `ReplicaWorker`, without its threads.
        policy: the learner's.
        num_envs: N.
        num_steps: T.
        num_iterations: rollouts of the run.
        options: the workers.
        asynchronous: collect during updates.

    Raises:
        WorkersError: the workers find no place, or policy or environments cannot be made there.
        TrainingError: a worker's frozen weights are not the learner's.
    """

    def __init__(
        self,
        worker_arguments: dict[str, Any],
        policy: VLMPolicy,
        num_envs: int,
        num_steps: int,
        num_iterations: int,
        options: WorkerOptions,
        asynchronous: bool = False,
    ) -> None:
        self.policy, self.num_envs, self.num_steps = policy, num_envs, num_steps
        self.num_iterations, self.asynchronous = num_iterations, asynchronous
        self.segments = segments_of(num_envs, options.num_workers)
        self.broadcast_bytes = 0  # of the last update
        self._states: list[State | None] = [None] * len(self.segments)
        self._weights: Any = None  # ObjectRef
        self._version = -1  # of those weights
        self._launched: int | None = None  # the iteration under way
        self._behaviour: dict[str, np.ndarray] = {}  # weights of a resumed run's first rollout
        self._waited = 0.0
        threads = max(1, int(options.cpus))
        arguments = (*worker_arguments.values(), threads)
        self.supervisor = Supervisor(ReplicaWorker, arguments, options, len(self.segments))
        try:
            self._check_workers()
        except BaseException:
            self.close()
            raise

    def collect(self, iteration: int) -> Rollout:
        """Plays the T steps of that iteration in every environment.

        Raises:
            WorkersError: see `Supervisor.finish`.
            TrainingError: a fragment was played with other weights than asked for.
        """
        start = time.perf_counter()
        if self._launched != iteration:
            if self._behaviour:
                self._begin(iteration, iteration - 1, self._behaviour)
                self._behaviour = {}
            else:
                self._begin(iteration, iteration, as_arrays(trainable_tensors(self.policy)))
        results = self.supervisor.finish()
        self._launched = None
        fragments = [unpack(packed) for packed, _ in results]
        self._states = [state for _, state in results]
        versions = {fragment.version for fragment in fragments}
        if versions != {self._version}:
            raise TrainingError(
                f"Rollouts of the versions {versions} came, expected {self._version}: nothing is learned."
            )
        self._waited = time.perf_counter() - start
        rollout = merge(fragments, self.policy.pad_id)
        if self.asynchronous and iteration + 1 < self.num_iterations:
            self._begin(iteration + 1, iteration, as_arrays(trainable_tensors(self.policy)))
        return rollout if self.asynchronous else rollout._replace(seconds=self._waited)

    def metrics(self) -> dict[str, float]:
        """Replaced workers so far, bytes of the last broadcast, seconds that the learner waited."""
        return {
            "restarts": self.supervisor.restarts,
            "broadcast_bytes": self.broadcast_bytes,
            "rollout_wait_seconds": self._waited,
        }

    def state_dict(self) -> State:
        """Where the environments are after the last rollout that was learned from."""
        states = [state for state in self._states if state is not None]
        if len(states) < len(self.segments):
            raise TrainingError("There is no state before the first rollout: collect one first.")
        return merge_states(states)

    def load_state_dict(self, state: State, tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Brings the environments back; with `tensors`, the next rollout is played with these older weights."""
        self._states = list(split_state(state, self.segments))
        self._behaviour = as_arrays(tensors or {})

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights of the rollout under way, if there is one."""
        import ray

        if self._launched is None:
            return {}
        return {name: torch.from_numpy(np.array(array)) for name, array in ray.get(self._weights).items()}

    def close(self) -> None:
        """Ends the workers."""
        self.supervisor.close()

    def _begin(self, iteration: int, version: int, arrays: dict[str, np.ndarray]) -> None:
        import ray

        if version != self._version:
            self._weights, self._version = ray.put(arrays), version
            self.broadcast_bytes = sum(array.nbytes for array in arrays.values())

        def submit(actor: Any, segment: int, failures: int) -> Any:
            return actor.collect.remote(
                self.segments[segment], iteration, version, self._weights, self._states[segment]
            )

        self._launched = iteration
        self.supervisor.begin(submit)

    def _check_workers(self) -> None:
        mine = frozen_digest(self.policy)

        def submit(actor: Any, segment: int, failures: int) -> Any:
            return actor.prepare.remote(self.segments[segment])

        for segment, theirs in enumerate(self.supervisor.run(submit)):
            if theirs != mine:
                raise TrainingError(
                    f"Worker {segment} loaded other frozen weights than the learner: expected the same model files and "
                    "versions on every node."
                )
