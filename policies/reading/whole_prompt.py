"""Whole prompts by the model's own forward."""

from manako.policies.reading.reading import Reading


class WholePrompt(Reading):
    """The model's own forward over whole prompts."""
