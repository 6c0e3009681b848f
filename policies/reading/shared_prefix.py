"""A prefix that all prompts share is computed once."""

from manako.policies.reading.reading import Reading


class SharedPrefix(Reading):
    """Keys and values of the shared prefix are computed once and expanded over the batch."""
