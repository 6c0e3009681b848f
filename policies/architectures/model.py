"""What a file of this folder gives: a model that names its parts, so that nobody has to guess them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from manako.policies.reading.reading import Reading

Render = Callable[[str, str], str]  # system text, instruction -> the prompt's text


def no_extra_inputs(input_ids: Tensor) -> dict[str, Tensor]:
    """Returns nothing: token ids, attention mask and what the image processor makes are all that the model takes."""
    return {}


class Model(NamedTuple):
    """A vision-language model and what stands where in it.

    Module names are full names in `vlm.named_modules()`, of the plain model without PEFT's wrapper.
    """

    vlm: Any  # PreTrainedModel, or a PEFT model around one
    processor: Any  # ProcessorMixin
    encoder: str  # the vision encoder's module
    adapter: str | None  # the module between encoder and decoder
    decoder: str  # the language model's module: where LoRA goes
    placeholder: str  # what stands for the image in a prompt's text
    placeholder_id: int  # the token that visual tokens replace
    reading: type[Reading]  # how stored inputs become the hidden state at which the answer is read
    render: Render | None = None  # None: the processor's chat template, else plain text around the placeholder
    extra_inputs: Callable[[Tensor], dict[str, Tensor]] = no_extra_inputs  # (B, L) ids -> further inputs of the model
