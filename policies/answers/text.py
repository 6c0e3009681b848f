"""Settings of answers in text; `template` has their form, `illegal` those without an action. Light: no torch."""

from dataclasses import dataclass

from manako.policies.answers.illegal import stands_in
from manako.policies.answers.template import Template
from manako.policies.errors import PolicyError
from manako.spaces import TextCodes

FORMAT = "text"  # of `--action_format`


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

    def check(self, action_names: tuple[str, ...], texts: TextCodes | None = None) -> Template:
        """Returns the template.

        Args:
            action_names: (A,), the list that an answer names one of.
            texts: what can be written where there is no list.

        Raises:
            PolicyError: a setting that does not fit the others or the actions.
        """
        if texts is None:
            stands_in(action_names, self.illegal_action)
        elif self.illegal_action is not None and not texts.text.contains(self.illegal_action):
            raise PolicyError(f"--illegal_action is {self.illegal_action!r}: expected a text in {texts}.")
        template = Template(self.template)
        if self.thought_coef is not None and not template.has_thought:
            raise PolicyError(
                f"thought_coef is {self.thought_coef:g}, but the answer template {template.text!r} has no thought: "
                "expected one with {thought}, or leave thought_coef out."
            )
        return template
