"""The VLM policy: frames and instructions in, probabilities of a closed set of actions and a value out.

In order of execution: `prepare` makes the rows that rollouts store (prompt ids, frames as uint8), never to be rendered,
prompted or tokenized again; `distribution` is the one forward, which `act` samples from and `evaluate_actions`
differentiates. How the model is run over the rows is its `reading`: a prefix that all prompts share, checked here
against whole prompts, or whole prompts. Dropout is off, in rollouts and in updates, since PPO compares the two.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from manako.errors import first_line
from manako.policies.adapters import Adapter
from manako.policies.answers.closed_set import ActionCodec
from manako.policies.architectures.model import Model
from manako.policies.architectures.pretraining import Pretraining
from manako.policies.architectures.vision_tokens.next_frame import NextFrame
from manako.policies.errors import PolicyError
from manako.policies.features import MOST_BYTES, FrozenFeatures
from manako.policies.interface import (
    ACTION_MASK,
    NEXT_CODES,
    Acted,
    Draws,
    Evaluated,
    Messages,
    Policy,
    PolicySpec,
    Rows,
    act_categorical,
    allow,
    entropy,
)
from manako.policies.prompts import EXAMPLES, PromptBuilder
from manako.policies.reading import Reading, SharedFrame, SharedPrefix, WholePrompt
from manako.policies.reading.shared_frame import shown
from manako.policies.reading.shared_prefix import find_prefix
from manako.policies.saving import load_weights, save_policy
from manako.policies.self_check import Differences, Library
from manako.policies.trainable import parameter_groups


class ValueHead(nn.Module):
    """Hidden states to values; the last layer starts at zero, so that the first values are 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Returns values (B,) of hidden states (B, D), in float32 whatever the rest is computed in."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.out(self.norm(hidden.float())).squeeze(-1)


