"""Settings of answers in text, and the names of what becomes of them. Light: no torch here.

An answer that names no action is never made into one: the environment is not stepped, or gets the action that is
stated for that (`illegal_action`), and what is stated is paid (`illegal_penalty`).
"""

from dataclasses import dataclass

from manako.policies.answers.template import Template
from manako.policies.errors import PolicyError

FORMAT = "text"  # of `--action_format`
LEGAL, UNPARSED, NOT_ALLOWED, CUT = OUTCOMES = ("legal", "unparsed", "not allowed", "cut")
SKIP = -1  # in place of an action: the environment is not stepped


@dataclass(frozen=True)
class TextAnswers:
    """How answers are written, sampled and paid.

    Args:
        template: see `Template`.
        longest: most tokens of an answer, its end among them; what is not ended then is cut.
        constrained: behind the template's cue nothing but what goes on to an allowed action can be sampled.
        thought_coef: RL4VLM's lambda: one ratio a step, of lambda x thought + action; None: one ratio a token.
        illegal_action: name of the action for answers that name none; None: the environment is not stepped.
        illegal_penalty: taken off the reward that is learned from, for each such answer.
        temperature: logits are divided by it, in acting and in learning.
    """

    template: str = "json"
    longest: int = 64
    constrained: bool = False
    thought_coef: float | None = None
    illegal_action: str | None = None
    illegal_penalty: float = 0.1
    temperature: float = 1.0

    def check(self, action_names: tuple[str, ...]) -> Template:
        """Returns the template.

        Raises:
            PolicyError: a setting that does not fit the others or the actions.
        """
        if self.illegal_action is not None and self.illegal_action not in action_names:
            raise PolicyError(
                f"illegal_action is {self.illegal_action!r}: expected one of {', '.join(action_names)}, or none."
            )
        template = Template(self.template)
        if self.thought_coef is not None and not template.has_thought:
            raise PolicyError(
                f"thought_coef is {self.thought_coef:g}, but the answer template {template.text!r} has no thought: "
                "expected one with {thought}, or leave thought_coef out."
            )
        return template
