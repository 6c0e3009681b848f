"""The processor of the composed VLM: frames to pixels, chat messages to token ids, one placeholder a visual token."""

from typing import Any

import torch
from transformers.processing_utils import ProcessorMixin

IMAGE_TOKEN = "<image>"
ADAPTER_TEXT = ("text_input_ids", "text_attention_mask")  # the prompt before its image, for an adapter that wants text

# Chat templates of text-only models take a string as a message's content; VLM messages carry a list of parts. This
# prelude joins the parts (an image becomes its placeholder) and leaves the rest to the language model's own template.
JOIN_PARTS = (
    "{%- set joined = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set text = namespace(value='') -%}"
    "{%- if message['content'] is string -%}{%- set text.value = message['content'] -%}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{%- set text.value = text.value + '" + IMAGE_TOKEN + "' -%}"
    "{%- else -%}{%- set text.value = text.value + part['text'] -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set joined.messages = joined.messages + [{'role': message['role'], 'content': text.value}] -%}"
    "{%- endfor -%}"
    "{%- set messages = joined.messages -%}"
)
# For a language model without a chat template of its own.
PLAIN_TEMPLATE = (
    "{%- for message in messages -%}{{ message['content'] + '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ 'Answer:' }}{%- endif -%}"
)


class ManakoProcessor(ProcessorMixin):
    """Image processor + tokenizer; expands each image placeholder of the text to `num_image_tokens` of them.

    Args:
        image_processor: any of transformers' image processors that return `pixel_values` (B, 3, h, w).
        tokenizer: the language model's tokenizer, with `<image>` among its special tokens.
        num_image_tokens: visual tokens of one image, K.
        chat_template: Jinja template over messages whose content is a list of image and text parts.
        adapter_reads_text: whether to give the text before each prompt's image once more, for the adapter.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 1,
        chat_template: str | None = None,
        adapter_reads_text: bool = False,
        **kwargs: Any,
    ) -> None:
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.num_image_tokens = num_image_tokens
        self.adapter_reads_text = adapter_reads_text
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the library's inputs, and where the adapter reads text `text_input_ids` and their mask (B, T).

        They are the tokens before a prompt's first image, padded on the right.
        """
        made = super().__call__(*args, **kwargs)
        if self.adapter_reads_text and "input_ids" in made:
            made.update(self._text_before_images(made["input_ids"], made["attention_mask"]))
        return made

    def _text_before_images(self, ids: Any, mask: Any) -> dict[str, Any]:
        as_lists = not torch.is_tensor(ids)
        rows = [[int(token) for token in row] for row in ids]
        kept = [[bool(token) for token in row] for row in mask]
        texts = []
        for row, real in zip(rows, kept, strict=True):
            end = row.index(self.image_token_id) if self.image_token_id in row else len(row)
            texts.append([token for token, is_text in zip(row[:end], real[:end], strict=True) if is_text])
        longest = max(map(len, texts))
        padded = [text + [self.tokenizer.pad_token_id] * (longest - len(text)) for text in texts]
        seen = [[1] * len(text) + [0] * (longest - len(text)) for text in texts]
        values = (padded, seen) if as_lists else (torch.tensor(padded), torch.tensor(seen))
        return dict(zip(ADAPTER_TEXT, values, strict=True))

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        """Returns the text that stands for image number `image_idx`: K placeholders."""
        return self.image_token * self.num_image_tokens


def special_vocabulary(tokenizer: Any) -> dict[str, int]:
    """Returns every special token of a tokenizer and its id, also those without a role such as `eos_token`."""
    named = {str(token): tokenizer.convert_tokens_to_ids(str(token)) for token in tokenizer.all_special_tokens}
    added = {token.content: index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {**added, **named}


def vlm_chat_template(text_template: str | None) -> str:
    """Returns a template for messages with image parts, from a text-only model's own template (or none)."""
    return JOIN_PARTS + (text_template or PLAIN_TEMPLATE)
