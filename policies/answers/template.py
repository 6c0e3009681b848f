"""Think, then act: how an answer in text is written and read, as a template says.

    json   {"thoughts": "{thought}", "action": "{action}"}       as in RL4VLM (arXiv:2405.10292)
    tags   <think>{thought}</think><action>{action}</action>     as in VAGEN (arXiv:2510.16907)
    plain  {action}                                              no thought

Any other text with the one field `{action}`, and `{thought}` before it or not at all, is a template too. It is read
strictly: what stands around the fields has to be there, white space at both ends aside. No action is made up for an
answer that names none.
"""

from collections.abc import Sequence
from typing import NamedTuple

from manako.policies.errors import PolicyError

THOUGHT, ACTION = "{thought}", "{action}"
TEMPLATES = {
    "json": '{"thoughts": "{thought}", "action": "{action}"}',
    "tags": "<think>{thought}</think><action>{action}</action>",
    "plain": ACTION,
}


class Parsed(NamedTuple):
    """The fields of an answer."""

    thought: str
    action: str


class Template:
    """A form of answers.

    Args:
        form: a key of `TEMPLATES`, or the text of a template.

    Raises:
        PolicyError: it has no action, a field twice, a thought behind the action, or nothing between the two.

    Attributes:
        text: with its fields.
        before: what stands before the thought; "" without one.
        cue: what stands before the action, behind the thought where there is one.
        after: what stands behind the action.
        has_thought: whether there is a thought.
    """

    def __init__(self, form: str) -> None:
        self.text = TEMPLATES.get(form, form)
        thoughts, actions = self.text.count(THOUGHT), self.text.count(ACTION)
        head, _, self.after = self.text.partition(ACTION)
        self.has_thought = thoughts == 1
        before, _, cue = head.rpartition(THOUGHT)
        self.before, self.cue = (before, cue) if self.has_thought else ("", head)
        if actions != 1 or thoughts > 1 or THOUGHT in self.after or (self.has_thought and not self.cue.strip()):
            raise PolicyError(
                f"The answer template {form!r} came: expected one of {', '.join(TEMPLATES)}, or a text with {ACTION} "
                f"once, {THOUGHT} at most once before it, and something between the two."
            )

    @property
    def form(self) -> str:
        """How a prompt shows it."""
        return self.text.replace(THOUGHT, "...").replace(ACTION, "...")

    def write(self, action: str, thought: str = "") -> str:
        """Returns an answer.

        Raises:
            PolicyError: the thought holds what stands behind it, so it would be read as another.
        """
        if self.has_thought and self.cue in thought + self.cue[:-1]:
            raise PolicyError(
                f"The thought {thought[:200]!r} holds {self.cue!r}, which ends a thought in the answer template "
                f"{self.text!r}: expected another thought, or another template."
            )
        return self.text.replace(THOUGHT, thought).replace(ACTION, action)

    def parse(self, answer: str, exact: bool = False) -> Parsed | None:
        """Returns the fields of an answer; None where it does not have this form.

        Args:
            answer: what was written.
            exact: white space at both ends belongs to the answer, as where an action is any text.
        """
        before, cue, after = self.before, self.cue, self.after
        if not exact:
            answer, before, after = answer.strip(), before.lstrip(), after.rstrip()
            cue = cue if self.has_thought else cue.lstrip()
        if not answer.startswith(before) or not answer.endswith(after):
            return None
        inner = answer[len(before) : len(answer) - len(after)]
        thought, found, action = inner.partition(cue) if cue else ("", "", inner)
        if (cue and not found) or (thought and not self.has_thought) or len(answer) < len(before) + len(after):
            return None
        return Parsed(thought, action)

    def action_part(self, answer: str) -> int | None:
        """Returns the place in the answer behind the cue, where the action begins; None while there is no cue yet."""
        start = answer.find(self.before) + len(self.before) if self.before in answer else 0
        place = answer.find(self.cue, start)
        return None if place < 0 else place + len(self.cue)


def action_named(text: str, names: Sequence[str]) -> int | None:
    """Returns the action that a text names, white space around it aside, and its case where one alone is left."""
    text = text.strip()
    if text in names:
        return list(names).index(text)
    folded = [name.casefold() for name in names]
    return folded.index(text.casefold()) if folded.count(text.casefold()) == 1 else None
