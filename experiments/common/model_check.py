"""Everything that check_model.py finds out about a model, one line after another as it is found; imports torch.

    load ─► compare with plain transformers ─► generate ─► act, timed ─► gradients of each part ─► update, timed

The model is loaded once: what learns is marked on it anew for each `--trainable`, LoRA last, since it goes into the
model. Weights stay as they are: the optimizer of the timed update has learning rate 0.
"""

import dataclasses
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor

from manako.agent.rng import make_rng
from manako.envs import Observations
from manako.errors import ManakoError, first_line, full_text, type_and_text
from manako.experiments.common.building import check_instruction, place, quiet_libraries
from manako.experiments.common.command_line import show
from manako.experiments.common.environments import make_vector_env, sights
from manako.experiments.common.model_table import Row
from manako.experiments.common.run_folder import policy_folder
from manako.experiments.common.settings import CheckModelCommand
from manako.policies import PolicySource, VLMPolicy
from manako.policies.answers.bins import BinCodec
from manako.policies.architectures import ROWS
from manako.policies.architectures.model import Model
from manako.policies.interface import Draws, Rows
from manako.policies.loading import load_model, put_policy_around
from manako.policies.pretrained import quietly
from manako.policies.reading import SharedPrefix
from manako.policies.room import Needed, cache_bytes, check_training_room, free_memory, in_words, needed, row_bytes
from manako.policies.sensitivity import sensitivity
from manako.policies.text_policy import TextPolicy
from manako.policies.trainable import READY_MADE, parameter_table, part_of, parts_of, set_trainable
from manako.spaces import is_vector, random_vectors

HOLDS, DOES_NOT_HOLD, CANNOT_BE_LOADED = 0, 1, 2  # exit codes
UPDATE_BATCH = 8  # samples of the forward and backward that shows gradients, and of the timed update
NEW_TOKENS = 4  # that `generate` says
TIMES, SECONDS = 3, 5.0  # a work is timed so often, but not again after so long


class Shown(NamedTuple):
    """What the environments show."""

    action_names: tuple[str, ...]
    frame_shape: tuple[int, int, int]
    seen: Observations  # of N environments
    sights: tuple[np.ndarray, list[str]]  # of several episodes, see `environments.sights`
    action_space: gym.Space | None = None  # where the actions may be vectors


class Learning(NamedTuple):
    """What one `trainable` does."""

    arrived: dict[str, bool]  # part -> whether a gradient other than 0 reaches it
    fault: str = ""  # why it was refused, or failed
    refused: bool = False  # it was not tried, as where no module stands between encoder and language model
    need: Needed | None = None  # memory; None where nothing could be marked
    rate: float | None = None  # samples a second of an update, where it was timed

    @property
    def holds(self) -> bool:
        """Whether every part that should learn gets a gradient."""
        return not self.fault and bool(self.arrived) and all(self.arrived.values())

    @property
    def text(self) -> str:
        """What the parts get, in words."""
        if self.fault:
            return f"no: {self.fault}"
        reached = [_in_words(part) for part, has in self.arrived.items() if has]
        missed = [_in_words(part) for part, has in self.arrived.items() if not has]
        text = f"{_listed(reached)} {'get' if len(reached) > 1 else 'gets'} a gradient" if reached else ""
        nothing = f"no gradient reaches {_listed(missed)}" if missed else ""
        return "; ".join(filter(None, [text, nothing]))


def check_models(command: CheckModelCommand) -> list[tuple[Row, int]]:
    """Checks the models one after another on what the environment shows; returns a row and an exit code of each.

    Raises:
        EnvError: the environment breaks.
        PolicyError: no such parts to train.
    """
    parts_of(command.policy.trainable)
    quiet_libraries()
    torch.manual_seed(0)
    env = make_vector_env(command.environment, command.environment.num_envs, seed=0, held_out=True)
    try:
        seen, played = env.reset(), sights(command.environment, 0)
        shown = Shown(env.action_names, env.frame_shape, seen, played, env.action_space)
    finally:
        env.close()
    checked = []
    for number, name in enumerate(command.check.models):
        if number:
            print()
        checked.append(check_model(name, command, shown))
    return checked


