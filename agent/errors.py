"""What goes wrong in training, in one sentence: what came, what was expected, what to do."""

from manako.errors import ManakoError


class TrainingError(ManakoError):
    """A fault of a run that its owner can repair: bad settings, a damaged checkpoint, numbers that are not finite."""


class WorkersError(TrainingError):
    """Rollout workers, or the environments in them, are lost for good; what was learned so far can still be saved."""


class NotFiniteError(TrainingError):
    """What the policy computes is no number any more: its last update, or one before, was too large."""


class HeadLostError(WorkersError):
    """Ray's head is gone, and with it every worker."""

    exit_code = 1


class DiskError(TrainingError):
    """The disk takes nothing more, or refuses; what was written before is whole."""

    exit_code = 1
