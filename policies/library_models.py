"""Models and processors by transformers' Auto classes: any folder or Hub id of a vision-language model.

A processor with a video part wants torchvision, of which no CPU build is on PyPI; the video part is left out then, and
image processor and tokenizer do what they do in the whole one. Everything that can be wrong with a folder ends in one
sentence here, before weights are read where that is possible. No name that is a path is ever asked of the Hub.
"""

import importlib
import importlib.util
import json
import re
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

from manako.errors import first_line
from manako.policies.architectures import name_parts
from manako.policies.architectures.composed.presets import PRESETS
from manako.policies.architectures.model import Model
from manako.policies.errors import PolicyError
from manako.policies.pretrained import LOADING_ERRORS, check_complete, quietly
from manako.policies.room import check_room

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
PLACES = f"expected a preset ({', '.join(PRESETS)}), a model folder or a Hub id"
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
    check_room(name, config, dtype)
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
    except ImportError as error:
        raise PolicyError(
            f"The model of {name!r} needs a package that is not installed ({first_line(error)}): install it."
        ) from error
    except LOADING_ERRORS as error:
        raise PolicyError(
            f"The weights of {name!r} cannot be read ({first_line(error)}): expected a whole model folder; copy or "
            "download it again."
        ) from error
    check_complete(name, loading)
    check_tokens(name, processor, config)
    return name_parts(vlm.eval(), processor)


def load_config(name: str) -> Any:
    """Returns the configuration of a vision-language model.

    Raises:
        PolicyError: there is none, or it is of another kind of model.
    """
    check_name(name)
    try:
        with quietly():
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except LOADING_ERRORS as error:
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            raise PolicyError(
                f"{name!r} brings custom code, which is not run here: expected a model that transformers itself knows."
            ) from error
        raise PolicyError(f"No vision-language model at {name!r}: {PLACES} ({first_line(error)}).") from error
    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and config.model_type != "manako":
        raise PolicyError(
            f"{name!r} is a {config.model_type}, which transformers does not know as a vision-language model: {PLACES} "
            "of a model that takes images and text; a language model alone goes into --language_model."
        )
    return config


def check_name(name: str) -> None:
    """Raises PolicyError where a name is neither a folder with a model nor what the Hub could know."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise PolicyError(
                f"The folder {name!r} holds no config.json: expected a model folder or a run's checkpoint."
            )
        return
    if folder.exists():
        raise PolicyError(f"{name!r} is a file: {PLACES}.")
    is_path = name.startswith(("/", ".", "~")) or "\\" in name or Path(folder.parts[0] if folder.parts else "").is_dir()
    if is_path or not HUB_ID.fullmatch(name):
        raise PolicyError(f"There is no folder {name!r}: {PLACES}.")


def load_processor(name: str, config: Any) -> Any:
    """Returns the processor of a model; without its video part where torchvision is not there.

    Raises:
        PolicyError: there is none for images and text, or it needs a package.
    """
    try:
        with quietly():
            try:
                processor = AutoProcessor.from_pretrained(name, trust_remote_code=False)
            except (ImportError, OSError) as error:
                processor = load_without_video(name, config, error)
    except ImportError as error:
        needed = "torchvision" if "torchvision" in str(error).lower() else "it"
        command = f"pip install torchvision torch=={torch.__version__.split('+')[0]}" if needed != "it" else "see there"
        raise PolicyError(
            f"The processor of {name!r} needs a package that is not installed ({first_line(error)}): install {needed} "
            f"({command})."
        ) from error
    except (*LOADING_ERRORS, TypeError, AttributeError) as error:
        raise PolicyError(
            f"The processor of {name!r} cannot be read ({first_line(error)}): expected tokenizer, image processor and "
            "their settings in the model's folder; copy or download it again."
        ) from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise PolicyError(
            f"{name!r} has no processor for images and text but a {type(processor).__name__}: expected the files of "
            "both, such as preprocessor_config.json and tokenizer.json, in the model's folder."
        )
    return processor


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
    return None if path is None else dict(json.loads(Path(path).read_text()))


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
    """Raises PolicyError where the tokenizer has more tokens than the model."""
    text = config.get_text_config()
    rows = getattr(text, "vocab_size", None)
    further = getattr(config, "additional_vocab_size", None) or FURTHER_ROWS
    held = max(processor.tokenizer.get_vocab().values(), default=0)
    if isinstance(rows, int) and held >= rows + further:
        raise PolicyError(
            f"The tokenizer in {name!r} has tokens up to {held}, but the model knows {rows} of them: expected the "
            "files of one model; copy or download the folder again."
        )


def _no_video(*args: Any) -> str:
    raise PolicyError("A video came, but processors are loaded without their video part: expected frames.")
