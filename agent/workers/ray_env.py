"""Backend ray-env: workers hold environments only; the learner's policy acts for all of them."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from manako.agent.backends import RolloutPlan
from manako.agent.collector import RolloutCollector
from manako.agent.errors import TrainingError, WorkersError
from manako.agent.interfaces import Shown, ToldFault
from manako.agent.rollout import Rollout
from manako.agent.workers.env_worker import EnvWorker, MakeSegment
from manako.agent.workers.options import WorkerOptions
from manako.agent.workers.segments import (
    ROUND,
    Advice,
    Differs,
    History,
    Observed,
    Played,
    ReplayDiffersError,
    State,
    merge_states,
    segments_of,
    split_state,
)
from manako.agent.workers.supervisor import MAX_FAILURES, Submit, Supervisor
from manako.memory import Memory

SNAPSHOT_EVERY = 64  # steps between the states that RayVectorEnv keeps
log = logging.getLogger("manako.workers")


class RayVectorEnv:
    """N environments in workers, stepped together: to the learner a vector env like the local one.

    A lost segment is brought back by another worker, from its last state and the actions since. What it then shows must
    be what the learner has seen, to the digest of all frames and rewards of each episode; else every method raises
    `ReplayDiffersError`, and `load_state_dict` starts from a state again.

    Args:
        make_segment: makes a segment's environments, on the worker.
        num_envs: N.
        action_names: (A,).
        options: the workers.

    Raises:
        WorkersError: the workers find no place, or an environment cannot be made.
    """

    first_slot = 0

    def __init__(
        self, make_segment: MakeSegment, num_envs: int, action_names: tuple[str, ...], options: WorkerOptions
    ) -> None:
        self.num_envs, self.action_names = num_envs, action_names
        self.segments = segments_of(num_envs, options.num_workers)
        self.episode_returns = np.zeros(num_envs, np.float64)  # (N,)
        self.episode_lengths = np.zeros(num_envs, np.int64)
        self.episode_seeds: list[int] = [0] * num_envs
        self.digests: list[str] = [""] * num_envs
        self.given_up = 0
        self.started = [0] * num_envs
        self._running: list[tuple[int, int]] = []  # seed and steps of the episodes that are shown now
        self._texts: tuple[str, ...] = ()  # that are shown now
        self._faults: list[Any] = []
        self.action_masks: np.ndarray | None = None  # (N, A) bool
        self.memory = Memory(num_envs)
        self._images: Any = None  # (N, H, W, 3) that are shown now
        self._histories = [History(None, ()) for _ in self.segments]
        self._holders: list[Any] = [None] * len(self.segments)  # the actor that has played the history
        self._ended = np.zeros(num_envs, bool)
        self._upcoming: Shown | None = None  # after the new episodes' start
        self._thoughts: tuple[str, ...] | None = None
        self._upcoming_masks: np.ndarray | None = None
        self.supervisor = Supervisor(EnvWorker, (make_segment,), options, len(self.segments))

    def remember(self, frames: int = 0, turns: int = 0) -> None:
        """Keeps so many past frames and turns of each episode; called before `reset`."""
        self.memory = Memory(self.num_envs, frames, turns)

    def reset(self, seeds: Sequence[int] | None = None) -> Shown:
        """Starts an episode in every slot."""
        if seeds is not None:
            raise TrainingError("Workers play the episodes of the run's own seeds: expected no others.")
        self._histories = [History(None, ()) for _ in self.segments]
        return self._observe()

    def reset_done(self, mask: np.ndarray, seeds: Sequence[int] | None = None) -> Shown:
        """Returns the next episodes, which the workers have started with the step that ended the last ones."""
        if seeds is not None or not np.array_equal(mask, self._ended) or self._upcoming is None:
            raise TrainingError("Workers start the next episode in every slot whose episode has ended, and no other.")
        self.action_masks = self._upcoming_masks
        self._images, self._texts = self._upcoming.images, self._upcoming.instructions
        for slot in np.flatnonzero(mask).tolist():
            self.memory.start(slot, self._images[slot])
        return self._upcoming

    def start_round(self, number: int) -> Shown:
        """Starts a new episode in every slot; `number` selects the episodes."""
        self._histories = [History({ROUND: number}, ()) for _ in self.segments]
        return self._observe()

    def expert_actions(self) -> np.ndarray:
        """Returns what the env's scripted expert would do now, (N,)."""

        def submit(actor: Any, segment: int, failures: int) -> Any:
            history = self._histories[segment]
            known = not failures and self._holders[segment] == actor
            self._holders[segment] = actor
            return actor.experts.remote(self.segments[segment], len(history.actions), None if known else history)

        advice: list[Advice] = self._run(submit)
        thoughts = [part.thoughts for part in advice]
        self._thoughts = None if None in thoughts else tuple(text for part in thoughts for text in part or ())
        return np.concatenate([part.actions for part in advice])

    def expert_thoughts(self) -> tuple[str, ...] | None:
        """Returns why the expert would do what `expert_actions` has just returned."""
        return self._thoughts

    def uncounted(self) -> np.ndarray:
        """Returns (N,) False: which episodes are played again is known in the workers alone."""
        return np.zeros(self.num_envs, bool)

    def step(self, actions: np.ndarray) -> "_JoinedStep":
        """Takes one action (N,) in every slot."""
        parts = [actions[first : first + size] for first, size in self.segments]
        snapshot = [len(history.actions) + 1 >= SNAPSHOT_EVERY for history in self._histories]

        def submit(actor: Any, segment: int, failures: int) -> Any:
            history = self._histories[segment]
            known = not failures and self._holders[segment] == actor
            self._holders[segment] = actor
            if self.supervisor.losses[segment] == MAX_FAILURES - 1:  # its replay's worker was lost as well
                first, size = self.segments[segment]
                return actor.begin_anew.remote(
                    self.segments[segment], self.started[first : first + size], self.memory.size
                )
            return actor.step.remote(
                self.segments[segment],
                len(history.actions),
                parts[segment],
                None if known else history,
                snapshot[segment],
            )

        answers: list[Played | Observed] = self._run(submit)
        played = [
            self._given_up(number, part) if isinstance(part, Observed) else part for number, part in enumerate(answers)
        ]
        for segment, part in enumerate(played):
            history = self._histories[segment]
            self._histories[segment] = (
                History(part.state, (), part.digests)
                if part.state is not None
                else History(history.state, (*history.actions, parts[segment]), part.digests)
            )
        whole = _join(played)
        for slot, action in enumerate(actions.tolist()):
            self.memory.step(slot, self._images[slot], action, float(whole.rewards[slot]))
        self._images, self._texts = whole.images, whole.instructions
        self.episode_returns, self.episode_lengths = whole.returns, whole.lengths
        self.episode_seeds = whole.seeds.tolist()
        self.digests = list(whole.digests)
        self._ended = whole.terminated | whole.truncated | whole.failed
        self.started, self._running = list(whole.started), list(whole.running)
        self._faults += whole.faults
        self._upcoming = _Shown(whole.next_images, whole.next_instructions)
        self.action_masks, self._upcoming_masks = whole.masks, whole.next_masks
        return whole

    def take_faults(self) -> list[Any]:
        """Returns the faults that were survived since the last call."""
        taken, self._faults = self._faults, []
        return taken

    def _given_up(self, number: int, begun: Observed) -> Played:
        """The step of a segment that took none: its workers were lost, and its episodes are given up."""
        first, size = self.segments[number]
        slots, none = slice(first, first + size), np.zeros(size, bool)
        # not `episode_seeds`, which are of the last step, and of an episode that may have ended with it
        seeds, taken = zip(*self._running[slots], strict=True)
        lengths = np.array(taken, np.int64)
        returns = np.where(self._ended[slots], 0.0, self.episode_returns[slots])
        why = self.supervisor.last_reason
        faults = [
            ToldFault(slot, seed, int(length) + 1, True, f"slot {slot}, episode seed {seed}: {why}", "")
            for slot, seed, length in zip(range(first, first + size), seeds, lengths, strict=True)
        ]
        return Played(
            self._images[slots],
            self._texts[slots],
            np.zeros(size),
            none,
            none,
            np.zeros(size, np.int8),
            returns,
            lengths + 1,
            np.array(seeds),
            begun.images,
            begun.instructions,
            begun.digests,
            begun.state,
            None if self.action_masks is None else self.action_masks[slots],
            begun.masks,
            ~none,
            begun.started,
            begun.running,
            tuple(faults),
        )

    def state_dict(self) -> State:
        """Returns the state as the local vector env would write it."""

        def submit(actor: Any, segment: int, failures: int) -> Any:
            history = self._histories[segment]
            self._holders[segment] = actor
            return actor.state.remote(self.segments[segment], history)

        states = self._run(submit)
        self._histories = [History(state, ()) for state in states]
        return merge_states(states)

    def load_state_dict(self, state: State) -> Shown | None:
        """Brings every slot back to where it was; episodes that do not replay are started anew."""
        self._histories = [History(part, ()) for part in split_state(state, self.segments)]
        return None if state["slots"] is None else self._observe()

    def close(self) -> None:
        """Ends the workers."""
        self.supervisor.close()

    def _observe(self) -> Shown:
        def submit(actor: Any, segment: int, failures: int) -> Any:
            self._holders[segment] = actor
            return actor.observe.remote(self.segments[segment], self._histories[segment], self.memory.size)

        seen: list[Observed] = self._run(submit)
        for segment, part in enumerate(seen):
            self.given_up += part.given_up
            state = self._histories[segment].state if part.state is None else part.state
            self._histories[segment] = History(state, (), part.digests)
        self.digests = [digest for part in seen for digest in part.digests]
        self.action_masks = _join_masks([part.masks for part in seen])
        self._images = images = np.concatenate([part.images for part in seen])
        for (first, size), part in zip(self.segments, seen, strict=True):
            for slot in range(first, first + size):
                self.memory.start(slot, images[slot])
            self.memory.load(slice(first, first + size), part.past_frames, part.past_turns)
        self.started = [number for part in seen for number in part.started]
        self._running = [now for part in seen for now in part.running]
        self._texts = tuple(text for part in seen for text in part.instructions)
        return _Shown(images, self._texts)

    def _run(self, submit: Submit) -> list[Any]:
        """The results of all segments; ReplayDiffersError where a worker came out elsewhere."""
        results = self.supervisor.run(submit)
        differing = [result.segment for result in results if isinstance(result, Differs)]
        if differing:
            raise ReplayDiffersError(differing)
        return results


