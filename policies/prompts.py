"""From an instruction to token ids: text of an env is data, so it is cleaned; the rest of the prompt is ours and constant.

The order is: system text with the actions, then the instruction, then the image, then the cue to answer. Visual tokens thus attend
to the instruction, which gives the image its purpose (from scratch this learned faster than the other order). The system
text is the same for every sample, so its keys and values are computed once (see policy.py).
"""

import re
import unicodedata
from typing import Any

from .errors import PolicyError

SYSTEM = "You act in an environment. Look at the image and follow the instruction. Actions: {actions}."
MAX_INSTRUCTION_CHARS = 2000


def clean_text(text: str, special_tokens: list[str], max_chars: int = MAX_INSTRUCTION_CHARS) -> str:
    """Text of an env as plain data: no special tokens, no control characters, at most `max_chars` characters.

    Removal is repeated until nothing changes, since removing one token can join the halves of another.
    """
    text = "".join(" " if char in "\n\t\r" else char for char in text)
    text = "".join(char for char in text if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    tokens = sorted((token for token in special_tokens if token.strip()), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, tokens))) if tokens else None
    while pattern is not None and pattern.search(text):
        text = pattern.sub("", text)
    return re.sub(r" {2,}", " ", text).strip()[:max_chars].strip()


def image_token_of(processor: Any, vlm: Any) -> tuple[str, int]:
    """The placeholder that the processor expects in a text, and the id that the model replaces by visual tokens."""
    token = getattr(processor, "image_token", None)
    token_id = getattr(vlm.config, "image_token_id", None)
    if token_id is None:
        token_id = getattr(vlm.config, "image_token_index", None)
    if not isinstance(token, str) or token_id is None:
        raise PolicyError(
            f"The processor {type(processor).__name__} or the model {type(vlm).__name__} names no image token: "
            "expected a vision-language model whose processor has `image_token`."
        )
    return token, int(token_id)


class PromptBuilder:
    """Renders instructions with the processor's chat template and tokenizes them, each distinct one once.

    Args:
        processor: a VLM's processor (chat template, tokenizer, image processor).
        image_token: the placeholder that the processor expects in a text.
        system: system text; `{actions}` is replaced by the codec's legend.
        legend: how the actions are listed.
        example_frame: a frame (H, W, 3) uint8; processors size the placeholders by it.

    Attributes:
        lead: " " where the prompt ends with a word or colon, else "": what stands before an answer.
    """

    def __init__(self, processor: Any, image_token: str, system: str, example_frame: Any) -> None:
        self.processor = processor
        self.image_token = image_token
        self.system = system
        self.legend = ""
        self.example_frame = example_frame
        tokenizer = processor.tokenizer
        added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
        self.special_tokens = sorted({*tokenizer.all_special_tokens, *added, image_token})
        self._ids: dict[str, tuple[int, ...]] = {}
        self.lead = " " if re.search(r"[\w:,.]$", self.render("x")) else ""

    def clean(self, instruction: str) -> str:
        """The instruction as plain data."""
        return clean_text(instruction, self.special_tokens)

    def render(self, instruction: str) -> str:
        """The whole prompt as text, one image placeholder in it."""
        system = self.system.replace("{actions}", self.legend)
        structured = [
            {"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": [{"type": "text", "text": instruction}, {"type": "image"}]},
        ]
        if getattr(self.processor, "chat_template", None):
            text = self.processor.apply_chat_template(structured, add_generation_prompt=True, tokenize=False)
            if text.count(self.image_token) == 1:
                return text
        return f"{system}\n{instruction}\n{self.image_token}\nAnswer:"

    def encode(self, instruction: str) -> tuple[int, ...]:
        """Token ids of the prompt with this (cleaned) instruction, image placeholders expanded."""
        cleaned = self.clean(instruction)
        if cleaned not in self._ids:
            if len(self._ids) > 50_000:
                self._ids.clear()
            encoded = self.processor(text=[self.render(cleaned)], images=[[self.example_frame]])
            self._ids[cleaned] = tuple(int(token) for token in encoded["input_ids"][0])
        return self._ids[cleaned]
