"""What runs inside a worker of backend ray-env: environments only. No Ray and no torch here: a plain class."""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from manako.agent.workers.segments import ROUND, Advice, Differs, History, Observed, Played, Segment, State
from manako.errors import ManakoError

if TYPE_CHECKING:
    from manako.agent.interfaces import Shown, VectorEnv

MakeSegment = Callable[[int, int], "VectorEnv"]  # (first slot, number of slots) -> environments that were not started
# A library that starts threads which wait in a loop, or that answers signals, must not do so in a worker.
WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "SDL_NO_SIGNAL_HANDLERS": "1", "SDL_VIDEODRIVER": "dummy"}


class SegmentNotHere(LookupError):
    """This worker does not hold the segment at that position: it must be given the history."""


class _Held:
    """A segment that this worker keeps.

    Attributes:
        differs: whether it is elsewhere than the history says, since an episode did not replay.
    """

    def __init__(self, env: "VectorEnv", history: History, past: tuple[int, int]) -> None:
        self.env, self.position = env, 0
        if any(past):
            env.remember(*past)
        state, observations = history.state, None
        if state is not None and ROUND in state:
            observations = env.start_round(state[ROUND])
        elif state is not None:
            observations = env.load_state_dict(state)
        self.observations: Shown = env.reset() if observations is None else observations
        try:
            for actions in history.actions:
                self.step(actions)
        except ManakoError:  # what could be done there cannot be done here
            self.differs = True
        else:
            self.differs = env.given_up > 0 or history.digests not in (None, tuple(env.digests))

    def step(self, actions: np.ndarray) -> Any:
        """Steps and starts new episodes; returns the result, and returns, lengths, seeds and masks of its episodes."""
        result = self.env.step(actions)
        returns, lengths = self.env.episode_returns, self.env.episode_lengths
        seeds, masks = np.array(self.env.episode_seeds), self.env.action_masks
        ended = result.terminated | result.truncated | result.failed
        self.observations = self.env.reset_done(ended) if ended.any() else result.observations
        self.position += 1
        return result, returns, lengths, seeds, masks


class EnvWorker:
    """Environments of one or more segments, stepped with the learner's actions.

    Args:
        make_segment: makes a segment's environments.
    """

    def __init__(self, make_segment: MakeSegment) -> None:
        for name, value in WORKER_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        self.make_segment = make_segment
        self.held: dict[Segment, _Held] = {}

    def ready(self) -> dict[str, Any]:
        """Returns the worker's process id, once it runs."""
        return {"pid": os.getpid()}

    def observe(self, segment: Segment, history: History, past: tuple[int, int] = (0, 0)) -> Observed:
        """Takes the segment over from a history without actions; episodes that do not replay are started anew.

        Args:
            segment: which.
            history: how it got where it is.
            past: how many frames and turns before the present ones are told.
        """
        held = self._take(segment, history, past)
        given_up = held.env.given_up if held.differs else 0
        return Observed(
            held.observations.images,
            tuple(held.observations.instructions),
            tuple(held.env.digests),
            given_up,
            held.env.state_dict() if given_up else None,
            held.env.memory.past_frames() if past[0] else None,
            held.env.memory.turns.copy(),
            held.env.action_masks,
            tuple(held.env.started),
            _running(held.env),
        )

    def step(
        self, segment: Segment, position: int, actions: np.ndarray, history: History | None, want_state: bool
    ) -> Played | Differs:
        """Takes one step of a segment.

        Args:
            segment: which.
            position: steps since its history's state.
            actions: (n,).
            history: for a worker that does not hold the segment.
            want_state: return the state after the step, and count positions from there.

        Returns:
            The step, or that the history did not replay.

        Raises:
            SegmentNotHere: the worker does not hold the segment at this position, and no history came.
        """
        held = self._at(segment, position, history)
        if held is None:
            return Differs(segment)
        try:
            result, returns, lengths, seeds, masks = held.step(actions)
            # what broke once may not break again: nothing that led here is to be played again
            want_state = want_state or bool(result.failed.any())
            state = held.env.state_dict() if want_state else None
        except BaseException:
            self._drop(segment)
            raise
        if want_state:
            held.position = 0
        ended = result.terminated | result.truncated | result.failed
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
            tuple(held.env.digests),
            state,
            masks,
            held.env.action_masks,
            result.failed,
            tuple(held.env.started),
            _running(held.env),
            tuple(held.env.take_faults()),
        )

    def begin_anew(self, segment: Segment, started: Sequence[int], past: tuple[int, int] = (0, 0)) -> Observed:
        """Gives the segment's episodes up, which have been lost again and again, and starts the next ones.

        Args:
            segment: which.
            started: how many episodes each slot has started.
            past: as of `observe`.
        """
        self._drop(segment)
        with contextlib.closing(self.make_segment(*segment)) as fresh:
            state = {**fresh.state_dict(), "episodes": list(started)}
        observed = self.observe(segment, History(state, ()), past)
        return observed._replace(state=self.held[segment].env.state_dict())

    def experts(self, segment: Segment, position: int, history: History | None) -> Advice | Differs:
        """Returns what the env's expert would do now, and why; arguments and errors as of `step`."""
        held = self._at(segment, position, history)
        return Differs(segment) if held is None else Advice(held.env.expert_actions(), held.env.expert_thoughts())

    def state(self, segment: Segment, history: History) -> State | Differs:
        """Returns the segment's state, from which positions are counted now.

        The history is for a worker that does not hold the segment at its end; it may not replay.
        """
        is_here = segment in self.held and self.held[segment].position == len(history.actions)
        held = self._at(segment, len(history.actions), None if is_here else history)
        if held is None:
            return Differs(segment)
        held.position = 0
        return held.env.state_dict()

    def _at(self, segment: Segment, position: int, history: History | None) -> _Held | None:
        """The segment at this position, taken over from its history where one came; SegmentNotHere without either.

        None where the history did not replay.
        """
        if history is not None:
            taken = self._take(segment, history)
            if taken.differs:
                self._drop(segment)
                return None
            return taken
        held = self.held.get(segment)
        if held is None or held.position != position:
            raise SegmentNotHere(f"{segment} is not here at step {position}")
        return held

    def _take(self, segment: Segment, history: History, past: tuple[int, int] = (0, 0)) -> _Held:
        if segment in self.held and history.state is not None and ROUND in history.state:
            env = self.held.pop(segment).env  # a new round needs nothing of the last one
        else:
            self._drop(segment)
            env = self.make_segment(*segment)
        held = self.held[segment] = _Held(env, history, past)
        return held

    def _drop(self, segment: Segment) -> None:
        if segment in self.held:
            with contextlib.suppress(Exception):  # it may be broken
                self.held.pop(segment).env.close()


def _running(env: "VectorEnv") -> tuple[tuple[int, int], ...]:
    """The seed of each slot's episode, and how many steps it has taken."""
    return tuple(zip(env.episode_seeds, env.episode_lengths.tolist(), strict=True))
