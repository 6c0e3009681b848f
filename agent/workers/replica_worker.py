"""What runs inside a worker of backend ray-replica: environments and a copy of the policy, which play whole rollouts.

No Ray here: a plain class. torch is imported once the worker runs.
"""

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from manako.agent.workers.env_worker import WORKER_ENVIRONMENT, MakeSegment
from manako.agent.workers.segments import Segment, State
from manako.agent.workers.weights import frozen_digest, load_trainable

if TYPE_CHECKING:
    from manako.agent.rollout import Rollout
    from manako.policies.interface import Policy

MakePolicy = Callable[[], "Policy"]


@dataclass(frozen=True)
class ReplicaSettings:
    """What a worker with a copy of the policy is made from.

    Args:
        make_segment: makes a segment's environments.
        make_policy: makes the policy as the learner's was made; its trainable weights come with every call.
        num_steps: T.
        seed: the run's seed.
        reference: keep close to the policy with its LoRA off.
        batch_size: slots of one forward, see `RolloutCollector`.
        bf16: bfloat16 autocast, as in the learner's updates.
        rounds: every rollout starts new episodes, see `RolloutCollector`.
        record: see `RolloutCollector`.
        ask_expert: see `RolloutCollector`.
        threads: CPU threads of torch.
    """

    make_segment: MakeSegment
    make_policy: MakePolicy
    num_steps: int
    seed: int
    reference: bool = False
    batch_size: int | None = None
    bf16: bool = False
    rounds: bool = False
    record: bool = False
    ask_expert: bool = False
    threads: int = 1


class ReplicaWorker:
    """Environments and a copy of the policy.

    Args:
        settings: what both are made from, and how rollouts are played.
    """

    def __init__(self, settings: ReplicaSettings) -> None:
        for name, value in WORKER_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.settings = settings
        self.policy: Policy | None = None
        self.version: int | None = None
        self.held: dict[Segment, tuple[int, Any]] = {}  # the iteration that comes next, and its RolloutCollector

    def ready(self) -> dict[str, Any]:
        """Returns the worker's process id, once it runs."""
        return {"pid": os.getpid()}

    def prepare(self, segment: Segment) -> str:
        """Makes policy and environments, so that a fault shows before the run; returns the frozen weights' digest."""
        policy = self._policy()
        self.settings.make_segment(*segment).close()
        return frozen_digest(policy)

    def collect(
        self, segment: Segment, iteration: int, version: int, weights: Mapping[str, np.ndarray], state: State | None
    ) -> tuple["Rollout", State, int]:
        """Plays a segment's T steps of one iteration.

        Args:
            segment: which.
            iteration: which.
            version: of the weights.
            weights: the trainable ones.
            state: of the segment before the iteration; None before the first.

        Returns:
            The rollout, which bears the version, the segment's state after it, and how many of its episodes did not
            replay when the segment was taken over.
        """
        import torch

        from manako.agent.collector import RolloutCollector

        settings, policy = self.settings, self._policy()
        if version != self.version:
            self.version = None  # half-loaded weights have no version
            load_trainable(policy, weights)
            self.version = version
        for other, (upcoming, collector) in list(self.held.items()):
            if upcoming != iteration:  # another worker has played it on
                self.held.pop(other)
                collector.close()
        given_up = 0
        if segment not in self.held:
            collector = RolloutCollector(
                settings.make_segment(*segment),
                policy,
                settings.num_steps,
                settings.seed,
                reference=policy if settings.reference else None,
                batch_size=settings.batch_size,
                rounds=settings.rounds,
                record=settings.record,
                ask_expert=settings.ask_expert,
            )
            if state is not None:
                collector.load_state_dict(state)
                given_up = collector.env.given_up
        else:
            _, collector = self.held.pop(segment)
        try:
            with torch.autocast(policy.device.type, torch.bfloat16, enabled=settings.bf16):
                rollout = collector.collect(iteration)
            after = collector.state_dict()
        except BaseException:
            with contextlib.suppress(Exception):  # it may be broken
                collector.close()
            raise
        self.held[segment] = (iteration + 1, collector)
        return pack(rollout._replace(version=version)), after, given_up

    def _policy(self) -> "Policy":
        if self.policy is None:
            import torch

            policy = self.settings.make_policy()
            torch.set_num_threads(self.settings.threads)
            self.policy = policy
        return self.policy


class _Array(NamedTuple):
    """A tensor on its way: a NumPy array, which travels between processes without a copy."""

    array: np.ndarray


def pack(rollout: "Rollout") -> "Rollout":
    """Returns a rollout that travels between processes: its tensors are arrays. Rows do the same by themselves."""
    return _map_tensors(rollout)


def _map_tensors(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return _Array(value.numpy())
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # the rollout, and its record
        return type(value)(*map(_map_tensors, value))
    return value


def unpack(packed: Any) -> Any:
    """Returns the rollout again; its arrays are copied, since shared memory is read-only."""
    import torch

    if isinstance(packed, _Array):
        return torch.from_numpy(np.array(packed.array))
    if isinstance(packed, tuple) and hasattr(packed, "_fields"):
        return type(packed)(*map(unpack, packed))
    return packed
