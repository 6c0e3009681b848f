"""The one error of this package: something an environment, or the person who named it, got wrong.

Every message is one sentence that says what came, what was expected and what to do.
"""

from manako.errors import ManakoError


class EnvError(ManakoError):
    """An environment cannot be used as asked, or broke while it ran."""


class EnvBrokeError(EnvError):
    """The environment's own code raised something: it may be chance, and work the next time."""
