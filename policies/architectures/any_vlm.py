"""Whatever `AutoModelForImageTextToText` loads and has no row of its own: here, and only here, names are guessed.

The encoder is the first module with "vision" or "visual" in its name, the adapter is what families of VLMs call it.
A guess that finds nothing leaves the part unnamed; `trainable: full` needs no names.
"""

from typing import Any

from torch import nn

from manako.policies.architectures.model import Model, plain
from manako.policies.errors import PolicyError
from manako.policies.reading import SharedPrefix

# Where families of VLMs keep the module between encoder and language model.
ADAPTER_NAMES = ("adapter", "multi_modal_projector", "connector", "modality_projection", "aligner", "mlp1", "merger")
ENCODER_NAMES = ("vision", "visual")  # in a part of the name


def name_parts(vlm: Any, processor: Any) -> Model:
    """Guesses the parts; see `manako.policies.architectures.name_parts`."""
    base = plain(vlm)
    placeholder, placeholder_id = find_placeholder(processor, base)
    adapter = find_adapter(base)
    return Model(
        vlm=vlm,
        processor=processor,
        encoder=find_encoder(base, adapter),
        adapter=adapter,
        decoder=find_decoder(base),
        placeholder=placeholder,
        placeholder_id=placeholder_id,
        reading=SharedPrefix,
    )


def find_placeholder(processor: Any, vlm: Any) -> tuple[str, int]:
    """Returns what the processor expects in a text for an image, and the id that the model replaces by visual tokens.

    Raises:
        PolicyError: one of them is not named.
    """
    token = getattr(processor, "image_token", None)
    token_id = getattr(vlm.config, "image_token_id", None)
    if token_id is None:
        token_id = getattr(vlm.config, "image_token_index", None)
    if not isinstance(token, str) or token_id is None:
        raise PolicyError(
            f"The processor {type(processor).__name__} or the model {type(vlm).__name__} names no image token: "
            "expected a vision-language model whose processor has `image_token`."
        )
    return token, int(token_id)


def find_adapter(vlm: nn.Module) -> tuple[str, ...]:
    """Returns the full names of the modules that are called like the first one with a known name; () where none is."""
    names = [name for name, _ in vlm.named_modules()]
    called = next((last for last in map(_last, names) if last in ADAPTER_NAMES), None)
    return tuple(name for name in names if _last(name) == called and called not in name.split(".")[:-1])


def find_encoder(vlm: nn.Module, adapter: tuple[str, ...] = ()) -> str | None:
    """Returns the full name of the first module outside the adapter whose name says that it sees, or None."""
    for name, module in vlm.named_modules():
        sees = any(word in piece for piece in name.split(".") for word in ENCODER_NAMES)
        of_adapter = any(name == part or name.startswith(f"{part}.") for part in adapter)
        if sees and not of_adapter and next(module.parameters(), None) is not None:
            return name
    return None


def find_decoder(vlm: Any) -> str | None:
    """Returns the full name of the module that the model calls its decoder; None where it has none of its own."""
    decoder = vlm.get_decoder()
    return next((name for name, module in vlm.named_modules() if name and module is decoder), None)


def _last(name: str) -> str:
    return name.split(".")[-1]
