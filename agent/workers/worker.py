"""What runs inside a rollout worker, and what travels between workers and learner. No Ray here: plain classes.

    EnvWorker       environments only, no torch: the learner decides on the actions (backend ray-env)
    ReplicaWorker   environments and a copy of the policy: plays whole rollouts (backend ray-replica)

A segment is a range of neighbouring slots. A worker usually keeps one, but nothing ties the two: every call says which
segment, at which point, and carries or can be given the segment's state and the weights. So any worker can take over
any segment at any time, and plays it on exactly as the one that was lost would have.
"""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import torch

    from manako.agent.rollout import Observations, Rollout, VectorEnv
    from manako.policies import VLMPolicy

MakeEnv = Callable[[int, int], "VectorEnv"]  # (first slot, number of slots) -> environments that were not started
MakePolicy = Callable[[], "VLMPolicy"]
State = dict[str, Any]  # VectorEnv.state_dict()
Packed = dict[str, Any]  # a Rollout of numpy arrays
# A library that starts threads which wait in a loop, or that answers signals, must not do so in a worker.
WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "SDL_NO_SIGNAL_HANDLERS": "1", "SDL_VIDEODRIVER": "dummy"}


ROUND = "round"  # the one key of a state that is the start of a round


class Segment(NamedTuple):
    """A range of neighbouring slots."""

    first_slot: int
    num_slots: int


class Played(NamedTuple):
    """What n slots show after a step."""

    images: np.ndarray  # (n, H, W, 3) uint8, what the step returned
    instructions: tuple[str, ...]
    rewards: np.ndarray  # (n,)
    terminated: np.ndarray  # (n,) bool
    truncated: np.ndarray  # (n,) bool
    success: np.ndarray  # (n,) bool
    returns: np.ndarray  # (n,) of the episodes that the step belonged to
    lengths: np.ndarray  # (n,)
    seeds: np.ndarray  # (n,) int64
    next_images: np.ndarray  # (ended, H, W, 3), the first frames of the new episodes, in the order of their slots
    next_instructions: tuple[str, ...]  # of all slots, after the new episodes' start
    state: State | None  # after the step, where it was asked for


class History(NamedTuple):
    """How a segment got where it is: a state, or None for the start, and the actions since."""

    state: State | None
    actions: tuple[np.ndarray, ...]  # each (n,)


class _Held:
    """A segment that this worker keeps."""

    def __init__(self, env: "VectorEnv", history: History) -> None:
        self.env, self.position = env, 0
        state, observations = history.state, None
        if state is not None and ROUND in state:
            observations = env.start_round(state[ROUND])
        elif state is not None:
            observations = env.load_state_dict(state)
        self.observations: Observations = env.reset() if observations is None else observations
        for actions in history.actions:
            self.step(actions)

    def step(self, actions: np.ndarray) -> Any:
        """One step and the start of new episodes: the step's result; returns, lengths and seeds of its episodes."""
        result = self.env.step(actions)
        returns, lengths = self.env.episode_returns, self.env.episode_lengths
        seeds = np.array(self.env.episode_seeds)
        ended = result.terminated | result.truncated
        self.observations = self.env.reset_done(ended) if ended.any() else result.observations
        self.position += 1
        return result, returns, lengths, seeds


class EnvWorker:
    """Environments of one or more segments, stepped with the learner's actions.

    Args:
        make_env: makes a segment's environments.
    """

    def __init__(self, make_env: MakeEnv) -> None:
        for name, value in WORKER_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.make_env = make_env
        self.held: dict[Segment, _Held] = {}

    def ready(self) -> dict[str, Any]:
        """That it runs, and as which process."""
        return {"pid": os.getpid()}

    def observe(self, segment: Segment, history: History) -> tuple[np.ndarray, tuple[str, ...]]:
        """Takes the segment over from its history: images and instructions now."""
        held = self._take(segment, history)
        return held.observations.images, held.observations.instructions

    def step(
        self, segment: Segment, position: int, actions: np.ndarray, history: History | None, want_state: bool
    ) -> Played:
        """One step of a segment.

        Args:
            segment: which.
            position: steps since its history's state.
            actions: (n,).
            history: for a worker that does not hold the segment.
            want_state: return the state after the step, and count positions from there.

        Raises:
            LookupError: the worker does not hold the segment at this position, and no history came.
        """
        held = self._at(segment, position, history)
        try:
            result, returns, lengths, seeds = held.step(actions)
            state = held.env.state_dict() if want_state else None
        except BaseException:
            self._drop(segment)
            raise
        if want_state:
            held.position = 0
        ended = result.terminated | result.truncated
        return Played(
            result.observations.images,
            tuple(result.observations.instructions),
            result.rewards,
            result.terminated,
            result.truncated,
            result.success,
            returns,
            lengths,
            seeds,
            held.observations.images[ended],
            tuple(held.observations.instructions),
            state,
        )

    def experts(self, segment: Segment, position: int, history: History | None) -> np.ndarray:
        """What the env's expert would do now, (n,); arguments and errors as of `step`."""
        held = self._at(segment, position, history)
        return held.env.expert_actions()

    def state(self, segment: Segment, history: History) -> State:
        """The segment's state, from which positions are counted now.

        The history is for a worker that does not hold the segment at its end.
        """
        held = self.held.get(segment)
        if held is None or held.position != len(history.actions):
            held = self._take(segment, history)
        held.position = 0
        return held.env.state_dict()

    def _at(self, segment: Segment, position: int, history: History | None) -> _Held:
        """The segment at this position, taken over from its history where one came; LookupError if it is not here."""
        if history is not None:
            return self._take(segment, history)
        held = self.held.get(segment)
        if held is None or held.position != position:
            raise LookupError(f"{segment} is not here at step {position}")
        return held

    def _take(self, segment: Segment, history: History) -> _Held:
        if segment in self.held and history.state is not None and ROUND in history.state:
            env = self.held.pop(segment).env  # a new round needs nothing of the last one
        else:
            self._drop(segment)
            env = self.make_env(*segment)
        held = self.held[segment] = _Held(env, history)
        return held

    def _drop(self, segment: Segment) -> None:
        if segment in self.held:
            with contextlib.suppress(Exception):  # it may be broken
                self.held.pop(segment).env.close()


