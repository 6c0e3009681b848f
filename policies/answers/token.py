"""`token`: each name is one token, its probability read off that row of the LM head."""

from collections.abc import Sequence

from manako.policies.answers.kind import AnswerKind


class Token(AnswerKind):
    """The names themselves, one token each: `up, down`."""

    def answers(self, names: Sequence[str]) -> tuple[str, ...]:
        """Returns the names."""
        return tuple(names)
