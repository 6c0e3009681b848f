"""What runs inside a worker of backend ray-replica: environments and a copy of the policy, which play whole rollouts.

No Ray here: a plain class. torch is imported once the worker runs.
"""

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from manako.agent.workers.env_worker import WORKER_ENVIRONMENT, MakeEnv
from manako.agent.workers.segments import Segment, State
from manako.agent.workers.weights import frozen_digest, load_trainable

if TYPE_CHECKING:
    from manako.agent.rollout import Rollout
    from manako.policies import VLMPolicy

MakePolicy = Callable[[], "VLMPolicy"]
Packed = dict[str, Any]  # a Rollout of numpy arrays


@dataclass(frozen=True)
class ReplicaSettings:
    """What a worker with a copy of the policy is made from.

    Args:
        make_env: makes a segment's environments.
        make_policy: makes the policy as the learner's was made; its trainable weights come with every call.
        num_steps: T.
        seed: the run's seed.
        reference: keep close to the policy with its LoRA off.
        batch_size: slots of one forward, see `RolloutCollector`.
        bf16: bfloat16 autocast, as in the learner's updates.
        rounds: every rollout starts new episodes, see `RolloutCollector`.
        recorded: `demonstrator`, `record` and `ask_expert` of `RolloutCollector`.
        threads: CPU threads of torch.
    """

    make_env: MakeEnv
    make_policy: MakePolicy
    num_steps: int
    seed: int
    reference: bool = False
    batch_size: int | None = None
    bf16: bool = False
    rounds: bool = False
    recorded: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1


class ReplicaWorker:
    """Environments and a copy of the policy.

    Args:
        settings: what both are made from, and how rollouts are played.
    """

    def __init__(self, settings: ReplicaSettings) -> None:
        for name, value in WORKER_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.make_env, self.make_policy = settings.make_env, settings.make_policy
        self.num_steps, self.seed, self.reference = settings.num_steps, settings.seed, settings.reference
        self.batch_size, self.bf16, self.rounds = settings.batch_size, settings.bf16, settings.rounds
        self.recorded, self.threads = settings.recorded, settings.threads
        self.policy: VLMPolicy | None = None
        self.version: int | None = None
        self.held: dict[Segment, tuple[int, Any]] = {}  # the iteration that comes next, and its RolloutCollector

    def ready(self) -> dict[str, Any]:
        """That it runs, and as which process."""
        return {"pid": os.getpid()}

    def prepare(self, segment: Segment) -> str:
        """Makes policy and environments, so that a fault shows before the run; a digest of the frozen weights."""
        policy = self._policy()
        self.make_env(*segment).close()
        return frozen_digest(policy)

    def collect(
        self, segment: Segment, iteration: int, version: int, weights: Mapping[str, np.ndarray], state: State | None
    ) -> tuple[Packed, State]:
        """Plays a segment's T steps of one iteration.

        Args:
            segment: which.
            iteration: which.
            version: of the weights.
            weights: the trainable ones.
            state: of the segment before the iteration; None before the first.

        Returns:
            The rollout, which bears the version, and the segment's state after it.
        """
        import torch

        from manako.agent.rollout import RolloutCollector

        policy = self._policy()
        if version != self.version:
            self.version = None  # half-loaded weights have no version
            load_trainable(policy, weights)
            self.version = version
        for other, (upcoming, collector) in list(self.held.items()):
            if upcoming != iteration:  # another worker has played it on
                self.held.pop(other)
                collector.close()
        if segment not in self.held:
            collector = RolloutCollector(
                self.make_env(*segment),
                policy,
                self.num_steps,
                self.seed,
                reference=policy if self.reference else None,
                batch_size=self.batch_size,
                rounds=self.rounds,
                **self.recorded,
            )
            if state is not None:
                collector.load_state_dict(state)
        else:
            _, collector = self.held.pop(segment)
        try:
            with torch.autocast(policy.device.type, torch.bfloat16, enabled=self.bf16):
                rollout = collector.collect(iteration)
            after = collector.state_dict()
        except BaseException:
            with contextlib.suppress(Exception):  # it may be broken
                collector.close()
            raise
        self.held[segment] = (iteration + 1, collector)
        return pack(rollout._replace(version=version)), after

    def _policy(self) -> "VLMPolicy":
        if self.policy is None:
            import torch

            policy = self.make_policy()
            torch.set_num_threads(self.threads)
            self.policy = policy
        return self.policy


def pack(rollout: "Rollout") -> Packed:
    """A rollout of numpy arrays, which travel between processes without a copy."""
    import torch

    return {
        key: [part.numpy() for part in value]
        if key in ("inputs", "bootstrap")
        else value.numpy()
        if isinstance(value, torch.Tensor)
        else value
        for key, value in rollout._asdict().items()
    }


def unpack(packed: Packed) -> "Rollout":
    """The rollout again; its arrays are copied, since shared memory is read-only."""
    import torch

    from manako.agent.rollout import Rollout
    from manako.policies import PolicyInputs

    def tensor(value: Any) -> Any:
        return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value

    fields: dict[str, Any] = {
        key: PolicyInputs(*map(tensor, value))
        if key in ("inputs", "bootstrap")
        else value
        if key == "images"
        else tensor(value)
        for key, value in packed.items()
    }
    return Rollout(**fields)
