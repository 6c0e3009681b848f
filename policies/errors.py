"""The one error that a policy raises for input it cannot work with; the runners print it and exit with code 2."""

from manako.errors import ManakoError


class PolicyError(ManakoError):
    """A model folder, preset, prompt or action name cannot be used; the message says why and what to do."""
