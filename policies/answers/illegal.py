"""What becomes of an answer in text that names no action: its outcome has a name, and no action is made up for it.

    legal         it names one action
    unparsed      it names none, or several
    not allowed   it names one that the environment does not allow now
    cut           it was cut off at its longest length
    refused       the model declined to answer

Only a legal answer is an action. For any other the environment is given the action that it has for doing nothing: the
one that `--illegal_action` names, else one that the environment itself calls `noop`, `stay`, `wait` or the like. Where
there is none the run ends with a sentence, since every other action would be one that nobody chose.
"""

import reprlib
from collections.abc import Sequence

from manako.policies.errors import PolicyError

LEGAL, UNPARSED, NOT_ALLOWED, CUT, REFUSED = OUTCOMES = ("legal", "unparsed", "not allowed", "cut", "refused")
DO_NOTHING = ("noop", "no op", "stay", "wait", "nothing", "do nothing", "none", "idle")


def no_op(names: Sequence[str], stated: str | None = None) -> int | None:
    """Returns the action that stands for an answer without one, None where there is none.

    Args:
        names: the A actions.
        stated: the name that `--illegal_action` gives.

    Raises:
        PolicyError: no action is called so.
    """
    if stated is not None:
        if stated not in names:
            raise PolicyError(f"--illegal_action is {stated!r}: expected one of {', '.join(names)}.")
        return list(names).index(stated)
    plain = [name.casefold().replace("-", " ").replace("_", " ").strip() for name in names]
    return next((plain.index(word) for word in DO_NOTHING if word in plain), None)


def in_place_of(outcome: str, answer: str, names: Sequence[str], stands_in: int | None) -> int:
    """Returns the action that the environment is given for an illegal answer.

    Raises:
        PolicyError: it has none for that.
    """
    if stands_in is None:
        raise PolicyError(
            f"An answer names no action ({outcome}: {reprlib.repr(answer)}), and none of {', '.join(names)} stands for "
            "doing nothing: give --illegal_action with the name of the action to take then."
        )
    return stands_in
