"""Models and processors by transformers' Auto classes: any folder or Hub id of a vision-language model.

A processor with a video part wants torchvision, of which no CPU build is on PyPI; the video part is left out then, and
image processor and tokenizer do what they do in the whole one. Everything that can be wrong with a folder ends in one
sentence here, before weights are read where that is possible. No name that is a path is ever asked of the Hub.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import cached_file

from manako.bounded import json_object, read_text
from manako.errors import first_line
from manako.policies.architectures import OWN, ROWS, name_parts
from manako.policies.architectures.model import Model
from manako.policies.architectures.presets import PRESETS
from manako.policies.errors import PolicyError
from manako.policies.pretrained import NOT_QUANTIZED, check_complete, check_found, check_holds, quietly, refusal
from manako.policies.room import check_room

PLACES = f"expected a preset ({', '.join(PRESETS)}), a model folder or a Hub id"
ONE_MODEL = "expected the files of one model; copy or download the folder again"
PROCESSOR_FILES = (  # names of which a folder has one, and the usual one
    (r"(pre)?processor_config\.json", "preprocessor_config.json"),
    (r"tokenizer_config\.json|tekken\.json", "tokenizer_config.json"),
    (r"tokenizer\.json|vocab\..*|.*\.model|.*\.tiktoken|tekken\.json", "tokenizer.json"),
)
for package in OWN.values():  # they make themselves known to the Auto classes
    importlib.import_module(f"manako.policies.architectures.{package}")
FURTHER_ROWS = 8  # Mllama's image token lies beyond the vocabulary that its configuration names


def load_library_model(name: str, dtype: torch.dtype) -> Model:
    """Loads a vision-language model and its processor, and names its parts.

    Args:
        name: a folder or a Hub id.
        dtype: of the weights.

    Raises:
        PolicyError: there is no such model, or it cannot serve as a policy.
    """
    config = load_config(name)
    processor = load_processor(name, config)
    check_processor(name, processor, config)
    check_room(name, config, dtype)
    check_holds(name, r"(pytorch_)?model.*\.(safetensors|bin)", "model.safetensors")
    check_tokens(name, processor, config)
    try:
        with quietly():
            vlm, loading = AutoModelForImageTextToText.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                trust_remote_code=False,
            )
    except Exception as error:  # whatever a model's code says to a configuration and weights that do not fit
        raise refusal(
            f"The model of {name!r}",
            error,
            f"The weights of {name!r} do not make a {config.model_type} ({{error}}): expected config.json and weights "
            "of one model; copy or download the folder again.",
        ) from error
    check_complete(name, loading, vlm.state_dict())
    if vlm.get_output_embeddings() is None:
        raise PolicyError(
            f"{name!r} is a {type(vlm).__name__}, which does not go on from a prompt (it has no output embeddings): "
            "expected a model that answers a prompt with an image, use another one."
        )
    try:
        return name_parts(vlm.eval(), processor)
    except (AttributeError, KeyError, TypeError) as error:  # another processor than its architecture's
        raise PolicyError(
            f"{type(vlm).__name__} does not know the processor in {name!r}, a {type(processor).__name__} "
            f"({first_line(error)}): {ONE_MODEL}."
        ) from error


def load_config(name: str) -> Any:
    """Returns the configuration of a vision-language model.

    Raises:
        PolicyError: there is none, or it is of another kind of model.
    """
    check_found(name, "vision-language model", PLACES)
    try:
        with quietly():
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # whatever a configuration's class says to its values
        sentence = f"No vision-language model at {name!r}: {PLACES} ({{error}})."
        raise refusal(f"The model of {name!r}", error, sentence) from error
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and config.model_type not in OWN:
        raise PolicyError(
            f"{name!r} is a {config.model_type}, which transformers does not know as a vision-language model: {PLACES} "
            "of a model that takes images and text; a language model alone goes into --language_model, an encoder "
            "alone into --vision_encoder."
        )
    if getattr(config, "quantization_config", None):
        raise PolicyError(f"config.json in {name!r} has a quantization_config: {NOT_QUANTIZED}.")
    return config


def load_processor(name: str, config: Any) -> Any:
    """Returns the processor of a model; without its video part where torchvision is not there.

    Raises:
        PolicyError: there is none for images and text, or it needs a package.
    """
    for pattern, file in PROCESSOR_FILES:
        check_holds(name, pattern, file)
    if Path(name).is_dir() and "image_processor" not in (read_json(name, "processor_config.json") or {}):
        check_holds(name, r"preprocessor_config\.json", "preprocessor_config.json")
    try:
        with quietly():
            try:
                processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
            except (ImportError, OSError) as error:
                processor = load_without_video(name, config, error)
    except Exception as error:  # whatever tokenizers and processors say to their settings
        raise refusal(
            f"The processor of {name!r}",
            error,
            f"The processor of {name!r} cannot be read ({{error}}): expected tokenizer, image processor and their "
            "settings in the model's folder; copy or download it again.",
        ) from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise PolicyError(
            f"{name!r} has no processor for images and text but a {type(processor).__name__}: expected the files of "
            "both, such as preprocessor_config.json and tokenizer.json, in the model's folder."
        )
    return processor


def check_processor(name: str, processor: Any, config: Any) -> None:
    """Raises PolicyError where the processor is not one of the model's architecture."""
    row = ROWS.get(config.model_type)
    own = {PROCESSOR_MAPPING_NAMES.get(kind) for kind, other in ROWS.items() if other == row} - {None}
    if row and own and not own & {kind.__name__ for kind in type(processor).__mro__}:
        raise PolicyError(
            f"The processor in {name!r} is a {type(processor).__name__}, but config.json names a {config.model_type}, "
            f"whose is {PROCESSOR_MAPPING_NAMES.get(config.model_type)}: {ONE_MODEL}."
        )


