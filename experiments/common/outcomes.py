"""How episodes' outcomes are said: success where somebody says what one is, else the mean return."""

from collections.abc import Mapping, Sequence
from typing import Any

from manako.agent.report.statistics import bootstrap_interval
from manako.agent.rollout import success_rate

RANDOM_IS_GOOD = 0.95  # from this success of a random policy on, success says nothing of a policy


def outcome_in_words(success: Sequence[bool | None], returns: Sequence[float]) -> str:
    """Returns the share of successes, or the mean return with its 95 % bootstrap interval where not all were judged."""
    rate = success_rate(success)
    if rate is not None:
        return f"success {rate:.1%}"
    low, high = bootstrap_interval(returns)
    return f"mean return {sum(returns) / len(returns):.2f} [{low:.2f}, {high:.2f}]"


def measure_of(summary: Mapping[Any, Mapping[str, Any]]) -> str:
    """Returns `success` where all episodes of all rows were judged, else `return`."""
    return "return" if any(row["success"] is None for row in summary.values()) else "success"


def warnings_of(summary: Mapping[Any, Mapping[str, Any]]) -> list[str]:
    """Returns what a reader of an evaluation must know: which measure it is, and where that measure tells nothing.

    Args:
        summary: name -> `Evaluation.summary`, among them perhaps `random`.
    """
    said, measure = [], measure_of(summary)
    if lost := {name: row["failed"] for name, row in summary.items() if row.get("failed")}:
        rows = ", ".join(f"{count} of {summary[name]['episodes']} of {name}" for name, count in lost.items())
        said.append(
            f"warning: the environment broke, and these episodes could not be played to their end: {rows}; they count "
            "as no success, and are in no return and length"
        )
    if measure == "return":
        judged = sum(row["judged"] for row in summary.values())
        episodes = sum(row["episodes"] for row in summary.values())
        some = f"the environment says it of {judged:,} of {episodes:,} episodes only" if judged else "nobody says it"
        said.append(f"no success: {some}, so the measure is the return; --success_return says what a success is")
    random = summary.get("random")
    if random is not None and measure == "success" and random["success"] >= RANDOM_IS_GOOD:
        said.append(
            f"this measure tells nothing here: random actions succeed in {random['success']:.1%} of the episodes; "
            "--success_return asks for more"
        )
    elif len(summary) > 1 and _all_overlap([row[f"{measure}_ci95"] for row in summary.values()]):
        episodes = min(row["episodes"] for row in summary.values())
        said.append(
            f"this measure tells nothing here: the {measure} of all rows agrees within their intervals, of "
            f"{episodes:,} episodes; more may tell them apart"
        )
    return said


def _all_overlap(intervals: Sequence[Sequence[float]]) -> bool:
    """Whether all intervals have a point in common."""
    return max(low for low, _ in intervals) <= min(high for _, high in intervals)
