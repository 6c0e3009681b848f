"""Small real models for the tests of policies/: random weights, tokenizers made here, seconds on one core, no network.

They are written to folders and read back, since folders are what users name. `initializer_range` is large, so that a
wrong prompt or image changes the output loudly.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers import CLIPImageProcessorPil

from policies.presets import TINY_TEMPLATE

LOUD = 0.5
FRAME = (32, 32, 3)
NAMES = ("up", "down", "left", "right")
CHATML = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
VISION = dict(**TEXT, image_size=32, patch_size=8)


def frames(count: int, shape: tuple[int, int, int] = FRAME, seed: int = 0) -> np.ndarray:
    """Random frames (count, H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def byte_tokenizer(special: tuple[str, ...] = (), **roles: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that knows a few words; `roles` are eos_token and the like."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=[*roles.values(), *special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["go to the red ball turn up down left right on"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=list(special), **roles)


def llava_folder(folder: Path, **text: Any) -> Path:
    special = ("<|system|>", "<|user|>", "<|assistant|>", "<image>")
    tokenizer = byte_tokenizer(special, pad_token="<pad>", eos_token="<|end|>")
    tokens = len(tokenizer)
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, initializer_range=LOUD),
        text_config=LlamaConfig(**{**TEXT, **text}, vocab_size=tokens, num_key_value_heads=2, initializer_range=LOUD),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TINY_TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder


def idefics3_folder(folder: Path) -> Path:
    special = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|system|>", "<|user|>", "<|assistant|>")
    tokenizer = byte_tokenizer(special, pad_token="<pad>", eos_token="<|end|>")
    torch.manual_seed(0)
    config = Idefics3Config(
        vision_config=dict(**VISION, initializer_range=LOUD),
        text_config=LlamaConfig(**TEXT, vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=LOUD, pad_token_id=0),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32}),
        tokenizer,
        image_seq_len=4,
        chat_template=TINY_TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder
