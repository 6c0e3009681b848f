"""From an instruction to token ids: an env's text is data, so it is cleaned; the rest of the prompt is constant.

The order is: system text with the actions, then the instruction, then the image, then the cue to answer. Visual tokens
thus attend to the instruction, which gives the image its purpose (from scratch this learned faster than the other
order). The system text is the same for every sample, so its keys and values are computed once: see reading/.
"""

import re
import unicodedata
from typing import Any

from jinja2 import TemplateError

from manako.policies.architectures.composed.processing import special_vocabulary
from manako.policies.architectures.model import Model
from manako.policies.errors import PolicyError

MAX_INSTRUCTION_CHARS = 2000


def as_plain_line(text: str, special_tokens: list[str], max_chars: int = MAX_INSTRUCTION_CHARS) -> str:
    """Returns text of an env as plain data: one line of `max_chars` characters at most, no special tokens in it.

    Removal is repeated until nothing changes, since removing one token, or a second space, can join the halves of
    another.
    """
    text = " ".join(text[: 10 * max_chars].split())
    text = "".join(char for char in text if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    tokens = sorted((token for token in special_tokens if token.strip()), key=len, reverse=True)
    pattern = re.compile("|".join([*map(re.escape, tokens), " (?= )"]))
    while pattern.search(text):
        text = pattern.sub("", text)
    return text.strip()[:max_chars].strip()


class PromptBuilder:
    """Renders instructions with the processor's chat template and tokenizes them, each distinct one once.

    Args:
        model: the model, its processor (chat template, tokenizer, image processor) and its placeholder.
        system: system text; `{actions}` is replaced by the legend.
        example_frame: a frame (H, W, 3) uint8; processors size the placeholders by it.

    Raises:
        PolicyError: the system text holds a special token.

    Attributes:
        legend: how the actions are listed.
        lead: " " where the prompt ends with a word or colon, else "": what stands before an answer.
    """

    def __init__(self, model: Model, system: str, example_frame: Any) -> None:
        self.model, self.processor, self.image_token = model, model.processor, model.placeholder
        self.system = system
        self.legend = ""
        self.example_frame = example_frame
        tokenizer = self.processor.tokenizer
        special = special_vocabulary(tokenizer)
        added = [token.content for token in tokenizer.added_tokens_decoder.values()]
        self.special_tokens = sorted({*special, *added, self.image_token})
        held = [token for token in self.special_tokens if token.strip() and token in system]
        if held:
            raise PolicyError(
                f"The system text {system!r} holds the special token {held[0]!r}: expected plain text, leave it out."
            )
        self._special_ids = {*special.values(), model.placeholder_id} - {tokenizer.unk_token_id}
        self._ids: dict[str, tuple[int, ...]] = {}
        self.lead = " " if re.search(r"[\w:,.]\Z", self.render("x")) else ""
        self._special_count = self._count_special(self.tokenize("x"))

    def clean(self, instruction: str) -> str:
        """Returns the instruction as plain data."""
        return as_plain_line(instruction, self.special_tokens)

    def render(self, instruction: str) -> str:
        """Returns the whole prompt as text, one image placeholder in it unless the processor writes it."""
        system = self.system.replace("{actions}", self.legend)
        if self.model.render is not None:
            return self.model.render(system, instruction)
        found = self._render(instruction)
        return found[1] if found else f"{system}\n{instruction}\n{self.image_token}\nAnswer:"

    def messages(self, instruction: str) -> list[dict[str, Any]]:
        """Returns the prompt as chat messages, which the processor's template renders to the text of `render`.

        Raises:
            PolicyError: the processor has no chat template that takes them.
        """
        found = self._render(instruction)
        if found is None:
            raise PolicyError(
                f"The processor {type(self.processor).__name__} has no chat template that keeps system text, "
                "instruction and image: expected one, for TRL's trainers build prompts with it."
            )
        return found[0]

    def _render(self, instruction: str) -> tuple[list[dict[str, Any]], str] | None:
        """Messages and their text, in the first form that the template keeps whole; None if none is."""
        if self.model.render is not None or not getattr(self.processor, "chat_template", None):
            return None
        system = self.system.replace("{actions}", self.legend)
        image = {"type": "image"}
        with_role = [
            {"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": [{"type": "text", "text": instruction}, image]},
        ]
        without_role = [
            {"role": "user", "content": [{"type": "text", "text": f"{system}\n{instruction}"}, image]},
        ]
        for messages in (with_role, without_role):  # some templates refuse or drop a system message
            try:
                text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            except TemplateError:
                continue
            if text.count(self.image_token) == 1 and system.strip() in text and instruction in text:
                return messages, text
        return None

    def encode(self, instruction: str) -> tuple[int, ...]:
        """Returns the token ids of the prompt with this (cleaned) instruction, image placeholders expanded.

        Raises:
            PolicyError: the tokenizer makes a special token of the instruction.
        """
        if instruction not in self._ids:
            if len(self._ids) > 50_000:
                self._ids.clear()
            cleaned = self.clean(instruction)
            ids = self.tokenize(cleaned)
            if self._count_special(ids) != self._special_count:
                raise PolicyError(
                    f"The tokenizer makes a special token of a part of the instruction {cleaned[:200]!r}: expected "
                    "plain text, change it."
                )
            self._ids[instruction] = ids
        return self._ids[instruction]

    def tokenize(self, instruction: str) -> tuple[int, ...]:
        """Returns the token ids of the prompt with this text as it is, image placeholders expanded."""
        text = self.render(instruction)
        bos = self.processor.tokenizer.bos_token
        # a template that writes the first token itself must not get a second one
        options = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
        encoded = self.processor(text=[text], images=[[self.example_frame]], **options)
        return tuple(int(token) for token in encoded["input_ids"][0])

    def _count_special(self, ids: tuple[int, ...]) -> int:
        return sum(token in self._special_ids for token in ids)