def check_model(name: str, command: CheckModelCommand, shown: Shown) -> tuple[Row, int]:
    """Checks one model and prints what it finds.

    Returns:
        Its row of the table, and an exit code.
    """
    show("model", name)
    family = Path(name).name
    try:
        source = dataclasses.replace(command.policy, policy=policy_folder(name))
        loaded = load_model(dataclasses.replace(source, trainable="full"), shown.action_names, shown.frame_shape)
    except ManakoError as error:
        print(f"error: {full_text(error)}", file=sys.stderr, flush=True)
        return Row(family, acts="no", needs=missing_package(error)), CANNOT_BE_LOADED
    show("family", family_of(loaded.model))
    row = Row(family, acts="no", needs=needs(loaded.model))
    try:
        policy = put_policy_around(
            loaded.model, loaded.source, shown.action_names, shown.frame_shape, shown.action_space
        )
        policy = place(policy, name, command.check.torch_threads)
        check_instruction(command.environment.instruction, policy)
        inputs = policy.prepare(shown.seen.images, shown.seen.instructions)
    except Exception as error:  # no model ends the check of those after it
        show("acts", f"no: {full_text(error) if isinstance(error, ManakoError) else type_and_text(error)}")
        return row, DOES_NOT_HOLD
    faults = [] if describe(policy, shown) else ["generate"]
    acting = acting_rate(policy, shown)
    modes = sorted(dict.fromkeys((*READY_MADE, source.trainable)), key=lambda mode: "lora" in parts_of(mode))
    learned = {}
    for mode in modes:
        learned[mode] = learning(policy, source, mode, inputs, timed=mode == source.trainable)
        show("learns" if mode == modes[0] else "", f"{mode}: {learned[mode].text}")
    asked = learned[source.trainable]
    faults += [mode for mode, found in learned.items() if not found.holds and (found is asked or not found.refused)]
    show("needs", needs_in_words(loaded.model))
    show("memory", memory_in_words(policy, inputs, asked.need, command))
    show("speed", speed_in_words(policy, acting, asked.rate, command))
    prefix = f"{len(policy.reading.prefix_ids)} tokens" if isinstance(policy.reading, SharedPrefix) else "no"
    full, adapter, lora = (_short(learned[mode]) for mode in READY_MADE)
    return Row(family, "yes", full, adapter, lora, prefix, row.needs), DOES_NOT_HOLD if faults else HOLDS


# ---- what it is and how it acts --------------------------------------------------------------------------------------


def family_of(model: Model) -> str:
    """Returns kind, class, and who names the parts."""
    kind = model.base_vlm.config.model_type
    named = f"named by policies/architectures/{ROWS[kind].replace('.', '/')}.py" if kind in ROWS else "guessed"
    return f"{kind}, {type(model.base_vlm).__name__}; its parts are {named}"


def describe(policy: VLMPolicy, shown: Shown) -> bool:
    """Prints what the policy is and how it acts; returns whether `generate` works."""
    show("parts", parts_in_words(policy))
    checked, (height, width, _) = policy.checked, shown.frame_shape
    assert checked is not None
    show(
        "acts",
        f"yes, as transformers computes it: off by {checked.alone:.1g} of the largest value alone and "
        f"{checked.padded:.1g} in a padded batch, up to {checked.tolerance:.0g} is allowed; "
        f"frames of {height} x {width}",
    )
    show("reads", reading_in_words(policy))
    show("answers", answers_in_words(policy))
    own = shown.seen.instructions[0]
    lengths = len(policy.prompt_tokens("")), len(policy.prompt_tokens(own))
    show("image", f"{image_tokens(policy, shown)} tokens a frame; pixels by {_pixels(policy)}")
    show("prompt", f"{lengths[0]} tokens with no instruction, {lengths[1]} with {own!r}")
    state = sensitivity(policy, *shown.sights)
    show("state", state.text)
    for warning in state.warnings:
        show("", f"warning: {warning}")
    if policy.parts.one_token_answers:
        show("generate", "not asked: it answers with one token at a mask")
        return True
    said, fault = generated(policy, shown)
    show("generate", f"no: {fault}" if fault else f"works, {NEW_TOKENS} tokens: {said!r}")
    return not fault


