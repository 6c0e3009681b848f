"""`choice`: the prompt lists the names as labelled choices, and the label is the one token."""

from collections.abc import Sequence

from manako.policies.answers.kind import AnswerKind

LABELS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


class Choice(AnswerKind):
    """Labels: `A: move up, B: move down`."""

    def answers(self, names: Sequence[str]) -> tuple[str, ...]:
        """Returns a letter for each of the first 52 names."""
        return tuple(LABELS[: len(names)])

    def legend(self, names: Sequence[str]) -> str:
        """Returns each label with its name."""
        return ", ".join(f"{label}: {name}" for label, name in zip(LABELS, names, strict=False))
