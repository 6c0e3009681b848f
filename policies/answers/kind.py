"""What a kind of answer says: how the A actions are spelled, and how the prompt lists them. Light: no torch here."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar


class AnswerKind(ABC):
    """One way of saying a closed set of actions: a file of this folder, named in the table of `answers/__init__.py`.

    Attributes:
        one_token: whether each answer must be a single token of the language model.
    """

    one_token: ClassVar[bool] = True

    def of_tokenizer(self, tokenizer: Any) -> "AnswerKind":
        """Returns the kind as this tokenizer can say it: itself, unless it has tokens of its own for actions."""
        return self

    def problem(self, names: Sequence[str]) -> str | None:
        """Returns why such names cannot be said in this kind, whatever the tokenizer makes of them; None: they can."""
        return None

    @abstractmethod
    def answers(self, names: Sequence[str]) -> tuple[str, ...]:
        """Returns for each of the A action names the text that the policy emits; fewer where it runs out of them."""

    def legend(self, names: Sequence[str]) -> str:
        """Returns how the prompt lists the actions."""
        return ", ".join(names)
