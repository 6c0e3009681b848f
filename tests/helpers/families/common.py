"""What the tiny random model folders of families share: loud weights, tokenizers, the JSON files of a processor."""

import json
import math
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import GemmaTokenizer, LlamaTokenizer

from tests.helpers.foreign_models import LOUD, TEXT

Module = TypeVar("Module", bound=torch.nn.Module)
ASCII = [chr(code) for code in range(33, 127)]
WORDS = " go to the red ball turn up down left right on A B C D USER: ASSISTANT: user assistant system"
FACTORS = {  # a token looks at many others rather than at one, and what it sees outweighs what it is
    **dict.fromkeys(("q_proj", "k_proj", "qkv", "query", "key"), 0.5),
    **dict.fromkeys(("q", "k"), 0.3),  # T5 does not divide by the root of the width
    "o_proj": 2.0,
    "down_proj": 0.5,
}
CLIP_SIZES = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
SQUARE = {"height": 32, "width": 32}


@torch.no_grad()
def make_loud(model: Module, loud: float = LOUD, seed: int = 0) -> Module:
    """Draw the parameters again (deterministic), so that none is at 0 or all alike and no path through it is dead.

    Matrices, embeddings and learned queries: normal of deviation `loud`, times what FACTORS says. Vectors: norms stay
    near their start (1, or 0 where the family adds 1), biases are small. A single number is a gate: opened half.
    """
    torch.manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if parameter.numel() == 1:
            parameter.fill_(0.5)
        elif parameter.ndim < 2:
            start = 1.0 if bool((parameter == 1).all()) else 0.0
            parameter.copy_(start + 0.1 * torch.randn(parameter.shape))
        else:
            factor = math.prod(FACTORS.get(part, 1.0) for part in name.split("."))
            parameter.copy_(factor * loud * torch.randn(parameter.shape))
    return model


def text_options(tokens: int, **options: Any) -> dict[str, Any]:
    """Keyword arguments of a small Llama-like text configuration."""
    return {**TEXT, "vocab_size": tokens, "num_key_value_heads": 2, "initializer_range": LOUD, **options}


def piece_vocabulary(first: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a SentencePiece-like BPE: `first`, the 256 bytes, ASCII, '▁', a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    trainer = trainers.BpeTrainer(
        vocab_size=len(first) + 256 + 200,
        special_tokens=[*first, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=[*ASCII, "▁"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS, *WORDS.split()] * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def llama2_tokenizer(special: tuple[str, ...] = (), legacy: bool = False, **roles: str) -> LlamaTokenizer:
    """A tokenizer as Llama 2's: `<s>` before the text, '▁' for spaces and before the first word, bytes as fallback.

    With `legacy`, '▁' also comes before the words that follow a special token. "up" alone is ["▁up"], but "up" right
    after a prompt that ends in ":" is ["up"].
    """
    vocab, merges = piece_vocabulary(("<unk>", "<s>", "</s>"))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **roles}
    options = {"legacy": legacy, "add_bos_token": True, "additional_special_tokens": list(special), **roles}
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, **options)
    tokenizer.init_kwargs["legacy"] = legacy  # the library does not write it down
    return tokenizer


def gemma_tokenizer(special: tuple[str, ...] = (), **options: Any) -> GemmaTokenizer:
    """A tokenizer as Gemma's: `<bos>` before the text, '▁' for spaces, none put before the first word."""
    vocab, merges = piece_vocabulary(("<pad>", "<eos>", "<bos>", "<unk>", "<mask>"))
    options = {"add_bos_token": True, "additional_special_tokens": list(special), **options}
    return GemmaTokenizer(vocab=vocab, merges=merges, **options)


def add_bos(tokenizer: Any) -> Any:
    """Make a tokenizer put its first token before each text, though the chat template of such families does so, too."""
    bos = tokenizer.bos_token
    processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


def write_json(folder: Path, name: str, content: dict[str, Any]) -> None:
    """Write one JSON file of a model folder, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def edit_json(folder: Path, name: str, **changes: Any) -> None:
    """Change top entries of one JSON file of a model folder; None takes an entry out."""
    content = {**json.loads((folder / name).read_text(encoding="utf-8")), **changes}
    write_json(folder, name, {key: value for key, value in content.items() if value is not None})


def as_llama2_file(folder: Path) -> None:
    """Gives tokenizer.json what Llama 2's on the Hub holds: '▁' is put before whatever comes, also before a space.

    "up" after "ASSISTANT: " is ["▁up"], but " up" alone is ["▁", "▁up"].
    """
    spaces = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content |= {"normalizer": {"type": "Sequence", "normalizers": spaces}, "pre_tokenizer": None}
    write_json(folder, "tokenizer.json", content)


def special_ids(tokenizer: Any) -> dict[str, int | None]:
    """The entries of a text configuration that name a tokenizer's special tokens."""
    return {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}


def write_processor(
    folder: Path,
    kind: str,
    tokenizer: Any,
    image: dict[str, Any],
    template: str | None = None,
    *,
    video: dict[str, Any] | None = None,
    nested: bool = False,
    **options: Any,
) -> None:
    """Write a processor's files by hand, since those with a part for videos cannot be built without torchvision.

    `nested` is today's style: one processor_config.json, chat_template.jinja. Otherwise the older one of most folders
    on the Hub: preprocessor_config.json, video_preprocessor_config.json, chat_template.json, and processor_config.json
    only where the processor has `options` of its own.
    """
    tokenizer.save_pretrained(folder)
    edit_json(folder, "tokenizer_config.json", processor_class=kind)
    if nested:
        parts = {"image_processor": image, **({"video_processor": video} if video is not None else {})}
        write_json(folder, "processor_config.json", {**parts, **options, "processor_class": kind})
        if template is not None:
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
        return
    write_json(folder, "preprocessor_config.json", {**image, "processor_class": kind})
    if video is not None:
        write_json(folder, "video_preprocessor_config.json", {**video, "processor_class": kind})
    if options:
        write_json(folder, "processor_config.json", {**options, "processor_class": kind})
    if template is not None:
        write_json(folder, "chat_template.json", {"chat_template": template})
