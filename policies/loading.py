"""Where policies come from: presets, folders of ours, LoRA on a base, and any VLM that transformers loads.

Each source gives a `Model` that names its parts; `load_policy` then marks what learns and puts a policy around it.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import torch
from peft import PeftModel

from manako.bounded import BadText, json_object, read_text, shown
from manako.policies.answers.text import FORMAT as TEXT
from manako.policies.answers.text import TextAnswers
from manako.policies.architectures import name_parts
from manako.policies.architectures.composed.build import swap_parts
from manako.policies.architectures.model import Model
from manako.policies.architectures.presets import PRESETS
from manako.policies.bins_policy import BinsPolicy
from manako.policies.default_trainable import IS_RANDOM, POLICY_FILE, began_random, with_default
from manako.policies.encoders import ENCODERS
from manako.policies.errors import PolicyError
from manako.policies.interface import PolicySpec
from manako.policies.language_models import LANGUAGE_MODELS
from manako.policies.library_models import PLACES, load_library_model
from manako.policies.pretrained import check_name, quietly
from manako.policies.saving import (
    DTYPES,
    LORA_CONFIG_FILE,
    VALUE_HEAD_FILE,
    digest,
    fill,
    frozen_of,
    learned_of,
    read_description,
    read_tensors,
    weight_fault,
)
from manako.policies.sealed import check_folder
from manako.policies.source import SYSTEM, TEXT_FIELDS, PolicySource
from manako.policies.text_policy import TextPolicy
from manako.policies.trainable import parts_of, set_trainable
from manako.policies.vlm_policy import VLMPolicy
from manako.spaces import TextCodes, is_vector

OF_PRESETS = (
    "vision_encoder",
    "adapter",
    "language_model",
    "image_size",
    "patch_size",
)  # a run of a composed one may have another


class Loaded(NamedTuple):
    """A model from somewhere, before a policy is put around it."""

    model: Model
    source: PolicySource  # with what the folder brought
    value_head: dict[str, torch.Tensor] | None = None  # weights, where the folder holds some
    base_sha256: str | None = None  # of the base that its LoRA belongs to; None: what learns is not marked yet


def load_policy(
    source: PolicySource,
    action_names: Sequence[str],
    frame_shape: tuple[int, int, int],
    action_space: gym.Space | None = None,
) -> VLMPolicy:
    """Loads the policy of a preset, a folder or a Hub id, for these actions and frames.

    A folder of `save_policy` also brings its value head, and its system text and action format where the source leaves
    them at their defaults.

    Args:
        source: where it comes from and what of it learns.
        action_names: the A actions, in the env's order, or the entries of its action vectors.
        frame_shape: (H, W, 3) of the env's frames.
        action_space: the env's, where its actions may be vectors; None: one of the A.

    Returns:
        The policy, with what learns marked.

    Raises:
        PolicyError: nothing loadable there, damaged files, or parts that do not fit.
    """
    source, is_random = with_default(source), began_random(source)
    parts = parts_of(source.trainable)
    model, source, head, base_sha = load_model(source, action_names, frame_shape)
    policy = put_policy_around(model, source, action_names, frame_shape, action_space)
    if head is not None:
        fill(policy.value_head, head, Path(source.policy))
    policy.value_head.requires_grad_("value_head" in parts)
    policy.origin = {"source": asdict(source), "base_sha256": base_sha, IS_RANDOM: is_random}
    return policy


def load_model(source: PolicySource, action_names: Sequence[str], frame_shape: tuple[int, int, int]) -> Loaded:
    """Loads the model of `load_policy`, with what learns marked: the half that reads files.

    Raises:
        PolicyError: nothing loadable there, or damaged files.
    """
    if source.dtype not in DTYPES:
        raise PolicyError(f"dtype is {source.dtype!r}: expected one of {', '.join(DTYPES)}.")
    loaded = _load(_with_whole_paths(source), action_names, frame_shape)
    if loaded.base_sha256 is not None:
        return loaded
    model, base_sha = _mark(loaded.model, loaded.source)
    return loaded._replace(model=model, base_sha256=base_sha)


def put_policy_around(
    model: Model,
    source: PolicySource,
    action_names: Sequence[str],
    frame_shape: tuple[int, int, int],
    action_space: gym.Space | None = None,
) -> VLMPolicy:
    """Returns the policy of a loaded model, for these actions and frames: the half that checks what it computes.

    Raises:
        PolicyError: the model cannot serve these actions or frames, or its numbers are not the library's.
    """
    height, width, channels = frame_shape
    vectors = None if action_space is None or not is_vector(action_space) else action_space
    spec = PolicySpec(
        tuple(action_names),
        (height, width, channels),
        source.action_format,
        source.system,
        text=_text_of(source, vectors),
        frames=source.frames,
        history=source.history,
        image_first=source.image_first,
        vectors=vectors,
        bins=source.bins,
        bin_spacing=source.bin_spacing,
    )
    if vectors is not None and source.history:
        raise PolicyError(
            f"--history {source.history} came for the actions {vectors}, which have no names to tell: leave it out."
        )
    if vectors is not None and spec.text is not None and not isinstance(vectors, TextCodes):
        raise PolicyError(
            f"--action_format text came for the actions {vectors}: expected actions with names; leave it out."
        )
    given = [name for name in TEXT_FIELDS if getattr(source, name) is not None]
    if spec.text is None and given:
        raise PolicyError(
            f"--{given[0]} {getattr(source, given[0])} came, which is of answers in text: expected --action_format "
            "text with it, or leave it out."
        )
    with quietly():
        policy = _kind_of(spec)(model, spec)
    if source.next_frame_coef and policy.next_frame is None:
        raise PolicyError(
            f"--next_frame_coef is {source.next_frame_coef}, but {type(policy.base_vlm).__name__} of --policy "
            f"{source.policy} predicts no frames"
            f"{'' if vectors is None else ' of action vectors'}: expected 0, or a policy of vision tokens."
        )
    policy.next_frame_coef = source.next_frame_coef
    return policy


def _text_of(source: PolicySource, vectors: gym.Space | None) -> TextAnswers | None:
    """The settings of answers in text, where actions are said so: as the source says, or since they are texts."""
    if isinstance(vectors, TextCodes):
        if source.action_format not in ("auto", TEXT):
            raise PolicyError(
                f"--action_format {source.action_format} came for the actions {vectors}, which are written: expected "
                "text, or leave it out."
            )
        return source.text_answers("plain")
    return source.text_answers() if source.action_format == TEXT else None


def _kind_of(spec: PolicySpec) -> type[VLMPolicy]:
    """What plays: by how its actions are said."""
    if spec.text is not None:
        return TextPolicy
    return VLMPolicy if spec.vectors is None else BinsPolicy


def _load(source: PolicySource, action_names: Sequence[str], frame_shape: tuple[int, int, int]) -> Loaded:
    """Finds the model of a preset, a folder or a Hub id."""
    if source.policy in PRESETS:
        return Loaded(_build_preset(source, frame_shape), source)
    check_name(source.policy, PLACES)
    folder = Path(source.policy)
    if (folder / POLICY_FILE).is_file():
        loaded = _go_on(folder, source, action_names)
    else:
        loaded = Loaded(load_library_model(source.policy, DTYPES[source.dtype]), source)
    loaded = loaded._replace(model=_with_parts(loaded.model, source, frame_shape))
    if folder.is_dir() and loaded.base_sha256 is None:
        return loaded._replace(source=replace(loaded.source, policy=str(folder.resolve())))
    return loaded


def _go_on(folder: Path, source: PolicySource, action_names: Sequence[str]) -> Loaded:
    """Goes on from a folder of `save_policy`: LoRA on the same base stays what it was, else it is merged."""
    check_folder(folder)
    saved, description = read_description(folder)
    source = _fill_in(source, saved, action_names, description)
    model, head = _load_own(folder, saved, description)
    if not isinstance(model.vlm, PeftModel):
        return Loaded(model, source, head)
    if parts_given(source) or not parts_of(source.trainable) ^ parts_of(saved.trainable) <= {"value_head"}:
        return Loaded(model._replace(vlm=model.vlm.float().merge_and_unload()), source, head)
    if source.dtype != saved.dtype:
        raise PolicyError(
            f"dtype is {source.dtype}, but the LoRA weights in {folder} belong to a {saved.dtype} model: "
            f"expected dtype: {saved.dtype}, or trainable: full, which merges them."
        )
    source = replace(
        saved,
        system=source.system,
        action_format=source.action_format,
        bins=source.bins,
        bin_spacing=source.bin_spacing,
        trainable=source.trainable,
        next_frame_coef=source.next_frame_coef,
        **{name: getattr(source, name) for name in TEXT_FIELDS},
        frames=source.frames,
        history=source.history,
        image_first=source.image_first,
    )
    return Loaded(model, source, head, description["base_sha256"])


def parts_given(source: PolicySource) -> list[str]:
    """Returns the names of the parts that a source replaces."""
    return [name for name in OF_PRESETS if getattr(source, name) is not None]


def _with_parts(model: Model, source: PolicySource, frame_shape: tuple[int, int, int]) -> Model:
    """A composed model with another encoder or adapter, where the source names one."""
    given = parts_given(source)
    if not given:
        return model
    if model.base_vlm.config.model_type != "manako" or source.language_model is not None:
        raise PolicyError(
            f"{', '.join(given)} came for {source.policy!r}, a {type(model.base_vlm).__name__}: only a preset "
            f"({', '.join(PRESETS)}) has all parts to choose, and a run of a composed one (such as tiny or blip2) its "
            "vision_encoder and adapter; leave it out, or start from a preset."
        )
    size = source.image_size, source.patch_size
    vlm, processor, kept = swap_parts(
        model.vlm, model.processor, source.vision_encoder, source.adapter, frame_shape, *size, source.seed
    )
    new = ["vision encoder"] * (source.vision_encoder is not None) + ["adapter"] * (not kept)
    return name_parts(vlm, processor)._replace(replaced=tuple(new))


def _mark(model: Model, source: PolicySource) -> tuple[Model, str | None]:
    """Marks what learns; beside the model, the digest of what does not, None where everything learns."""
    model.vlm.to(DTYPES[source.dtype])
    with_lora = "lora" in parts_of(source.trainable)
    base_sha = digest(model.vlm.state_dict()) if with_lora else None
    with quietly():
        model = set_trainable(model, source.trainable, source.lora_rank, source.lora_alpha)
    if not with_lora and (frozen := frozen_of(model.vlm)):
        base_sha = digest(frozen)
    return model, base_sha


def _with_whole_paths(source: PolicySource) -> PolicySource:
    """The source with the parts' folders as they are found from anywhere, and the user's own folder for a `~`."""
    places: dict[str, Any] = {
        name: os.path.abspath(place)
        for name, names in (("vision_encoder", ENCODERS), ("language_model", LANGUAGE_MODELS))
        if (value := getattr(source, name)) and value not in names
        if os.path.isdir(place := os.path.expanduser(value))
    }
    return replace(source, policy=os.path.expanduser(source.policy), **places)


def _build_preset(source: PolicySource, frame_shape: tuple[int, int, int]) -> Model:
    preset = PRESETS[source.policy]
    architecture = import_module(f"manako.policies.architectures.{preset.architecture}")
    vlm, processor = architecture.build_vlm(
        source.vision_encoder or preset.vision_encoder,
        source.adapter or preset.adapter,
        source.language_model or preset.language_model,
        frame_shape,
        source.image_size,
        source.patch_size,
        source.seed,
    )
    return name_parts(vlm, processor)


def _fill_in(
    source: PolicySource, saved: PolicySource, action_names: Sequence[str], description: dict[str, Any]
) -> PolicySource:
    """What the source leaves at its defaults is as it was when the folder was written.

    Raises:
        PolicyError: it learned to be told of another past than the source asks for.
    """
    if source.system == SYSTEM:
        source = replace(source, system=description["system"])
    if source.action_format == "auto" and list(action_names) == description["action_names"]:
        source = replace(source, action_format=description["action_format"])
    if source.action_format == TEXT or description.get("action_space", {}).get("kind") == "Text":
        given = {name for name in TEXT_FIELDS if getattr(source, name) is not None}
        source = replace(source, **{name: getattr(saved, name) for name in TEXT_FIELDS if name not in given})
    for name in ("frames", "history", "image_first"):
        default, learned, asked = getattr(PolicySource(), name), getattr(saved, name), getattr(source, name)
        if asked not in (default, learned) and learned != default:
            raise PolicyError(
                f"--{name} {asked} came, but {source.policy!r} learned with --{name} {learned}: leave it out, or start "
                "from a policy that learned without."
            )
        source = replace(source, **{name: learned if asked == default else asked})
    for name in ("bins", "bin_spacing"):
        if getattr(source, name) == getattr(PolicySource(), name):
            source = replace(source, **{name: getattr(saved, name)})
    return source


def _load_own(folder: Path, saved: PolicySource, description: dict[str, Any]) -> tuple[Model, dict[str, torch.Tensor]]:
    """Model and value head of a folder of `save_policy`, checked against its digests."""
    if (folder / LORA_CONFIG_FILE).is_file():
        model = _build_base(folder, saved, description)
        _check_lora(folder / LORA_CONFIG_FILE, saved)
        try:
            with quietly():
                model = model._replace(vlm=PeftModel.from_pretrained(model.vlm, str(folder), is_trainable=True))
        except Exception as error:  # whatever PEFT says to a configuration and weights that do not fit
            raise PolicyError(
                f"The LoRA weights in {folder} cannot be read ({weight_fault(error)}): use another checkpoint."
            ) from error
    else:
        model = set_trainable(load_library_model(str(folder), DTYPES[saved.dtype]), saved.trainable)
    head = read_tensors(folder / VALUE_HEAD_FILE)
    with_lora = isinstance(model.vlm, PeftModel)
    whole = with_lora or description["base_sha256"] in (None, digest(frozen_of(model.vlm)))
    if not whole or digest(learned_of(model.vlm, head)) != description["learned_sha256"]:
        raise PolicyError(
            f"The weights in {folder} are not the ones that policy.json names: files were changed or mixed up; use "
            "another checkpoint."
        )
    return model, head


def _check_lora(file: Path, saved: PolicySource) -> None:
    """Raises PolicyError where PEFT would make other matrices than those that policy.json says, of any size."""
    try:
        config = json_object(read_text(file))
    except (OSError, BadText) as error:
        raise PolicyError(f"{file} is damaged ({error}): use another checkpoint.") from error
    expected = {"r": saved.lora_rank, "lora_alpha": saved.lora_alpha, "rank_pattern": {}, "alpha_pattern": {}}
    for name, value in expected.items():
        if (came := config.get(name) or {}) != value:
            raise PolicyError(
                f"{file} says {name} is {shown(came)}, and policy.json beside it {value}: use another checkpoint."
            )


def _build_base(folder: Path, saved: PolicySource, description: dict[str, Any]) -> Model:
    """The model that the LoRA weights in `folder` belong to, built again and compared."""
    place, dtype = Path(saved.policy), DTYPES[saved.dtype]
    try:
        if saved.policy in PRESETS:
            base = _build_preset(saved, tuple(description["frame_shape"]))
        elif (place / LORA_CONFIG_FILE).is_file():  # LoRA on a policy whose own LoRA was merged
            check_folder(place)
            inner, _ = _load_own(place, *read_description(place))
            base = inner._replace(vlm=inner.vlm.float().merge_and_unload())
        else:
            base = load_library_model(saved.policy, dtype)
        if saved.policy not in PRESETS:
            base = _with_parts(base, saved, tuple(description["frame_shape"]))
    except PolicyError as error:
        raise PolicyError(f"The base of the LoRA weights in {folder} cannot be loaded: {error}") from error
    base.vlm.to(dtype)
    if digest(base.vlm.state_dict()) != description["base_sha256"]:
        raise PolicyError(
            f"The LoRA weights in {folder} belong to another base model than {saved.policy!r} gives here: install the "
            "versions of its run, or merge the weights there."
        )
    return base
