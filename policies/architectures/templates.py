"""A chat template for processors that bring none: plain text, so that TRL's trainers and prompts have one way."""


def plain_template(image: str | None, end: str | None, first: str = "", lead: str = " ") -> str:
    """Returns a Jinja template: each text and image on its line, then `Answer:`.

    Args:
        image: what stands for an image in the text; None: the processor puts it in.
        end: what ends an answer, such as the tokenizer's end token.
        first: what the text begins with.
        lead: what stands between `Answer:` and an answer.
    """
    place = "" if image is None else f"{{{{ {image + chr(10)!r} }}}}"
    return (
        f"{{{{ {first!r} }}}}"
        "{%- for message in messages -%}"
        "{%- if message['role'] == 'assistant' -%}{{ " + repr("Answer:" + lead) + " }}{%- endif -%}"
        "{%- set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string "
        "else message['content'] -%}"
        "{%- for part in parts -%}"
        "{%- if part['type'] == 'image' -%}" + place + "{%- elif message['role'] == 'assistant' -%}{{ part['text'] }}"
        "{%- else -%}{{ part['text'] + '\\n' }}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if message['role'] == 'assistant' -%}{{ " + repr(end or "") + " }}{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ 'Answer:' }}{%- endif -%}"
    )


def give_template(processor: object, template: str) -> None:
    """Gives a processor this chat template where it has none of its own."""
    tokenizer_has_one = getattr(getattr(processor, "tokenizer", None), "chat_template", None)
    if not getattr(processor, "chat_template", None):
        processor.chat_template = tokenizer_has_one or template  # type: ignore[attr-defined]