class ReplicaWorker:
    """Environments and a copy of the policy.

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

    def __init__(
        self,
        make_env: MakeEnv,
        make_policy: MakePolicy,
        num_steps: int,
        seed: int,
        reference: bool = False,
        batch_size: int | None = None,
        bf16: bool = False,
        rounds: bool = False,
        recorded: Mapping[str, Any] | None = None,
        threads: int = 1,
    ) -> None:
        for name, value in WORKER_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.make_env, self.make_policy, self.num_steps, self.seed = make_env, make_policy, num_steps, seed
        self.reference, self.batch_size, self.bf16 = reference, batch_size, bf16
        self.rounds, self.recorded, self.threads = rounds, dict(recorded or {}), threads
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


# ---- weights ---------------------------------------------------------------------------------------------------------


def trainable_tensors(policy: "VLMPolicy") -> dict[str, "torch.Tensor"]:
    """The parameters that learn, by name."""
    return {name: parameter.detach() for name, parameter in policy.named_parameters() if parameter.requires_grad}


def as_arrays(tensors: Mapping[str, "torch.Tensor"]) -> dict[str, np.ndarray]:
    """Tensors as numpy arrays; bfloat16, which numpy does not know, as its bits."""
    import torch

    return {
        name: (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
        for name, tensor in tensors.items()
    }


def load_trainable(policy: "VLMPolicy", arrays: Mapping[str, np.ndarray]) -> None:
    """Puts the broadcast weights in place.

    Raises:
        TrainingError: they are not exactly this policy's trainable ones.
    """
    import torch

    from manako.agent.errors import TrainingError

    mine = trainable_tensors(policy)
    if mine.keys() != arrays.keys():
        names = sorted(mine.keys() ^ arrays.keys())
        raise TrainingError(
            f"The weights that came are not those that learn here ({len(names)} differ, such as {names[0]!r}): "
            "expected the learner's policy and settings on every worker."
        )
    for name, tensor in mine.items():
        array = torch.from_numpy(np.array(arrays[name]))  # a copy: the shared memory is read-only
        tensor.copy_(array.view(torch.bfloat16) if tensor.dtype == torch.bfloat16 else array)


def frozen_digest(policy: "VLMPolicy") -> str:
    """A digest of the weights that do not learn: learner and workers must have the same."""
    import hashlib

    frozen = {name: tensor for name, tensor in policy.named_parameters() if not tensor.requires_grad}
    digest = hashlib.sha256()
    for name, array in sorted(as_arrays({name: tensor.detach() for name, tensor in frozen.items()}).items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


# ---- rollouts and states ---------------------------------------------------------------------------------------------


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


def split_state(state: State, segments: Sequence[Segment]) -> list[State]:
    """The state of all slots -> that of each segment."""
    parts = []
    for first, size in segments:
        rows = slice(first, first + size)
        part = {**state, "first_slot": state["first_slot"] + first, "episodes": state["episodes"][rows]}
        if state["slots"] is not None:
            part |= {"slots": state["slots"][rows], "replacements": state["replacements"][rows]}
        parts.append(part)
    return parts


def merge_states(states: Sequence[State]) -> State:
    """The states of neighbouring segments -> that of all their slots: what one process would have saved."""
    merged = {**states[0], "episodes": [episode for state in states for episode in state["episodes"]]}
    if states[0]["slots"] is not None:
        merged |= {
            "slots": [slot for state in states for slot in state["slots"]],
            "replacements": [text for state in states for text in state["replacements"]],
            "instructions": list(dict.fromkeys(text for state in states for text in state["instructions"])),
        }
    return merged
