"""The processor of the composed VLM: frames to pixels, chat messages to token ids, one placeholder a visual token."""

from typing import Any

from transformers.processing_utils import ProcessorMixin

IMAGE_TOKEN = "<image>"

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
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        num_image_tokens: int = 1,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> None:
        self.image_token = IMAGE_TOKEN
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.num_image_tokens = num_image_tokens
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

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
