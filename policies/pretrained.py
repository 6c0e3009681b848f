"""What every `from_pretrained` of this package needs: names and files that are looked at first, no noise, all weights.

A name that is a path is never asked of the Hub; the Hub is asked once, without retries, whether it knows another name.
Whatever the library raises becomes one sentence (`refusal`): custom code, a package that is missing, or the fault.
"""

import contextlib
import difflib
import importlib.util
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub.errors import GatedRepoError, HFValidationError
from huggingface_hub.utils import logging as hub_logging
from safetensors import SafetensorError, safe_open
from transformers.utils import logging

from manako.bounded import from_json, read_text
from manako.errors import full_text
from manako.policies.bounds import size_fault
from manako.policies.errors import PolicyError
from manako.policies.sealed import check_folder

FILE_ENDS = (".txt", ".json", ".yaml", ".yml", ".safetensors", ".bin", ".pt", ".pth", ".zip")
OWN_FOLDERS = (
    "runs",
    "run",
    "checkpoints",
    "data",
    "output",
    "outputs",
)  # first parts of what lies here, not on the Hub
OF_A_RUN = re.compile(r"^final$|^checkpoint-\d+$|-seed\d+-\d{8}-\d{6}$")  # what runs name folders
LFS = b"version https://git-lfs"
READ = (".json", ".jinja", ".safetensors", ".model")  # files that the library reads
OBJECTS = re.compile(r"(\w*config|tokenizer|special_tokens_map|added_tokens|vocab|chat_template|.*\.index)\.json")
SIZES = re.compile(r"config\.json$")  # of them, those that say sizes
LARGEST_TEXT = 2**27  # bytes; the largest tokenizers take a quarter
QUANTIZED = {"I8", "U8", "F8_E4M3", "F8_E5M2", "F4"}  # numbers that mean nothing without their scales
NOT_QUANTIZED = (
    "quantized weights cannot be trained, expected those that they were made of (float32, float16 or bfloat16); use "
    "the model before quantization"
)
LAYER = re.compile(r"\.(\d+)\.")  # in a weight's name
CUSTOM_CODE = ("trust_remote_code", "custom code")
# how the library says that a package is missing
PACKAGE = re.compile(
    r"pip install (?:-+\w+ )*(?!git\+)([\w-]+)|requires the (\w+) library|requires `?(\w+)`? to be installed"
    r"|not found in your environment: ([\w-]+)|No module named '(\w+)",
    re.IGNORECASE,
)
TORCHVISION = f"torchvision torch=={torch.__version__.split('+')[0]}"  # it pins torch
TO_INSTALL = {
    "torchvision": TORCHVISION,
    "timm": f"timm {TORCHVISION}",  # it wants the other
    "tiktoken": "sentencepiece protobuf tiktoken",  # the library names this one where any of them is missing
    "sentencepiece": "sentencepiece protobuf",
    "protobuf": "sentencepiece protobuf",
    "pil": "pillow",
}
IMPORTED_AS = {"protobuf": "google.protobuf"}


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silences warnings and progress bars of transformers and PEFT; what matters in them the caller checks."""
    level, bars, hub = logging.get_verbosity(), logging.is_progress_bar_enabled(), hub_logging.get_verbosity()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        hub_logging.set_verbosity(hub)
        if bars:
            logging.enable_progress_bar()


# ---- before the library is asked ---------------------------------------------------------------------------------


def check_name(name: str, places: str) -> None:
    """Raises PolicyError where a name is neither a folder nor what the Hub could know; `places` is what is expected."""
    shown = repr(name if len(name) < 100 else f"{name[:90]}...")
    try:
        path = Path(name)
        if name.strip() and path.is_dir():
            os.listdir(path)
            return
        is_path = name.startswith(("/", ".", "~")) or name.lower().endswith(FILE_ENDS)
        is_path = is_path or os.path.lexists(path.parts[0] if path.parts else "")
        is_path = is_path or (bool(path.parts) and (path.parts[0] in OWN_FOLDERS or bool(OF_A_RUN.search(path.name))))
        is_file = path.is_file()
    except (OSError, ValueError) as error:  # too long, not allowed, a null character
        reason = getattr(error, "strerror", None) or error
        raise PolicyError(f"{shown} cannot be opened as a folder ({reason}): {places}.") from error
    if is_file:
        raise PolicyError(f"{shown} is a file: {places}.")
    with contextlib.suppress(HFValidationError):
        huggingface_hub.utils.validate_repo_id(name)
        if not is_path:
            return
    raise PolicyError(f"There is no folder {shown}{_nearby(path) if len(name) < 100 else ''}: {places}.")


def _nearby(path: Path) -> str:
    """What there is in place of a folder, in words: the one most alike beside it, or some that are there."""
    there = next(parent for parent in (path.parent, *path.parents, Path()) if parent.is_dir())
    wanted = next(iter(path.parts[len(there.parts) :]), None)
    if wanted is None:
        return ""
    try:
        found = sorted(each.name for each in there.iterdir() if each.is_dir() and not each.name.startswith("."))
    except OSError:
        return ""
    near = difflib.get_close_matches(wanted, found, 1)
    if near:
        return f" (did you mean {str(there / near[0])!r}?)"
    if there == Path():
        return f" (no {wanted!r} in {Path.cwd()})"
    newest = f"{', '.join(found[-3:])}" + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return f" ({there} has {newest or 'no folders'})"


def check_found(name: str, what: str, places: str) -> None:
    """Raises PolicyError where a name is no place, a folder is not whole, or the Hub has no such model.

    Args:
        name: a folder or a Hub id.
        what: the kind of model that is looked for.
        places: what is expected, for the sentence.
    """
    check_name(name, places)
    if Path(name).is_dir():
        _check_files(name)
        return
    if huggingface_hub.constants.HF_HUB_OFFLINE or huggingface_hub.try_to_load_from_cache(name, "config.json"):
        return
    try:
        known = huggingface_hub.file_exists(name, "config.json")
    except GatedRepoError as error:
        raise PolicyError(
            f"The Hub shows {name!r} only to those whom its owners let in: ask them on its page and log in by "
            "`hf auth login`, or give a folder."
        ) from error
    except Exception as error:  # of whichever HTTP library the Hub's client uses, or an id that it does not take
        raise PolicyError(f"No {what} at {name!r}: {places} (no such folder; the Hub: {_said(error)}).") from error
    if not known:
        raise PolicyError(f"No {what} at {name!r}: {places} (no such folder, and the Hub has none to show).")


def check_holds(name: str, pattern: str, file: str) -> None:
    """Raises PolicyError where a folder has no file that matches; `file` is what it is called mostly."""
    if Path(name).is_dir() and not any(re.fullmatch(pattern, found.name) for found in Path(name).iterdir()):
        raise PolicyError(f"The folder {name!r} holds no {file}: expected a model folder or a run's checkpoint.")


def _check_files(name: str) -> None:
    """Raises PolicyError at the first file of a folder that the library would read wrong, or not at all."""
    folder = Path(name)
    check_folder(folder)
    if not (folder / "config.json").is_file():
        raise PolicyError(f"The folder {name!r} holds no config.json: expected a model folder or a run's checkpoint.")
    for file in sorted(folder.iterdir()):
        fault = _fault(file) if file.suffix in READ else None
        if fault:
            raise PolicyError(
                f"{file.name} in {name!r} {fault}: expected a whole model folder; copy or download it again."
            )
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        files = from_json(read_text(index)).get("weight_map")
        missing = [file for file in sorted(set(files.values())) if not (folder / file).is_file()] if files else ["any"]
        if missing:
            raise PolicyError(
                f"{index.name} in {name!r} names weights in {missing[0]}, which is not there: expected a whole model "
                "folder; copy or download it again."
            )


def _fault(file: Path) -> str | None:
    """What is wrong with a file, in words."""
    if not file.is_file():
        return "is a link to nothing" if file.is_symlink() else "is no file"
    try:
        with file.open("rb") as opened:
            start = opened.read(len(LFS))
        if start == LFS:
            return "is a pointer of Git LFS, for which `git lfs pull` gives the file itself"
        if not start:
            return "is empty"
        if file.suffix != ".safetensors" and (size := file.stat().st_size) > LARGEST_TEXT:
            return f"is {size:,} bytes long, and no more than {LARGEST_TEXT:,} are read"
        if OBJECTS.fullmatch(file.name):
            content = from_json(read_text(file, LARGEST_TEXT))
            if not isinstance(content, dict):
                return "is no JSON object"
            if SIZES.search(file.name) and (fault := size_fault(content)):
                return fault
        if file.name.endswith(".index.json") and not (
            isinstance(names := content.get("weight_map"), dict)
            and all(isinstance(name, str) for name in names.values())
        ):
            return "has no object weight_map of files"
        if file.name.startswith("model") and file.suffix == ".safetensors":
            with safe_open(file, "pt") as weights:
                kinds = {weights.get_slice(key).get_dtype() for key in weights.keys()}  # noqa: SIM118
            if kinds & QUANTIZED:
                raise PolicyError(f"{file} holds {', '.join(sorted(kinds & QUANTIZED))}: {NOT_QUANTIZED}.")
    except PolicyError:
        raise
    except (OSError, ValueError, RecursionError, SafetensorError) as error:  # ValueError: no JSON, no UTF-8
        return f"cannot be read ({_said(error)})"
    return None


# ---- what the library says ---------------------------------------------------------------------------------------


def refusal(what: str, error: Exception, else_: str) -> PolicyError:
    """Returns the sentence for an error of the library.

    Args:
        what: what was to be loaded.
        error: what it raised.
        else_: the sentence for faults of the files; `{error}` stands for what the library said.
    """
    if isinstance(error, PolicyError):
        return error
    if any(words in str(error) for words in CUSTOM_CODE):
        return PolicyError(
            f"{what} brings custom code, which is not run here: expected a model that transformers itself knows."
        )
    package = missing_package(error)
    if package:
        command = f"pip install {TO_INSTALL.get(package, package)}"
        return PolicyError(f"{what} needs a package that is not installed: install {package} ({command}).")
    return PolicyError(else_.replace("{error}", _said(error)))


def missing_package(error: BaseException | None) -> str | None:
    """Returns the name of the package that an error, or one behind it, asks for and that is not there; else None."""
    while error is not None:
        named = [name.lower() for found in PACKAGE.findall(str(error)) for name in found if name]
        missing = next(filter(_is_missing, named), None)
        if missing:
            return missing
        error = error.__cause__ or error.__context__
    return None


def _is_missing(package: str) -> bool:
    try:
        return importlib.util.find_spec(IMPORTED_AS.get(package, package.replace("-", "_"))) is None
    except (ImportError, ValueError):
        return True


def _said(error: BaseException) -> str:
    """What an error says in one line, not too long."""
    return full_text(error)[:160].rstrip(".:")


def check_complete(name: str, loading: dict[str, Any], known: Iterable[str] = ()) -> None:
    """Raises PolicyError where `from_pretrained` left weights random; a pooler may be, since nothing here uses it.

    Args:
        name: folder or Hub id.
        loading: what `from_pretrained` returns beside the model, with `output_loading_info` and
            `ignore_mismatched_sizes` set.
        known: the names of the model's weights, where layers that it lacks are a fault, too.
    """
    lacking = sorted(key for key in loading["missing_keys"] if "pooler" not in key)
    if lacking:
        raise PolicyError(
            f"{name!r} lacks {len(lacking)} of the model's weights, such as {lacking[0]}: expected all of them; the "
            "folder is incomplete, or of another kind of model than its config.json says."
        )
    others = sorted(key if isinstance(key, tuple) else (key, "?", "?") for key in loading["mismatched_keys"])
    if others:
        key, came, expected = others[0]
        raise PolicyError(
            f"{name!r} holds {len(others)} of the model's weights in another shape, such as {key} ({_shape(came)}, not "
            f"{_shape(expected)}): expected those that its config.json says; copy or download the folder again."
        )
    lists, layers = set(), set()
    for weight in known:
        lists |= {weight[: found.start(1)] for found in LAYER.finditer(weight)}
        layers |= {weight[: found.end(1)] for found in LAYER.finditer(weight)}
    for key in sorted(loading["unexpected_keys"]):
        if any(key[: at.start(1)] in lists and key[: at.end(1)] not in layers for at in LAYER.finditer(key)):
            raise PolicyError(
                f"{name!r} holds layers that its config.json does not name, such as {key}: expected weights and "
                "config.json of one model; copy or download the folder again."
            )


def _shape(shape: Any) -> str:
    return " x ".join(map(str, shape)) or "one number"
