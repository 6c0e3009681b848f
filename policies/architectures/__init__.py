"""One file or folder an architecture: what its parts are called and how it is read.

To add a row: a file with `name_parts(vlm, processor) -> Model` and a line in `ROWS`. A model without a row is read by
`any_vlm`, which guesses the names.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manako.policies.architectures.model import Model

ROWS = {"manako": "composed.parts", "blip-2": "blip2"}  # a configuration's model_type -> module of this folder


def name_parts(vlm: Any, processor: Any) -> "Model":
    """Names the parts of a vision-language model by its architecture's row.

    Args:
        vlm: a model that `AutoModelForImageTextToText` loads, or a PEFT model around one.
        processor: its processor.

    Returns:
        Both, and what stands where in the model.

    Raises:
        PolicyError: a model whose prompts have no place for an image, or that the row does not read.
    """
    row = ROWS.get(vlm.config.model_type, "any_vlm")  # PEFT hands on the configuration of the model inside
    return import_module(f"manako.policies.architectures.{row}").name_parts(vlm, processor)