def parts_in_words(policy: VLMPolicy) -> str:
    """Returns the parts with their parameters and where they are in the model."""
    places = {
        "encoder": policy.parts.encoder,
        "adapter": ", ".join(policy.parts.adapter),
        "language model": policy.parts.decoder,
    }
    table = parameter_table(policy.parts, policy.value_head)
    texts = [f"{part} {count:,}" + (f" ({places[part]})" if places.get(part) else "") for part, count, _ in table]
    unknown = [part for part, place in places.items() if not place]
    texts += [f"no {' and no '.join(unknown)} known by name"] if unknown else []
    return f"{'; '.join(texts)}; {sum(count for _, count, _ in table):,} parameters in all"


def reading_in_words(policy: VLMPolicy) -> str:
    """Returns how prompts are read, and why not by a shared prefix."""
    if isinstance(policy.reading, SharedPrefix):
        return policy.reading.name
    return f"{policy.reading.name}; no shared prefix: {policy.why_whole or 'its family is not read so'}"


def answers_in_words(policy: VLMPolicy) -> str:
    """Returns the format and each action's tokens as text."""
    decode, codec = policy.processor.tokenizer.decode, policy.codec
    if isinstance(policy, TextPolicy):
        return f"as text: {policy.legend()}, in {policy.text.longest} tokens at most"
    if isinstance(codec, BinCodec):
        return f"as {codec.format}: {codec.legend}, such as {codec.answers[0]!r}"
    said = [" + ".join(repr(decode([token])) for token in tokens) for tokens in codec.token_ids]
    return f"as {codec.format}: " + ", ".join(f"{name} {text}" for name, text in zip(codec.names, said, strict=True))


