"""What a file of this folder gives."""

from collections.abc import Callable
from typing import Any, NamedTuple


class LanguageModel(NamedTuple):
    """A causal language model and how text is written for it."""

    model: Any  # PreTrainedModel with an LM head
    tokenizer: Any
    chat_template: str  # Jinja, over messages whose content is a list of image and text parts


BuildLanguageModel = Callable[[], LanguageModel]
