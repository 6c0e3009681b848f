"""Backend ray-replica: workers hold environments and a copy of the policy, and play whole rollouts."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from manako.agent.backends import RolloutPlan
from manako.agent.collector import warn_given_up
from manako.agent.errors import TrainingError
from manako.agent.interfaces import GIVEN_UP, Fault
from manako.agent.rollout import Rollout, merge
from manako.agent.workers.options import WorkerOptions
from manako.agent.workers.replica_worker import ReplicaSettings, ReplicaWorker, unpack
from manako.agent.workers.segments import State, merge_states, segments_of, split_state
from manako.agent.workers.supervisor import MAX_FAILURES, Supervisor
from manako.agent.workers.weights import as_arrays, frozen_digest, trainable_tensors
from manako.policies.interface import Policy


class ReplicaRollouts:
    """Rollouts played by workers, each with a copy of the policy.

    The trainable weights are put into Ray's object store once an update, under a version, and every call names the
    version that it wants. With `asynchronous`, the next rollout is collected while the learner learns from this one:
    always one version behind, whatever the workers' speed, so a run stays reproducible.

    Args:
        settings: of the workers.
        policy: the learner's.
        num_envs: N.
        num_iterations: rollouts of the run.
        options: the workers.
        asynchronous: collect during updates.

    Raises:
        WorkersError: the workers find no place, or policy or environments cannot be made there.
        TrainingError: a worker's frozen weights are not the learner's.
    """

    def __init__(
        self,
        settings: ReplicaSettings,
        policy: Policy,
        num_envs: int,
        num_iterations: int,
        options: WorkerOptions,
        asynchronous: bool = False,
    ) -> None:
        self.policy, self.num_envs, self.num_steps = policy, num_envs, settings.num_steps
        self.num_iterations, self.asynchronous = num_iterations, asynchronous
        self.segments = segments_of(num_envs, options.num_workers)
        self.broadcast_bytes = 0  # of the last update
        self._given_up = 0  # episodes that did not replay
        self._states: list[State | None] = [None] * len(self.segments)
        self._weights: Any = None  # ObjectRef
        self._version = -1  # of those weights
        self.launched: int | None = None  # the iteration under way
        self._behaviour: dict[str, np.ndarray] = {}  # weights of a resumed run's first rollout
        self._waited = 0.0
        self.supervisor = Supervisor(ReplicaWorker, (settings,), options, len(self.segments))
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
        if self.launched != iteration:
            if self._behaviour:
                self._begin(iteration, iteration - 1, self._behaviour)
                self._behaviour = {}
            else:
                self._begin(iteration, iteration, as_arrays(trainable_tensors(self.policy)))
        results = self.supervisor.finish()
        self.launched = None
        fragments = [unpack(packed) for packed, _, _ in results]
        self._states = [state for _, state, _ in results]
        given_up = sum(count for _, _, count in results)
        self._given_up += given_up
        warn_given_up(given_up, self.num_envs)
        versions = {fragment.version for fragment in fragments}
        if versions != {self._version}:
            raise TrainingError(
                f"Rollouts of the versions {versions} came, expected {self._version}: nothing is learned."
            )
        self._waited = time.perf_counter() - start
        rollout = merge(fragments)
        if self.asynchronous and iteration + 1 < self.num_iterations:
            self._begin(iteration + 1, iteration, as_arrays(trainable_tensors(self.policy)))
        return rollout if self.asynchronous else rollout._replace(seconds=self._waited)

    def metrics(self) -> dict[str, float]:
        """Returns workers replaced and episodes given up so far, bytes of the last broadcast, seconds waited for it."""
        return {
            GIVEN_UP: self._given_up,
            "restarts": self.supervisor.restarts,
            "broadcast_bytes": self.broadcast_bytes,
            "rollout_wait_seconds": self._waited,
        }

    def state_dict(self) -> State:
        """Returns where the environments are after the last rollout that was learned from."""
        states = [state for state in self._states if state is not None]
        if len(states) < len(self.segments):
            raise TrainingError("There is no state before the first rollout: collect one first.")
        return merge_states(states)

    def load_state_dict(self, state: State, tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Brings the environments back; with `tensors`, the next rollout is played with these older weights."""
        self._states = list(split_state(state, self.segments))
        self._behaviour = as_arrays(tensors or {})

    def take_faults(self) -> Sequence[Fault]:
        """Returns nothing: what broke in a worker's rollout that broke off is known there alone."""
        return ()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns the weights of the rollout under way, if there is one."""
        import ray

        if self.launched is None:
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
            state = self._states[segment]
            if state is not None and state["slots"] is not None and self.supervisor.losses[segment] == MAX_FAILURES - 1:
                state = {**state, "slots": None}  # the replay's worker was lost as well: its episodes are given up
                self._given_up += self.segments[segment].num_slots
            return actor.collect.remote(self.segments[segment], iteration, version, self._weights, state)

        self.launched = iteration
        self.supervisor.begin(submit)

    def _check_workers(self) -> None:
        expected = frozen_digest(self.policy)

        def submit(actor: Any, segment: int, failures: int) -> Any:
            return actor.prepare.remote(self.segments[segment])

        for segment, loaded in enumerate(self.supervisor.run(submit)):
            if loaded != expected:
                raise TrainingError(
                    f"Worker {segment} loaded other frozen weights than the learner: expected the same model files and "
                    "versions on every node."
                )


def make_rollouts(plan: RolloutPlan) -> ReplicaRollouts:
    """Returns the backend's rollouts; Ray must be connected."""
    options = plan.options or WorkerOptions(1)
    settings = ReplicaSettings(
        plan.make_segment,
        plan.make_policy,
        plan.num_steps,
        plan.seed,
        reference=plan.reference,
        batch_size=plan.batch_size,
        bf16=plan.bf16,
        rounds=plan.rounds,
        record=plan.record,
        ask_expert=plan.ask_expert,
        threads=options.threads,
    )
    return ReplicaRollouts(
        settings, plan.policy, plan.num_envs, plan.num_iterations, options, asynchronous=plan.asynchronous
    )