class CentralRollouts(RolloutCollector):
    """Rollouts of the learner's policy in the environments of workers."""

    env: RayVectorEnv
    _state: State | None = None

    def collect(self, iteration: int) -> Rollout:
        """Plays the T steps, and keeps the state after them: once an environment is lost nobody can ask it.

        Where a lost environment does not replay, the T steps are played again from where they began, with new episodes
        in the slots that cannot be brought back there either: nothing is learned of steps that nobody took.

        Raises:
            WorkersError: see `Supervisor.finish`, or environments that do not replay were lost again and again.
        """
        given_up = self.env.given_up
        for _ in range(MAX_FAILURES):
            try:
                rollout = super().collect(iteration)
                self._state = self.env.state_dict()
                return rollout
            except ReplayDiffersError:
                self.env.given_up = given_up  # of an attempt that nobody has seen, nothing was lost
                log.warning("a lost environment did not replay: the rollout of iteration %d starts again", iteration)
                if self._state is None:
                    self._shown = None
                else:
                    super().load_state_dict(self._state)
        raise WorkersError(
            f"Workers were lost in {MAX_FAILURES} attempts at one rollout, and their environments do not replay: "
            "repair the environment, or the machine, and go on with --resume."
        )

    def state_dict(self) -> State:
        """Returns where the environments were after the last rollout."""
        return self.env.state_dict() if self._state is None else self._state

    def load_state_dict(self, state: State, tensors: dict[str, torch.Tensor] | None = None) -> None:
        """Brings the environments back to where they were."""
        super().load_state_dict(state, tensors)
        self._state = state

    def metrics(self) -> dict[str, float]:
        """Returns the number of workers replaced so far, and of episodes given up."""
        return {**super().metrics(), "restarts": self.env.supervisor.restarts}


