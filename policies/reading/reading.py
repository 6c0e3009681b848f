"""What every way of reading does."""

from abc import ABC


class Reading(ABC):
    """Runs the model over stored inputs to where the answer is read."""
