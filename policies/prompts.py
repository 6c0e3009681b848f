"""From an instruction to token ids: an env's text is data, so it is cleaned; the rest of the prompt is constant.

The order is: system text with the actions, then the instruction, then what was done before (`history`), then the image
or the last k of them, oldest first, then the cue to answer. Visual tokens
thus attend to the instruction, which gives the image its purpose (from scratch this learned faster than the other
order). With `image_first` the images stand before the instruction: then what they make does not depend on it, and
samples of one frame share it. What all samples share is computed once: see reading/.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from manako.errors import first_line
from manako.memory import in_words as turns_in_words
from manako.policies.architectures.composed.processing import special_vocabulary
from manako.policies.architectures.model import Model
from manako.policies.errors import PolicyError
from manako.policies.interface import Messages
from manako.policies.pixels import in_words
from manako.policies.plain_text import as_plain_text
from manako.policies.processing import Processing

EXAMPLES = ("go", "go to the far end of the room and wait")  # instructions of unequal length
LEAST_SIDE = 4  # of a frame; one of 1 or 3 is taken for colours
MOST_KEPT = 50_000  # tokenized texts


class PromptBuilder:
    """Renders instructions with the processor's chat template and tokenizes them, each distinct one once.

    Args:
        model: the model, its processor (chat template, tokenizer, image processor) and its placeholder.
        system: system text; `{actions}` is replaced by the legend.
        frame_shape: (H, W, 3); processors size the placeholders by it.
        frames: how many images a prompt has.
        action_names: (A,), for what was done before; None: the prompts do not tell it.
        image_first: the images stand before the instruction.

    Raises:
        PolicyError: the system text holds a special token, the chat template leaves out a part of the prompt, or the
            processor takes no such frames.

    Attributes:
        legend: how the actions are listed.
        lead: what stands before an answer: what the chat template puts there, else " " behind a word or colon.
        end: what the chat template puts behind an answer.
        mark_ids: tokens of the vocabulary that stand for marks such as places, and no text.
        end_token: the special token in it, else the tokenizer's end token; "" where there is none.
        processing: texts and frames to the model's inputs.
    """

    def __init__(
        self,
        model: Model,
        system: str,
        frame_shape: tuple[int, int, int],
        frames: int = 1,
        action_names: Sequence[str] | None = None,
        image_first: bool = False,
    ) -> None:
        self.frames, self.action_names, self.image_first = frames, action_names, image_first
        if frames > 1 and (model.one_image or model.placeholder is None):
            raise PolicyError(
                f"--frames {frames} came, but {type(model.base_vlm).__name__} reads one image a prompt: expected "
                "--frames 1, or a model that reads several, such as the preset tiny."
            )
        self.model, self.processor, self.image_token = model, model.processor, model.placeholder
        self.system = system
        self.legend = ""
        tokenizer = self.processor.tokenizer
        special = special_vocabulary(tokenizer)
        # of those that are merely added, the ones that are written as marks, such as places, too; words stay words
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        marks = [token for token in added if re.fullmatch(r"<\S.*\S>|\[\S.*\S\]", token.strip(), re.S)]
        self.mark_ids = tuple(tokenizer.convert_tokens_to_ids(token) for token in marks)
        self.special_tokens = sorted({*special, *marks, *([self.image_token] if self.image_token else [])})
        held = [token for token in self.special_tokens if token.strip() and token in system]
        if held:
            raise PolicyError(
                f"The system text {system!r} holds the special token {held[0]!r}: expected plain text, leave it out."
            )
        self._special_ids = {*special.values(), model.placeholder_id} - {tokenizer.unk_token_id, None}
        self._prompts: dict[tuple[str, str], dict[str, Tensor]] = {}
        self._read_as: dict[bytes, tuple[str, str]] = {}  # digest of a prompt -> its instruction and past
        self._made: dict[Any, Any] = {}
        if min(frame_shape[:2]) < LEAST_SIDE:
            raise PolicyError(
                f"Frames of {frame_shape[0]} x {frame_shape[1]} pixels came: expected at least {LEAST_SIDE} each way, "
                "since processors take a shorter side for colours; give larger frames."
            )
        short, long = (self.render(text) for text in EXAMPLES)
        try:
            self.processing = Processing(model, frame_shape, (short, long), frames)
        except Exception as error:  # whatever a processor raises about frames or texts that it cannot take
            raise PolicyError(
                f"{type(self.processor).__name__} does not take {in_words(frame_shape, self.processor)} with "
                f"{_images(frames)} a prompt ({type(error).__name__}: {first_line(error)}): expected a processor that "
                f"does; give {'--frames 1, ' if frames > 1 else ''}larger frames, or correct its settings in the "
                "model's folder."
            ) from error
        example = self.tokenize("x")["input_ids"].tolist()
        if model.placeholder_id is not None and model.placeholder_id not in example:
            token = str(getattr(self.processor, "image_token", self.image_token))
            if tokenizer.convert_tokens_to_ids(token) == model.placeholder_id:
                raise PolicyError(
                    f"{type(self.processor).__name__} makes no image tokens of "
                    f"{in_words(frame_shape, self.processor)}: expected some; give larger frames, or correct its "
                    "settings in the model's folder."
                )
            raise PolicyError(
                f"The prompt that {type(self.processor).__name__} makes holds no token {model.placeholder_id}, which "
                f"{type(model.base_vlm).__name__} takes for the image (the processor's is {token!r}, token "
                f"{tokenizer.convert_tokens_to_ids(token)}): expected config.json and processor of one model; copy or "
                "download the folder again."
            )
        lead, self.end = self._around_answers(tokenizer.decode(example[-8:]))
        found = re.search("|".join(re.escape(token) for token in self.special_tokens if token.strip()), self.end)
        self.end_token = found[0] if found else str(tokenizer.eos_token or tokenizer.sep_token or "")
        self.lead = "" if model.answer_start else lead
        self._special_count = self._count_special(example)

    def clean(self, instruction: str) -> str:
        """Returns the instruction as plain data."""
        return as_plain_text(instruction, self.special_tokens)

    def past(self, turns: np.ndarray | None) -> str:
        """Returns what was done before as text: turns (history, 2), oldest first; "" where prompts do not tell it."""
        return "" if self.action_names is None else turns_in_words(turns, self.action_names)

    def render(self, instruction: str, turns: np.ndarray | None = None) -> str:
        """Returns the whole prompt as text, a placeholder for each image in it unless the processor writes it."""
        return self._render(instruction, self.past(turns))[1]

    def messages(self, instruction: str, turns: np.ndarray | None = None) -> list[dict[str, Any]]:
        """Returns the prompt as chat messages, which the processor's template renders to the text of `render`."""
        return self._render(instruction, self.past(turns))[0]

    def _render(self, instruction: str, past: str) -> tuple[list[dict[str, Any]], str]:
        """Messages and their text, in the first form that the template keeps whole."""
        system = self.system.replace("{actions}", self.legend)
        asked = f"{instruction}\n{past}" if past else instruction
        pictures = [{"type": "image"} for _ in range(self.frames)]
        said = {"type": "text", "text": asked}
        with_role = [
            {"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": [*pictures, said] if self.image_first else [said, *pictures]},
        ]
        before = {"type": "text", "text": system if self.image_first else f"{system}\n{asked}"}
        without_role = [
            {"role": "user", "content": [before, *pictures, *([said] if self.image_first else [])]},
        ]
        fault = ""
        for messages in (with_role, without_role):  # some templates refuse or drop a system message
            try:
                text = self._apply(messages, add_generation_prompt=True)
            except Exception as error:  # whatever a template does
                fault = fault or f"it says {first_line(error)!r}"
                continue
            images = text.count(self.image_token) if self.image_token else 1
            missing = [
                name
                for name, part in (("system text", system), ("instruction", asked))
                if part.strip() and part.strip() not in text
            ]
            if images == self.frames and not missing:
                return messages, text
            fault = f"it gives no {' and no '.join(missing)}" if missing else f"it gives {images} places for an image"
        raise PolicyError(
            f"The chat template of {type(self.processor).__name__} does not hold a system text, an instruction and "
            f"{_images(self.frames)} ({fault}): expected all of them; correct chat_template.jinja in the model's "
            "folder."
        )

    def prompt(self, instruction: str, past: str | None = None) -> dict[str, Tensor]:
        """Returns what the processor makes of the prompt with this instruction: `input_ids` (L,), ...

        Args:
            instruction: the environment's.
            past: of `past`; None: of an episode's start.

        Raises:
            PolicyError: the tokenizer makes a special token of the instruction, or the same prompt of another one.
        """
        key = instruction, self.past(None) if past is None else past
        if key not in self._prompts:
            if len(self._prompts) > MOST_KEPT:
                self._prompts.clear()
                self._read_as.clear()
            cleaned = self.clean(instruction)
            prompt = self.tokenize(cleaned, key[1])
            if self._count_special(prompt["input_ids"].tolist()) != self._special_count:
                raise PolicyError(
                    f"The tokenizer makes a special token of a part of the instruction {cleaned[:200]!r}: expected "
                    "plain text, change it."
                )
            digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in prompt.values())).digest()
            other = self._read_as.setdefault(digest, key)
            if other != key:
                one, two = (" ".join(filter(None, read))[:200] for read in (other, key))
                raise PolicyError(
                    f"The instructions {one!r} and {two!r} give one prompt, since the chat "
                    "template or the tokenizer drops what tells them apart: expected texts that it can spell; change "
                    "one of them, or use another model."
                )
            self._prompts[key] = prompt
        return self._prompts[key]

    def encode(self, instruction: str, past: str | None = None) -> tuple[int, ...]:
        """Returns the token ids of the prompt with this instruction, image placeholders expanded."""
        return tuple(self.prompt(instruction, past)["input_ids"].tolist())

    def tokenize(self, instruction: str, past: str | None = None) -> dict[str, Tensor]:
        """Returns what the processor makes of the prompt with this text as it is; `past` as of `prompt`."""
        return self.processing.tokenize(self._render(instruction, self.past(None) if past is None else past)[1])

    def go_on(self, answer: str) -> tuple[int, ...]:
        """Returns the tokens by which the tokenizer goes on from a prompt with an answer, the lead before it.

        Raises:
            PolicyError: it goes on differently after different instructions.
        """
        found = {self.processing.go_on(self.render(text), self.lead + answer) for text in EXAMPLES}
        if len(found) > 1:
            raise PolicyError(
                f"The tokenizer makes other tokens of the answer {answer!r} after other instructions: expected a "
                "prompt whose end does not depend on the instruction; use another model."
            )
        return found.pop()

    def go_on_once(self, answer: str) -> tuple[int, ...]:
        """Returns the tokens of `go_on`, of each distinct answer once."""
        return self._once(("answer", answer), lambda: self.go_on(answer))

    def completed(self, prompt: Messages, completion: Messages, must_end: bool) -> tuple[str, str]:
        """Returns the texts of a prompt as the policy acts on it, and of what stands behind it for a completion.

        Some chat templates write a past answer otherwise than they ask for one: an answer is learned where it is given.

        Args:
            prompt: chat messages.
            completion: the answer's message.
            must_end: put the end token behind an answer that the chat template does not end.
        """
        text = self._apply(prompt, add_generation_prompt=True)
        end = self.end_token if must_end and self.end_token not in self.end else self.end
        return text, self.lead + completion[0]["content"][0]["text"] + end

    def tokenized(self, text: str) -> dict[str, Tensor]:
        """Returns what the processor makes of a rendered prompt, each distinct one once."""
        return self._once(text, lambda: self.processing.tokenize(text))

    def answer_to(self, text: str, answer: str) -> tuple[int, ...]:
        """Returns the tokens of an answer behind a rendered prompt, each distinct pair once."""
        return self._once((text, answer), lambda: self.processing.go_on(text, answer))

    def _around_answers(self, end_of_prompt: str) -> tuple[str, str]:
        """What the chat template puts before and behind an answer, where it does."""
        prompt, text = self._render(EXAMPLES[0], self.past(None))
        answer = "x y z"  # in no template
        whole = self._apply([*prompt, {"role": "assistant", "content": [{"type": "text", "text": answer}]}])
        before, _, end = whole.rpartition(answer)
        lead = before[len(text) :]
        if not before.startswith(text) or lead.strip():
            lead = " " if re.search(r"[\w:,.]\Z", end_of_prompt) else ""
        return lead, end

    def _apply(self, messages: Messages, **options: Any) -> str:
        return str(self.processor.apply_chat_template(messages, tokenize=False, **options))

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            if len(self._made) > MOST_KEPT:
                self._made.clear()
            self._made[key] = make()
        return self._made[key]

    def _count_special(self, ids: Sequence[int]) -> int:
        return sum(token in self._special_ids for token in ids)


def _images(count: int) -> str:
    return "one image" if count == 1 else f"{count} images"
