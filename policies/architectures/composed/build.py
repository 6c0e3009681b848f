"""The composition of any three parts to one VLM: a name of ours, a folder or a Hub id each."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from manako.errors import first_line
from manako.policies.adapters import ADAPTERS
from manako.policies.architectures.composed.modeling import ManakoForConditionalGeneration, ManakoModel
from manako.policies.architectures.composed.processing import IMAGE_TOKEN, ManakoProcessor, special_vocabulary
from manako.policies.encoders import Encoder, build_encoder
from manako.policies.errors import PolicyError
from manako.policies.language_models import build_language_model
from manako.policies.pretrained import quietly


def build_vlm(
    vision_encoder: str,
    adapter: str | None,
    language_model: str,
    frame_shape: tuple[int, int, int],
    image_size: int | None = None,
    patch_size: int | None = None,
    seed: int = 0,
    kind: type[ManakoForConditionalGeneration] = ManakoForConditionalGeneration,
    make_encoder: Callable[[str, tuple[int, int, int], int | None, int | None], Encoder] = build_encoder,
) -> tuple[ManakoForConditionalGeneration, ManakoProcessor]:
    """Composes a VLM from three parts.

    Args:
        vision_encoder: a key of `manako.policies.encoders.ENCODERS` (small, random), a folder or a Hub id.
        adapter: a key of `manako.policies.adapters.ADAPTERS`; None: `kind` has its own.
        language_model: a key of `manako.policies.language_models.LANGUAGE_MODELS`, a folder or a Hub id.
        frame_shape: (H, W, 3) of the env's frames; a small random encoder is sized by it.
        image_size: see `manako.policies.encoders.build_encoder`.
        patch_size: see `manako.policies.encoders.build_encoder`.
        seed: seed of the random weights.
        kind: class of the model.
        make_encoder: makes an encoder of its name, the frames' shape and the two sizes.

    Returns:
        The model in evaluation mode and its processor.

    Raises:
        PolicyError: an unknown name, a folder without a model, parts or sizes that do not fit.
    """
    reads_text = adapter is not None and check_adapter(adapter, kind.kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_model, tokenizer, template = build_language_model(language_model)
        if IMAGE_TOKEN not in tokenizer.get_vocab():
            tokenizer.add_special_tokens(
                {"additional_special_tokens": [IMAGE_TOKEN]}, replace_extra_special_tokens=False
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if text_model.get_input_embeddings().weight.shape[0] < len(tokenizer):
            with quietly():
                text_model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        encoder, image_processor = make_encoder(vision_encoder, frame_shape, image_size, patch_size)
        config = kind.config_class(
            vision_config=encoder.config,
            text_config=text_model.config,
            **({} if adapter is None else {"adapter": adapter}),
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        )
        model = kind(config)
    copy_weights(encoder, model.model.vision_tower)
    copy_weights(text_model.base_model, model.model.language_model)
    if not config.tie_word_embeddings:
        copy_weights(text_model.get_output_embeddings(), model.lm_head)
    model.tie_weights()
    model.eval()
    _check_language_model(language_model, text_model, model)
    visual_tokens = count_image_tokens(vision_encoder, model, image_processor, frame_shape)
    config.num_image_tokens = visual_tokens if kind.visual_tokens_are_in_the_text else 1
    special = special_vocabulary(tokenizer).values()
    beyond = range(len(tokenizer), model.lm_head.out_features)  # rows that pad the vocabulary stand for no text
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.suppress_tokens = sorted(
        {*special, *beyond, config.image_token_id} - {tokenizer.eos_token_id}
    )
    processor = ManakoProcessor(
        image_processor,
        tokenizer,
        num_image_tokens=config.num_image_tokens,
        chat_template=template,
        adapter_reads_text=reads_text,
    )
    return model, processor


def swap_parts(
    vlm: ManakoForConditionalGeneration,
    processor: ManakoProcessor,
    vision_encoder: str | None,
    adapter: str | None,
    frame_shape: tuple[int, int, int],
    image_size: int | None = None,
    patch_size: int | None = None,
    seed: int = 0,
) -> tuple[ManakoForConditionalGeneration, ManakoProcessor, bool]:
    """Puts another encoder or adapter into a composed model; what is not named stays as it was learned.

    Args:
        vlm: a composed model.
        processor: its processor.
        vision_encoder: see `build_vlm`, as for all that follow; None: the model's own.
        adapter: None: the model's own, whose weights are kept where the encoder's features are as wide as before.
        frame_shape: (H, W, 3).
        image_size: see `manako.policies.encoders.build_encoder`.
        patch_size: see `manako.policies.encoders.build_encoder`.
        seed: of what is new.

    Returns:
        A model in evaluation mode, its processor, and whether the adapter's weights are those of `vlm`.

    Raises:
        PolicyError: an unknown name, or parts and sizes that do not fit.
    """
    if vision_encoder is None and (image_size or patch_size):
        raise PolicyError("image_size and patch_size are for a new small encoder: name one by --vision_encoder.")
    old: Any = vlm.config
    reads_text = check_adapter(adapter or old.adapter, ManakoModel)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder, image_processor = vlm.model.vision_tower, processor.image_processor
        if vision_encoder is not None:
            encoder, image_processor = build_encoder(vision_encoder, frame_shape, image_size, patch_size)
        config = type(old)(
            vision_config=encoder.config,
            text_config=old.text_config,
            adapter=adapter or old.adapter,
            image_token_id=old.image_token_id,
        )
        model = type(vlm)(config)
    copy_weights(encoder, model.model.vision_tower)
    copy_weights(vlm.model.language_model, model.model.language_model)
    copy_weights(vlm.lm_head, model.lm_head)
    learned, new = vlm.model.adapter.state_dict(), model.model.adapter.state_dict()
    kept = config.adapter == old.adapter and all(learned[name].shape == new[name].shape for name in new)
    if kept:
        copy_weights(vlm.model.adapter, model.model.adapter)
    model.tie_weights()
    model.eval()
    model.generation_config = vlm.generation_config
    named = vision_encoder or str(old.vision_config.model_type)
    config.num_image_tokens = count_image_tokens(named, model, image_processor, frame_shape)
    return (
        model,
        ManakoProcessor(
            image_processor,
            processor.tokenizer,
            num_image_tokens=config.num_image_tokens,
            chat_template=processor.chat_template,
            adapter_reads_text=reads_text,
        ),
        kept,
    )


def check_adapter(name: str, model: type[ManakoModel]) -> bool:
    """Returns whether an adapter of that name reads text.

    Raises:
        PolicyError: an unknown name, or an adapter that reads text in a model that gives it none.
    """
    if name not in ADAPTERS:
        raise PolicyError(f"Unknown adapter {name!r}: expected one of {', '.join(sorted(ADAPTERS))}.")
    if ADAPTERS[name].wants_text and not model.gives_text:
        fitting = ", ".join(sorted(other for other, kind in ADAPTERS.items() if not kind.wants_text))
        raise PolicyError(
            f"The adapter {name!r} reads the prompt's text, but {model.__name__} gives its adapter the frame alone: "
            f"expected one of {fitting}."
        )
    return ADAPTERS[name].wants_text


def count_image_tokens(
    name: str, model: ManakoForConditionalGeneration, image_processor: Any, frame_shape: tuple[int, int, int]
) -> int:
    """Visual tokens K of a frame, by running one."""
    frame = np.zeros(frame_shape, dtype=np.uint8)  # (H, W, 3)
    try:
        pixels = image_processor(images=[frame], return_tensors="pt", input_data_format="channels_last")["pixel_values"]
    except Exception as error:  # whatever an image processor says to settings that make no pixels
        raise PolicyError(
            f"The image processor of {name!r} makes no pixels of frames of shape {tuple(frame_shape)} "
            f"({first_line(error)}): expected settings that do; copy or download its preprocessor_config.json again."
        ) from error
    if pixels.ndim != 4:
        raise PolicyError(
            f"The image processor of {name!r} gives pixels of shape {tuple(pixels.shape)} for a frame: expected "
            "(1, 3, height, width); choose an encoder that sees a frame as one image."
        )
    text = (torch.zeros(1, 1, dtype=torch.long),) if model.model.adapter.wants_text else ()  # K does not depend on it
    try:
        with torch.no_grad():
            return model.model.get_image_features(pixels, *text).shape[1]  # (1, K, D)
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


def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Copies weights by name; parts that only the source has are left out."""
    missing = target.load_state_dict(source.state_dict(), strict=False).missing_keys
    if missing:
        raise PolicyError(f"The loaded part lacks weights that the composed model needs: {', '.join(missing[:3])}.")
