"""What a file of this folder gives: a model that names its parts, so that nobody has to guess them."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from peft import PeftModel
from torch import Tensor

from manako.policies.architectures.pretraining import MakePretraining
from manako.policies.reading.reading import Reading

# the model's inputs of whole prompts -> positions of their tokens, (..., B, L), as its decoder takes them
Positions = Callable[[Any, Mapping[str, Tensor]], Tensor]
# the plain model, pixels (B, 3, h, w) -> its encoder's features (B, P, Dv), which its forward takes as image_features
See = Callable[[Any, Tensor], Tensor]


class Model(NamedTuple):
    """A vision-language model and what stands where in it.

    Names are full names in `named_modules()` or `named_parameters()` of the plain model, without PEFT's wrapper.
    """

    vlm: Any  # PreTrainedModel, or a PEFT model around one
    processor: Any  # ProcessorMixin
    encoder: str | None  # the vision encoder's module; None: not known
    adapter: tuple[str, ...]  # what stands between encoder and decoder: modules and bare parameters; (): not known
    decoder: str | None  # the language model's module, where LoRA goes; None: not known
    placeholder: str | None  # what stands for the image in a prompt's text; None: the processor puts the image in
    placeholder_id: int | None  # the token that visual tokens replace; None: none is replaced
    reading: type[Reading]  # how stored inputs become the hidden state at which the answer is read
    answer_start: tuple[
        int, ...
    ] = ()  # what an encoder-decoder's decoder begins with; (): the answer follows the prompt
    # what the processor would say of an answer's tokens, by input, where that is not what it says of the prompt's last
    answer_inputs: Mapping[str, int] = {}
    by_place: tuple[str, ...] = ()  # inputs of tokens that are looked up by a token's place in the whole prompt
    positions: Positions | None = None  # None: the model counts its tokens
    image_counts: bool = True  # False: a new one may be blind at first, such as behind an adapter that starts at 0
    encoder_learns_alone: bool = False  # True: in a stage of its own, `trainable: encoder`, and stays frozen else
    predicts_frames: bool = False  # True: it can say the next frame's codes, see `vision_tokens.next_frame`
    one_token_answers: bool = False  # True: it answers at a mask, so it spells nothing, and is trained on no text
    one_image: bool = False  # True: it reads one image a prompt, or does not see the order of several
    see: See | None = None  # None: its forward takes pixels alone
    pretraining: Mapping[str, MakePretraining] = {}  # by stage of run_sft.py: represent, align
    replaced: tuple[str, ...] = ()  # parts that are new, in a model whose other parts were trained with others
    nests_images: bool | None = None  # whether the processor takes a list of images for each text; None: either

    @property
    def base_vlm(self) -> Any:
        """The plain model, without PEFT's wrapper."""
        return plain(self.vlm)


def plain(vlm: Any) -> Any:
    """Returns the model without PEFT's wrapper."""
    return vlm.get_base_model() if isinstance(vlm, PeftModel) else vlm
