"""From stored inputs to where the answer is read: whole prompts, or a prefix that all samples share.

To add one: a subclass of `Reading` in a file here, named by the `Model` of an architecture.
"""

from manako.policies.reading.answer_places import AnswerPlaces
from manako.policies.reading.encoder_decoder import EncoderDecoder
from manako.policies.reading.reading import Read, Reading
from manako.policies.reading.shared_frame import SharedFrame
from manako.policies.reading.shared_prefix import SharedPrefix
from manako.policies.reading.whole_prompt import WholePrompt

__all__ = ["AnswerPlaces", "EncoderDecoder", "Read", "Reading", "SharedFrame", "SharedPrefix", "WholePrompt"]
