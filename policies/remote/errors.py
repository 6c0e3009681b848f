"""What ends a run that asks a server; every answer until then is kept, so the same command goes on."""

from manako.policies.errors import PolicyError


class RemoteError(PolicyError):
    """The server, its answers or the budget stop the run; the message says why and what to do."""
