"""From stored inputs to where the answer is read: the whole prompt, or a prefix that all samples share."""

from manako.policies.reading.reading import Reading
from manako.policies.reading.shared_prefix import SharedPrefix
from manako.policies.reading.whole_prompt import WholePrompt

__all__ = ["Reading", "SharedPrefix", "WholePrompt"]