class VLMPolicy(Policy):
    """A vision-language model that acts by naming one of a closed set of actions.

    Args:
        model: the model and what stands where in it.
        spec: actions, frame shape and prompt.
        check: compare with the library's own forward; refuse a model whose numbers differ, and do without the shared
            prefix where its numbers do.

    Raises:
        PolicyError: the processor or the tokenizer cannot serve these actions or frames, or the model's numbers are not
            the library's.

    Attributes:
        vlm: the model, with PEFT around it where there is LoRA.
        parts: what stands where in it.
        reading: how it is run.
        processing: frames and prompts to the model's inputs.
        whole_prompt: the model's own forward.
        next_frame: the next frame's codes; None where the model predicts none.
        next_frame_coef: weight of their loss.
        checked: how far `whole_prompt` is from the library; None where that was not asked.
        why_whole: why it reads whole prompts although its architecture names a faster reading; None where it does not.
        origin: where the model came from; loading.py fills it, saving.py writes it.
    """

    can_learn = True

    def __init__(self, model: Model, spec: PolicySpec, check: bool = True) -> None:
        super().__init__()
        self.vlm, self.processor, self.parts, self.spec = model.vlm, model.processor, model, spec
        self.value_head = ValueHead(self.base_vlm.get_output_embeddings().weight.shape[1]).to(self.base_vlm.device)
        told = spec.action_names if spec.history else None
        self.prompts = PromptBuilder(model, spec.system, spec.frame_shape, spec.frames, told, spec.image_first)
        past = {"past_frames": spec.frames > 1, "past_turns": spec.history > 0}
        self.needs = ("action_masks", *(name for name, is_needed in past.items() if is_needed))
        self.processing = self.prompts.processing
        tokenizer = self.processor.tokenizer
        end = tokenizer.convert_tokens_to_ids(self.prompts.end_token) if self.prompts.end_token else None
        self.codec = self._make_codec(end)
        self._check_answers()
        closed = isinstance(self.codec, ActionCodec)
        self.next_frame = NextFrame(model, self.processing, self.codec) if model.predicts_frames and closed else None
        self.next_frame_coef = 0.0
        self.prompts.legend = self.legend()
        self.learns_text = not model.one_token_answers
        positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        self.max_length = positions - self.longest_answer if positions else math.inf
        self.origin: dict[str, Any] = {}
        self.why_whole: str | None = None
        self.eval()
        kind = WholePrompt if model.reading is SharedPrefix else model.reading
        self.whole_prompt = kind(model, self.codec, self.processing)
        self.reading: Reading = self.whole_prompt
        self.checked: Differences | None = None
        library = self._ask_library() if check else None
        self.reading = self._select_reading(library)
        self._store_features(library)

    # ---- what it is ----------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        """What TRL's trainers train."""
        return self.vlm

    @property
    def base_vlm(self) -> Any:
        """The model itself, without PEFT's wrapper."""
        return self.parts.base_vlm

    @property
    def format(self) -> str:
        """How actions are said, as `action_format` names it."""
        return self.codec.format

    @property
    def ends(self) -> bool:
        """Whether the end token closes every answer."""
        return self.codec.ends

    @property
    def longest_answer(self) -> int:
        """In tokens."""
        return max(map(len, self.codec.token_ids))

    def legend(self) -> str:
        """Returns how the prompt lists the actions."""
        return self.codec.legend

    @property
    def has_lora(self) -> bool:
        """Whether PEFT wraps the model."""
        return hasattr(self.vlm, "peft_config")

    @property
    def config(self) -> Any:
        """The model's configuration; transformers' Trainer asks for it."""
        return self.base_vlm.config

    @property
    def device(self) -> torch.device:
        """Where the value head, and with it the model's output, lives."""
        return self.value_head.out.weight.device

    def train(self, mode: bool = True) -> "VLMPolicy":
        """Marks the policy as in training; dropout stays off, for the ratio of PPO must start at 1."""
        super().train(mode)
        self.vlm.eval()
        return self

    # ---- from a frame to an action -------------------------------------------------------------------------------

    def prepare(
        self, images: np.ndarray, instructions: Sequence[str], told: Mapping[str, np.ndarray] | None = None
    ) -> Rows:
        """Returns rows of `input_ids` (B, L) int64, `lengths` (B,) int64 and `frames` (B, h, w, 3) uint8, resized.

        Beside them stands whatever else the processor makes of the prompts' text, and of a frozen encoder, where they
        are small, the features of the frames: `image_features` (B, P, Dv) float32, see `manako.policies.features`. Of
        environments that say what is allowed, `action_mask` (B, A) bool.

        Raises:
            PolicyError: frames of another shape than the policy was built for, masks of another number of actions, or
                an instruction that the tokenizer or the model cannot hold.
        """
        self._check_frames(images)
        told = told or {}
        turns = told.get("past_turns", [None] * len(images))
        asked = [(text, self._past(each)) for text, each in zip(instructions, turns, strict=True)]
        for instruction, past in set(asked):
            self._check_prompt(self.prompts.encode(instruction, past), instruction)
        prompts = [self.prompts.prompt(instruction, past) for instruction, past in asked]
        rows = self.processing.with_features(self.processing.rows(prompts, self._with_past(images, told)))
        if "action_masks" not in told:
            return rows
        mask = torch.from_numpy(np.array(told["action_masks"], bool))  # (B, A)
        if mask.shape != (len(images), len(self.codec)) or not mask.any(-1).all():
            raise PolicyError(
                f"Action masks of shape {tuple(mask.shape)} came for {len(images)} frames and {len(self.codec)} "
                "actions: expected one row a frame, with an action in each that is allowed."
            )
        return rows.with_column(ACTION_MASK, mask)

    def _past(self, turns: np.ndarray | None) -> str:
        """What was done before in words: the last of turns (turns, 2), as many as the prompt tells."""
        return self.prompts.past(None if turns is None else turns[len(turns) - self.spec.history :])

    def _with_past(self, images: np.ndarray, told: Mapping[str, np.ndarray]) -> np.ndarray:
        """Frames (B, H, W, 3), behind those before them where it sees several: (B, k, H, W, 3)."""
        before = self.spec.frames - 1
        if not before:
            return images
        black = np.zeros((len(images), before, *images.shape[1:]), np.uint8)
        past = told.get("past_frames", black)
        return np.concatenate([past[:, past.shape[1] - before :], images[:, None]], axis=1)

    def distribution(self, inputs: Rows, reading: Reading | None = None) -> tuple[Tensor, Tensor]:
        """Returns log-probabilities (B, A) and values (B,), float32; gradients flow where they are enabled.

        Where the rows say what is allowed, all else has log-probability -inf, and the rest adds up to 1.

        Args:
            inputs: of `prepare`, on the policy's device.
            reading: another reading than the policy's own, to compare the two.
        """
        hidden, logits = (reading or self.reading).read(inputs)
        logprobs = self.codec.action_logprobs(logits)
        if ACTION_MASK in inputs.columns:
            logprobs = allow(logprobs, inputs[ACTION_MASK])
        return logprobs, self.value_head(hidden)

    @torch.no_grad()
    def act(self, inputs: Rows, draws: Draws, greedy: bool = False) -> Acted:
        """Returns B actions with S = 1: sampled, or the greedy ones."""
        logprobs, values = self.distribution(inputs.to(self.device))
        return act_categorical(logprobs, values, draws, greedy)

    def evaluate_actions(self, inputs: Rows, actions: Rows) -> Evaluated:
        """Returns log-probabilities and entropy (B, 1), values (B,) and the distribution (B, A)."""
        logprobs, values = self.distribution(inputs)
        taken = logprobs.gather(1, actions["index"][:, None])  # (B, 1)
        losses = self.own_losses(inputs, actions) if torch.is_grad_enabled() else {}
        return Evaluated(taken, entropy(logprobs)[:, None], values, logprobs, losses)

    def shared_work(self, inputs: Rows) -> Tensor | None:
        """Returns (B,) which frame each sample shows, where samples of a frame share its forward."""
        if not isinstance(self.reading, SharedFrame):
            return None
        numbers: dict[bytes, int] = {}
        return torch.tensor([numbers.setdefault(key, len(numbers)) for key in shown(inputs)])

    def own_losses(self, inputs: Rows, actions: Rows) -> dict[str, Tensor]:
        """Returns the loss on the next frame's codes, weighted, where the rows hold them."""
        if NEXT_CODES not in inputs:
            return {}
        assert self.next_frame is not None, "rows with codes are of a policy that predicts"
        return {"next_frame_loss": self.next_frame_coef * self.next_frame.loss(inputs, actions["index"].tolist())}

    def see_next(self, inputs: Rows, images: np.ndarray) -> Rows:
        """Returns the rows with the next frames' codes (B, P) int64 where their loss counts."""
        if not self.next_frame_coef:
            return inputs
        assert self.next_frame is not None, "checked where the coefficient is set"
        return inputs.with_column(NEXT_CODES, self.next_frame.codes(images))

    @torch.no_grad()
    def predict_values(self, inputs: Rows) -> Tensor:
        """Returns the values (B,) on the CPU."""
        return self.value_head(self.reading.read_hidden(inputs.to(self.device))).cpu()

    # ---- weights -------------------------------------------------------------------------------------------------

    @contextmanager
    def frozen_weights(self) -> Iterator[None]:
        """Computes what the prompts share once inside the block, without gradients, since no weight changes."""
        with self.reading.frozen_weights():
            yield

    def parameter_groups(
        self, learning_rate: float, adapter_learning_rate: float | None = None
    ) -> list[dict[str, Any]]:
        """Returns what learns as one group, or the adapter as a group of its own where it has its own rate."""
        return parameter_groups(self.parts, self.value_head, learning_rate, adapter_learning_rate)

    @torch.no_grad()
    def fit_adapter(self, images: np.ndarray) -> list[str]:
        """Gives adapters that learn and want statistics those of the frames (N, H, W, 3) uint8, once.

        Returns:
            The names of the adapters that were fitted.
        """
        wanting = {
            name: module
            for name, module in self.vlm.named_modules()
            if isinstance(module, Adapter) and not module.is_fitted
            if all(parameter.requires_grad for parameter in module.parameters())
        }
        if not wanting:
            return []
        pipeline = self.processing.pipeline
        frames = pipeline.resize(images).to(self.device)
        see = self.base_vlm.model.get_vision_features
        features = torch.cat([see(**pipeline.pixels(part)) for part in frames.split(32)])  # (N, P, Dv)
        return [name for name, adapter in wanting.items() if adapter.fit(features)]

    @property
    def has_reference(self) -> bool:
        """Whether there is LoRA to switch off."""
        return self.has_lora

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Switches LoRA off and the original adapter on inside the block: the policy as it was when training started.

        Raises:
            PolicyError: the policy has no LoRA to switch off.
        """
        if not self.has_lora:
            raise PolicyError("This policy has no LoRA to switch off: expected trainable: lora for a reference.")
        with torch.no_grad(), self.vlm.disable_adapter(), self.reading.frozen_weights():
            yield

    # ---- in words ------------------------------------------------------------------------------------------------

    def actions_from_env(self, to_env: np.ndarray, thoughts: Sequence[str] | None = None) -> Rows:
        """Returns the rows of actions (B,) int64."""
        return Rows({"index": torch.as_tensor(np.asarray(to_env), dtype=torch.int64)})

    def prompt(self, instruction: str, turns: np.ndarray | None = None) -> str:
        """Returns the whole prompt of the cleaned instruction as text, a placeholder for each image in it."""
        return self.prompts.render(self.prompts.clean(instruction), turns)

    def prompt_tokens(self, instruction: str, turns: np.ndarray | None = None) -> list[int]:
        """Returns the same as token ids, placeholders expanded."""
        return list(self.prompts.encode(instruction, self.prompts.past(turns)))

    def messages(self, instruction: str, turns: np.ndarray | None = None) -> list[dict[str, Any]]:
        """Returns the same as chat messages."""
        return self.prompts.messages(self.prompts.clean(instruction), turns)

    def pretraining(self, stage: str) -> Pretraining | None:
        """Returns the architecture's own losses for a stage, see `Policy`; heads of them are new each time."""
        make = self.parts.pretraining.get(stage)
        return None if make is None else make(self.parts, self.processing).to(self.device)

    def training_inputs(
        self, images: np.ndarray, prompts: Sequence[Messages], completions: Sequence[Messages]
    ) -> dict[str, Tensor]:
        """Returns what the model is given of B prompts, each followed by its completion; see `Policy`.

        An encoder-decoder is given the prompts as `encoder_input_ids` and `encoder_attention_mask`, and the completions
        behind the tokens that its decoder begins with as `input_ids`.
        """
        self._check_frames(images)
        texts = [
            self.prompts.completed(prompt, completion, self.ends)
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        rows = self.processing.rows([self.prompts.tokenized(prompt) for prompt, _ in texts], images)
        rows = self.processing.with_features(rows)
        return self.processing.training_inputs(rows, [self.prompts.answer_to(*text) for text in texts])

    def answers(self, actions: Rows) -> list[str]:
        """Returns what the policy says for each action."""
        return [self.codec.answers[index] for index in actions["index"].tolist()]

    def answer_tokens(self, actions: Rows) -> list[list[int]]:
        """Returns the same as token ids."""
        return [list(self.codec.token_ids[index]) for index in actions["index"].tolist()]

    def describe(self) -> list[tuple[str, str]]:
        """Returns how actions are said and how the model is run, for a run's header."""
        off = f" (no shared prefix: {self.why_whole})" if self.why_whole else ""
        pixels = "table" if self.processing.pipeline.is_table else "the library's processor"
        dtype = str(self.base_vlm.dtype).removeprefix("torch.")
        lines = [("replaced", f"{' and '.join(self.parts.replaced)}: new")] if self.parts.replaced else []
        lines += [
            ("answers", f"as {self.format}"),
            ("forward", f"{self.reading.name}{off}; pixels by {pixels}; {self.device}, {dtype}"),
        ]
        features = self.processing.features
        if features is not None and features.is_frozen:
            size = f"{features.shape[0]} x {features.shape[1]}, {features.nbytes:,} bytes a step"
            lines.append(("features", f"of the frozen encoder, computed once a frame and stored: {size}"))
        return lines

    # ---- on disk -------------------------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> None:
        """Writes a model folder, see `manako.policies.saving`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_policy(self, folder)

    def load_weights(self, folder: Path) -> None:
        """Reads the weights that `save` wrote."""
        load_weights(self, folder)

    # ---- checks --------------------------------------------------------------------------------------------------

    def _ask_library(self) -> Library:
        """What plain transformers says about the examples."""
        turns = self._example_turns()
        texts = [self.prompts.render(text, each) for text, each in zip(EXAMPLES, turns, strict=True)]
        return Library(self.processing, self.codec, texts, self._with_past(*self._example_frames()))

    def _example_frames(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Frames (B, H, W, 3), and those before them."""
        shape = (len(EXAMPLES), self.spec.frames, *self.spec.frame_shape)  # (B, k, H, W, 3)
        frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
        return frames[:, -1], {"past_frames": frames[:, :-1]}

    def _example_turns(self) -> np.ndarray:
        """What was done before (B, history, 2): nothing in the first example, all that is told in the last."""
        turns = np.full((len(EXAMPLES), self.spec.history, 2), -1.0)
        turns[-1, :, 0] = np.arange(self.spec.history) % len(self.spec.action_names)
        turns[-1, :, 1] = -0.25 * (np.arange(self.spec.history) % 2)
        return turns

    def _examples(self) -> tuple[list[Rows], Rows]:
        """The examples as rows, each alone and all of them padded."""
        frames, told = self._example_frames()
        told["past_turns"] = self._example_turns()
        alone = [
            self.prepare(
                frames[row : row + 1], [instruction], {name: value[row : row + 1] for name, value in told.items()}
            ).to(self.device)
            for row, instruction in enumerate(EXAMPLES)
        ]
        return alone, self.prepare(frames, EXAMPLES, told).to(self.device)

    def _select_reading(self, library: Library | None) -> Reading:
        """The reading that the architecture names where it holds here, else whole prompts."""
        if library is not None:
            alone, together = self._examples()
            self.checked = self._compare(library, alone, together)
        if self.parts.reading is not SharedPrefix:
            return self.whole_prompt
        assert self.parts.placeholder_id is not None, "visual tokens replace it"
        special = self.processor.tokenizer.all_special_ids
        prompt = self.prompts.encode(EXAMPLES[0])
        prefix = find_prefix(self.prompts.encode, self.parts.placeholder_id, special)
        if not len(prefix):
            self.why_whole = "the prompts share nothing before the image"
            return self.whole_prompt
        shared = SharedPrefix(self.parts, self.codec, self.processing, prefix)
        if self.spec.image_first and self.parts.positions is None and not self.processing.of_text:
            start = 1 + max(place for place, token in enumerate(prompt) if token == self.parts.placeholder_id)
            shared = SharedFrame(self.parts, self.codec, self.processing, prefix, start)
        shared.longest_answer = self.longest_answer
        if library is not None:
            try:
                if shared.is_beyond_window(together):
                    self.why_whole = "a sliding window is shorter than the prompts"
                    return self.whole_prompt
                found = library.compare(shared, alone, together)
            except Exception as error:  # a model without `.model`, or with a cache of its own: the header says it
                self.why_whole = f"the model refused it, {type(error).__name__}: {first_line(error)}"
                return self.whole_prompt
            if not found.hold:
                off = f"{found.worst:.1g} of the largest value"
                self.why_whole = f"it differs from the model's own forward by {off}"
                return self.whole_prompt
            if isinstance(shared, SharedFrame) and not self._holds_for_one_frame(shared, found.tolerance):
                return SharedPrefix(self.parts, self.codec, self.processing, prefix)
        return shared

    @torch.no_grad()
    def _holds_for_one_frame(self, shared: SharedFrame, tolerance: float) -> bool:
        """Whether samples that share a frame, and the beginning of what follows it, are read as whole prompts are."""
        frames, told = self._example_frames()
        rows, texts = [0, 0, 1, 0], [*EXAMPLES, EXAMPLES[1], f"{EXAMPLES[0]} {EXAMPLES[0]}"]
        told = {name: value[rows] for name, value in told.items()}
        inputs = self.prepare(frames[rows], texts, told).to(self.device)
        right = self.whole_prompt.read(inputs).hidden
        return bool((shared.read(inputs).hidden - right).abs().max() <= tolerance * right.abs().max())

    def _store_features(self, library: Library | None) -> None:
        """Stores a frozen encoder's features where they are small and the library says the same of them."""
        pipeline = self.processing.pipeline
        if self.parts.see is None or self.parts.encoder is None or not pipeline.is_table:
            return
        features = FrozenFeatures(self.parts, pipeline, self.spec.frame_shape)
        if not features.is_frozen or features.nbytes > MOST_BYTES:
            return
        self.processing.features = features
        if library is None:
            return
        found = library.compare(self.reading, *self._examples())
        if not found.hold:
            raise PolicyError(
                f"{type(self.base_vlm).__name__} makes something else of its encoder's stored features than of the "
                f"pixels: off by {found.worst:.1g} of the largest value, expected at most {found.tolerance:.0g}; its "
                "forward must take `image_features` as what its `see` returns."
            )

    def _compare(self, library: Library, alone: list[Rows], together: Rows) -> Differences:
        """How far whole prompts are from the library; raises where that is too far."""
        kind = type(self.base_vlm).__name__
        unequal = library.unequal_input(alone)
        if unequal is not None:
            raise PolicyError(
                f"The input {unequal!r} of {kind} is not what {type(self.processor).__name__} makes of one prompt and "
                "one image: its numbers would be wrong; expected a model whose processor treats each sample alone, use "
                "another model."
            )
        try:
            found = library.compare(self.whole_prompt, alone, together)
        except Exception as error:  # the library's own forward over inputs that its own processor made
            raise PolicyError(
                f"{kind} does not run over a batch of prompts ({type(error).__name__}: {first_line(error)}): use "
                "another model."
            ) from error
        if not found.hold:
            raise PolicyError(
                f"{kind} is not computed here as transformers computes it: off by {found.alone:.1g} of the largest "
                f"value alone and {found.padded:.1g} in a padded batch, expected at most {found.tolerance:.0g}; its "
                "numbers would be wrong, use another model."
            )
        return found

    def _make_codec(self, end_id: int | None) -> ActionCodec:
        """How actions are said; `end_id` is the token that ends an answer."""
        spec = self.spec
        action_format = "auto" if spec.text is not None else spec.action_format
        return ActionCodec(self.processor.tokenizer, spec.action_names, action_format, self.prompts.go_on, end_id)

    def _check_answers(self) -> None:
        longest = max(zip(map(len, self.codec.token_ids), self.codec.answers, strict=True))
        if self.parts.one_token_answers and longest[0] > 1:
            raise PolicyError(
                f"{type(self.base_vlm).__name__} answers with one token at a mask, but {longest[1]!r} takes "
                f"{longest[0]}: expected action_format token or choice, or a causal model such as the preset tiny."
            )

    def _check_frames(self, images: np.ndarray) -> None:
        if images.shape[-3:] != tuple(self.spec.frame_shape):
            raise PolicyError(
                f"Frames of shape {images.shape[-3:]} came, but this policy was built for "
                f"{tuple(self.spec.frame_shape)}: load it again for these frames."
            )

    def _check_prompt(self, tokens: tuple[int, ...], instruction: str) -> None:
        if not self.reading.accepts(tokens):
            raise PolicyError(
                f"The tokenizer joins the text before the instruction with the instruction {instruction[:200]!r}: "
                "expected one that begins with a letter, change it."
            )
        if len(tokens) > self.max_length:
            raise PolicyError(
                f"The prompt with the instruction {instruction[:200]!r} has {len(tokens)} tokens, but the model reads "
                f"at most {self.max_length}: {self._shorter()}shorten the instruction."
            )

    def _shorter(self) -> str:
        """What makes prompts shorter beside the instruction, for a sentence."""
        flags = {"--frames": self.spec.frames > 1, "--history": self.spec.history > 0}
        given = " or ".join(flag for flag, is_given in flags.items() if is_given)
        return f"give a smaller {given}, or " if given else ""