@dataclass(frozen=True)
class _Shown:
    images: Any  # (N, H, W, 3)
    instructions: tuple[str, ...]


class _JoinedStep(Played):
    """A step of all slots, with the name that the learner reads its observations under."""

    @property
    def observations(self) -> _Shown:
        return _Shown(self.images, self.instructions)


def _join(parts: Sequence[Played]) -> _JoinedStep:
    arrays = ("images", "rewards", "terminated", "truncated", "success", "returns", "lengths", "seeds", "failed")
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in arrays}
    upcoming = joined["images"].copy()
    upcoming[joined["terminated"] | joined["truncated"] | joined["failed"]] = np.concatenate(
        [part.next_images for part in parts]
    )
    return _JoinedStep(
        **joined,
        instructions=tuple(text for part in parts for text in part.instructions),
        next_images=upcoming,
        next_instructions=tuple(text for part in parts for text in part.next_instructions),
        digests=tuple(digest for part in parts for digest in part.digests),
        state=None,
        started=tuple(number for part in parts for number in part.started),
        running=tuple(now for part in parts for now in part.running),
        faults=tuple(fault for part in parts for fault in part.faults),
        masks=_join_masks([part.masks for part in parts]),
        next_masks=_join_masks([part.next_masks for part in parts]),
    )


def _join_masks(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    masks = [part for part in parts if part is not None]
    return np.concatenate(masks) if masks else None


def make_rollouts(plan: RolloutPlan) -> CentralRollouts:
    """Returns the backend's rollouts; Ray must be connected."""
    env = RayVectorEnv(
        plan.make_segment, plan.num_envs, plan.policy.spec.action_names, plan.options or WorkerOptions(1)
    )
    return CentralRollouts.from_plan(plan, env)


def call_seconds(calls: int = 200) -> float:
    """Returns the median seconds of a call to a worker that answers at once."""
    import ray

    worker: Any = ray.remote(EnvWorker).options(num_cpus=0.5).remote(None)
    took = []
    for _ in range(calls):
        start = time.perf_counter()
        ray.get(worker.ready.remote())
        took.append(time.perf_counter() - start)
    ray.kill(worker)
    return float(np.median(took))
