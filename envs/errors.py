"""The one error of this package: something an environment, or the person who named it, got wrong.

Every message is one sentence that says what came, what was expected and what to do.
"""


class EnvError(ValueError):
    """An environment cannot be used as asked, or broke while it ran."""


def in_one_line(error: BaseException) -> str:
    """The type and the text of somebody else's error, without its line breaks."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