@torch.no_grad()
def image_tokens(policy: VLMPolicy, shown: Shown) -> int:
    """Returns how many places of the language model's input a frame takes, or how many features it becomes.

    They are the image's tokens in the prompt; where these are none, or one for all, they are what the adapter gives, or
    the encoder, where the adapter is layers of cross-attention.
    """
    one = _one(policy, shown)
    given = policy.processing.model_inputs(one)
    ids = given["input_ids"][0]
    in_prompt = int((ids == policy.parts.placeholder_id).sum()) if policy.parts.placeholder_id is not None else 0
    if in_prompt > 1:
        return in_prompt // policy.spec.frames
    made: list[int] = []
    modules = dict(policy.base_vlm.named_modules())

    def note(module: torch.nn.Module, args: Any, output: Any) -> None:
        features = output if torch.is_tensor(output) else output[0]
        made.append(features.numel() // features.shape[-1])

    seeing = [modules[name] for name in (policy.parts.encoder, *policy.parts.adapter) if name in modules]
    hooks = [module.register_forward_hook(note) for module in seeing]
    try:
        policy.base_vlm(**given, **_start(policy), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return made[-1] if made else in_prompt


@torch.no_grad()
def generated(policy: VLMPolicy, shown: Shown) -> tuple[str, str]:
    """Returns what the library's `generate` says to the first prompt, or why it does not."""
    given = policy.processing.model_inputs(_one(policy, shown))
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": NEW_TOKENS}
    try:
        with quietly():
            ids = policy.base_vlm.generate(**given, **_start(policy), **options)[0].tolist()
    except Exception as error:  # whatever a family's own generate raises
        return "", f"{type(error).__name__}: {first_line(error)}"
    prompt = list(policy.parts.answer_start) or given["input_ids"][0].tolist()
    said = ids[len(prompt) :] if ids[: len(prompt)] == prompt else ids
    return str(policy.processor.tokenizer.decode(said)), ""


def _start(policy: VLMPolicy) -> dict[str, Tensor]:
    """What an encoder-decoder's decoder begins with."""
    start = policy.parts.answer_start
    return {"decoder_input_ids": torch.tensor([start], device=policy.device)} if start else {}


def _one(policy: VLMPolicy, shown: Shown) -> Rows:
    return policy.prepare(shown.seen.images[:1], shown.seen.instructions[:1]).to(policy.device)


def _pixels(policy: VLMPolicy) -> str:
    return "table" if policy.processing.pipeline.is_table else "the library's processor"


# ---- what learns -----------------------------------------------------------------------------------------------------


def learning(policy: VLMPolicy, source: PolicySource, trainable: str, inputs: Rows, timed: bool) -> Learning:
    """Marks what learns, and runs one forward and backward: -log-probability of each action, so that none is certain.

    Args:
        policy: without LoRA, as it is again afterwards.
        source: for the rank of LoRA.
        trainable: see `manako.policies.trainable`.
        inputs: rows of frames.
        timed: also time updates.
    """
    need = None
    space = policy.spec.action_space
    count = max(1 if is_vector(space) else len(policy.codec), min(UPDATE_BATCH, len(inputs)))
    generator = np.random.default_rng(0)
    taken = random_vectors(space, lambda: generator.random(count)) if is_vector(space) else np.arange(count)
    try:
        with _marked(policy, source, trainable) as model:
            need = needed(policy)
            check_training_room(policy, trainable, policy.device)
            rows = inputs.select(torch.arange(count) % len(inputs)).to(policy.device)
            actions = policy.actions_from_env(taken if is_vector(space) else taken % len(policy.codec))
            actions = actions.to(policy.device)
            _backward(policy, rows, actions)
            arrived: dict[str, bool] = {}
            for name, parameter in model.vlm.named_parameters():
                if parameter.requires_grad:
                    part, gradient = part_of(name, model), parameter.grad
                    arrived[part] = arrived.get(part, False) or (gradient is not None and bool(gradient.any()))
            return Learning(arrived, need=need, rate=update_rate(policy, rows, actions) if timed else None)
    except ManakoError as error:
        return Learning({}, full_text(error), refused=True, need=need)
    except Exception as error:  # PEFT's, a family's own backward, or a GPU's memory: the others are still asked
        return Learning({}, f"{type(error).__name__} in a batch of {count}: {first_line(error)}", need=need)
    finally:
        policy.zero_grad(set_to_none=True)


@contextmanager
def _marked(policy: VLMPolicy, source: PolicySource, trainable: str) -> Iterator[Model]:
    """Marks what learns inside the block; LoRA goes into the policy's own model, and out of it again."""
    with quietly():
        model = set_trainable(policy.parts, trainable, source.lora_rank, source.lora_alpha)
    policy.value_head.requires_grad_("value_head" in parts_of(trainable))
    try:
        yield model
    finally:
        if "lora" in parts_of(trainable):
            model.vlm.unload()


def _backward(policy: VLMPolicy, rows: Rows, actions: Rows) -> None:
    (-policy.evaluate_actions(rows, actions).logprobs.mean()).backward()


# ---- speed and room --------------------------------------------------------------------------------------------------


def acting_rate(policy: VLMPolicy, shown: Shown) -> float:
    """Returns env steps a second of `prepare` and `act`, N at a time; the environments' own time is not in it."""
    draws = Draws([make_rng(0)] * len(shown.seen.images))

    def work() -> int:
        policy.act(policy.prepare(shown.seen.images, shown.seen.instructions), draws)
        return len(shown.seen.images)

    with policy.frozen_weights():
        return rate_of(work, policy.device)


def update_rate(policy: VLMPolicy, rows: Rows, actions: Rows) -> float:
    """Returns samples a second of forward, backward and a step of AdamW, at learning rate 0."""
    learning = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=0.0, weight_decay=0.0)

    def work() -> int:
        optimizer.zero_grad()
        _backward(policy, rows, actions)
        optimizer.step()
        return len(rows)

    return rate_of(work, policy.device)


def rate_of(work: Callable[[], int], device: torch.device) -> float:
    """Returns units a second: the median of a few runs after one that warms up."""
    rates: list[float] = []
    began = time.perf_counter()
    for _ in range(1 + TIMES):
        start = time.perf_counter()
        units = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rates.append(units / (time.perf_counter() - start))
        if time.perf_counter() - began > SECONDS:
            break
    return statistics.median(rates[1:] or rates)


@torch.no_grad()
def memory_in_words(policy: VLMPolicy, inputs: Rows, need: Needed | None, command: CheckModelCommand) -> str:
    """Returns what weights, training, cache and rollout take, and what is free."""
    training = (
        ""
        if need is None
        else (
            f"; gradients {in_words(need.gradients)} and AdamW's moments {in_words(need.moments)} with trainable "
            f"{command.policy.trainable}"
        )
    )
    num_envs, num_steps = command.environment.num_envs, command.check.num_steps
    cache = "no cache, for whole prompts are read"
    if isinstance(policy.reading, SharedPrefix):
        a_token = cache_bytes(policy.reading.run_prefix()) // len(policy.reading.prefix_ids)
        longest = int(inputs["lengths"].max())
        cache = f"cache {in_words(a_token * longest)} an environment ({longest} tokens of {in_words(a_token)})"
    return (
        f"weights {in_words((need or needed(policy)).weights)}{training}; {cache}; rollout of {num_envs} x {num_steps} "
        f"steps {in_words(row_bytes(inputs) * num_envs * num_steps)}; free now {in_words(free_memory(policy.device))}"
    )


def speed_in_words(policy: VLMPolicy, acting: float, updating: float | None, command: CheckModelCommand) -> str:
    """Returns the two rates and what they were measured on."""
    update = "" if updating is None else f", {updating:,.0f} samples/s of an update ({command.policy.trainable})"
    return (
        f"{acting:,.0f} steps/s acting in {command.environment.num_envs} environments{update}; "
        f"{device_in_words(policy.device)}"
    )


def device_in_words(device: torch.device) -> str:
    """Returns the name of what was measured."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", info.read_text(encoding="utf-8") if info.is_file() else "", re.M)
    threads = torch.get_num_threads()
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{device.type}, {name}, {threads} thread{'s' if threads > 1 else ''}"


# ---- what it needs ---------------------------------------------------------------------------------------------------


def lacks_video(model: Model) -> bool:
    """Returns whether the processor was loaded without its video part."""
    return isinstance(getattr(model.processor, "video_processor", None), SimpleNamespace)


def needs(model: Model) -> str:
    """Returns what a loaded model needs, for the table."""
    return "nothing, without its video part" if lacks_video(model) else "nothing"


def needs_in_words(model: Model) -> str:
    """Returns the same as a sentence."""
    video = "; its video part, which wants torchvision, is left out"
    return f"nothing that is not installed{video if lacks_video(model) else ''}"


def missing_package(error: ManakoError) -> str:
    """Returns the package that a model could not be loaded without, or "-" where that is not why."""
    cause = error.__cause__
    if not isinstance(cause, ImportError):
        return "-"
    found = re.search(r"requires the (\w+) library|pip install (\S+)", str(cause))
    named = next(filter(None, found.groups()), None) if found else cause.name
    return str(named or "-").strip("`.").lower()


def _short(learning: Learning) -> str:
    """A cell of the table."""
    if learning.holds:
        return "yes"
    reached = [_in_words(part) for part, has in learning.arrived.items() if has]
    return f"{_listed(reached)} alone" if reached else "no"


def _in_words(part: str) -> str:
    return "LoRA" if part == "lora" else part.replace("_", " ")


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
