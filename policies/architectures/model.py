"""What a file of this folder gives: a model that names its parts, so that nobody has to guess them."""

from collections.abc import Callable
from typing import Any, NamedTuple

from peft import PeftModel
from torch import Tensor

from manako.policies.reading.reading import Reading

Render = Callable[[str, str], str]  # system text, instruction -> the prompt's text


def no_extra_inputs(input_ids: Tensor) -> dict[str, Tensor]:
    """Returns nothing: token ids, attention mask and what the image processor makes are all that the model takes."""
    return {}


def last_of_outputs(outputs: Any) -> Tensor:
    """Returns the last hidden states (B, L, D) from where most models put them."""
    return outputs.hidden_states[-1]


class Model(NamedTuple):
    """A vision-language model and what stands where in it.

    Names are full names in `named_modules()` or `named_parameters()` of the plain model, without PEFT's wrapper.
    """

    vlm: Any  # PreTrainedModel, or a PEFT model around one
    processor: Any  # ProcessorMixin
    encoder: str | None  # the vision encoder's module; None: not known
    adapter: tuple[str, ...]  # what stands between encoder and decoder: modules and bare parameters; (): not known
    decoder: str | None  # the language model's module, where LoRA goes; None: not known
    placeholder: str  # what stands for the image in a prompt's text
    placeholder_id: int  # the token that visual tokens replace
    reading: type[Reading]  # how stored inputs become the hidden state at which the answer is read
    render: Render | None = None  # None: the processor's chat template, else plain text around the placeholder
    extra_inputs: Callable[[Tensor], dict[str, Tensor]] = no_extra_inputs  # (B, L) ids -> further inputs of the model
    last_hidden: Callable[[Any], Tensor] = last_of_outputs  # outputs -> the decoder's last ones, (B, L, D)

    @property
    def base_vlm(self) -> Any:
        """The plain model, without PEFT's wrapper."""
        return plain(self.vlm)


def plain(vlm: Any) -> Any:
    """Returns the model without PEFT's wrapper."""
    return vlm.get_base_model() if isinstance(vlm, PeftModel) else vlm
