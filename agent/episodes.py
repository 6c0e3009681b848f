"""Which episodes an iteration's success rate and return are of: those that began first, and not those that ended first.

Short episodes end first. Where half of the episodes end after 2 steps in success and half after 40 in failure, the
first rollouts of 16 steps see successes alone. So an episode is counted in the order of its start: once it and all that
began before it, or with it, in any slot, have ended. Nothing is counted before the first episodes of all slots have
ended, and each ended episode is counted once. An episode that has been running for more than `LONGEST` steps no longer
holds the others back.

An episode that an environment's fault has cut off is in no number: `episodes_failed` of the metrics counts these.

Where every rollout starts new episodes in all slots, those that the rollout cuts off are never played to their end:
counted are those that began before all of these.

An environment may speak of success only where there is one: from the first episode on of which it says nothing, none is
counted as judged.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from manako.agent.rollout import Episode, Rollout, success_rate

LONGEST = 5_000  # steps


class EpisodeCount:
    """Counts the episodes of consecutive rollouts of the same slots in the order of their starts.

    Args:
        rounds: every rollout starts new episodes in all slots.
    """

    def __init__(self, rounds: bool) -> None:
        self.rounds = rounds
        self._now = 0  # steps of a slot before the next rollout
        self._begun: list[int] = []  # at which step each slot's current episode began
        self._silent = False  # an episode ended without a word on its success
        self._waiting: list[tuple[int, Episode]] = []  # ended, after the step at which each began

    def take(self, rollout: Rollout) -> list[Episode]:
        """Returns the episodes that are counted now, in the order in which they ended.

        Args:
            rollout: the next one.
        """
        if self.rounds or not self._begun:
            self._now, self._waiting, self._begun = 0, [], [0] * rollout.rewards.shape[1]
        for episode in rollout.episodes:
            end = self._now + episode.step + 1
            self._waiting.append((end - episode.length, episode))
            self._begun[episode.slot] = end
            self._silent |= episode.success is None
        if rollout.failed is not None:  # lost episodes end without being counted, and hold nobody back
            for step, slot in rollout.failed.nonzero().tolist():
                self._begun[slot] = max(self._begun[slot], self._now + step + 1)
        self._now += len(rollout.rewards)
        first = min((step for step in self._begun if self._now - step <= LONGEST), default=self._now)
        counted = [episode for step, episode in self._waiting if step < first]
        self._waiting = [(step, episode) for step, episode in self._waiting if step >= first]
        return [replace(episode, success=None) for episode in counted] if self._silent else counted

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs, as JSON."""
        waiting = [(step, *vars(episode).values()) for step, episode in self._waiting]
        return {"now": self._now, "begun": list(self._begun), "waiting": waiting, "silent": self._silent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on with what `state_dict` returned."""
        self._now, self._begun = state["now"], list(state["begun"])
        self._waiting = [(step, Episode(*values)) for step, *values in state["waiting"]]
        self._silent = state.get("silent", False)


def means(episodes: Sequence[Episode]) -> dict[str, float | None]:
    """Returns number, success, return and length of episodes; None where there are none."""

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    return {
        "episodes": len(episodes),
        "success_rate": success_rate([episode.success for episode in episodes]),
        "episode_return": mean([episode.episode_return for episode in episodes]),
        "episode_length": mean([episode.length for episode in episodes]),
    }
