"""What becomes of an answer in text that names no action: its outcome has a name, and no action is made up for it.

    legal         it names one action
    unparsed      it names none, or several
    not allowed   it names one that the environment does not allow now
    cut           it was cut off at its longest length
    refused       the model declined to answer

Only a legal answer is an action. For any other the environment is not stepped, or it is given the action that
`--illegal_action` names for that, since every other action would be one that nobody chose. Light: no torch here.
"""

from collections.abc import Sequence

from manako.policies.errors import PolicyError
from manako.spaces import SKIP

LEGAL, UNPARSED, NOT_ALLOWED, CUT, REFUSED = OUTCOMES = ("legal", "unparsed", "not allowed", "cut", "refused")


def stands_in(names: Sequence[str], stated: str | None) -> int:
    """Returns what the environment is given for an answer that names no action: an action, or `SKIP`.

    Args:
        names: the A actions.
        stated: the name that `--illegal_action` gives; None: it gives none.

    Raises:
        PolicyError: no action is called so.
    """
    if stated is None:
        return SKIP
    if stated not in names:
        raise PolicyError(f"--illegal_action is {stated!r}: expected one of {', '.join(names)}, or leave it out.")
    return list(names).index(stated)