def load_without_video(name: str, config: Any, reason: Exception) -> Any:
    """Returns the processor of a model by its own class, less its video part.

    Args:
        name: a folder or a Hub id.
        config: of the model.
        reason: why the whole one was not loaded; raised where leaving out the video part is no help.

    Raises:
        ImportError: it needs a package for more than videos.
    """
    kind = real_class(processor_class(name, config))
    if kind is None or (isinstance(reason, OSError) and "video_processor" not in kind.get_attributes()):
        raise reason
    module = importlib.import_module(kind.__module__)
    if getattr(module, "num2words", "") is None:  # SmolVLM spells out a video's frames with it
        module.num2words = _no_video  # type: ignore[attr-defined]
    attributes = kind.get_attributes()
    settings = (read_json(name, "processor_config.json") or {}).get("video_processor")
    for file in ("video_preprocessor_config.json", "preprocessor_config.json"):  # where the library looks for them
        settings = settings or read_json(name, file)

    class WithoutVideo(kind):  # type: ignore[misc, valid-type]
        # what some processors look up of it without a video
        video_processor = SimpleNamespace(**{"num_frames": None, "fps": None, **(settings or {})})

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [part for part in attributes if part != "video_processor"]

        @classmethod
        def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
            args = list(args)
            if "video_processor" in attributes:
                args.insert(attributes.index("video_processor"), None)
            return super().from_args_and_dict(args, processor_dict, **kwargs)

        def to_dict(self) -> dict[str, Any]:  # a folder that is saved loads with torchvision, too
            return {**super().to_dict(), **({} if settings is None else {"video_processor": settings})}

    WithoutVideo.__name__, WithoutVideo.__qualname__ = kind.__name__, kind.__qualname__
    return WithoutVideo.from_pretrained(name, trust_remote_code=False)


def processor_class(name: str, config: Any) -> str:
    """Returns the name of the processor's class, which a model's files say, else its kind."""
    files = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
    said = [found for file in files if (found := (read_json(name, file) or {}).get("processor_class"))]
    return str(said[0] if said else PROCESSOR_MAPPING_NAMES.get(config.model_type) or "")


def read_json(name: str, file: str) -> dict[str, Any] | None:
    """Returns a JSON file of a folder or Hub id, None where there is none."""
    path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return None if path is None else json_object(read_text(Path(path)))


def real_class(name: str) -> Any:
    """Returns a class of transformers that it hides where a package is missing; None where there is none.

    A processor may take a function from the file of its torchvision image processor, such as Pixtral's; the same is in
    the file of the Pillow one, which then stands for it.
    """
    shown = getattr(transformers, name, None)
    if shown is None:
        return None
    try:
        module = importlib.import_module(shown.__module__)
    except ModuleNotFoundError as error:
        package, _, file = shown.__module__.rpartition(".")
        family = file.removeprefix("processing_")
        wanted = f"{package}.image_processing_{family}"
        if error.name != "torchvision" or importlib.util.find_spec(f"{package}.image_processing_pil_{family}") is None:
            raise
        sys.modules[wanted] = importlib.import_module(f"{package}.image_processing_pil_{family}")
        try:
            module = importlib.import_module(shown.__module__)
        finally:
            del sys.modules[wanted]
    return getattr(module, name)


def check_tokens(name: str, processor: Any, config: Any) -> None:
    """Raises PolicyError where the tokenizer has more tokens than the model, or fewer than half of them."""
    text = config.get_text_config()
    rows = getattr(text, "vocab_size", None)
    further = getattr(config, "additional_vocab_size", None) or FURTHER_ROWS
    held = max(processor.tokenizer.get_vocab().values(), default=0) + 1
    if isinstance(rows, int) and not rows / 2 <= held <= rows + further:
        raise PolicyError(f"The tokenizer in {name!r} has {held} tokens, but the model knows {rows}: {ONE_MODEL}.")


def _no_video(*args: Any) -> str:
    raise PolicyError("A video came, but processors are loaded without their video part: expected frames.")
