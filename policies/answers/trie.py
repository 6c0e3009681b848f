"""`trie`: names of several tokens, renormalised at each node of the token trie."""

from collections.abc import Sequence

from manako.policies.answers.kind import AnswerKind


class Trie(AnswerKind):
    """The names themselves, of any number of tokens."""

    one_token = False

    def answers(self, names: Sequence[str]) -> tuple[str, ...]:
        """Returns the names."""
        return tuple(names)
