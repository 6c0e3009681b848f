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
    BitImageProcessorPil,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPVisionConfig,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from manako.policies.language_models.tiny_llama import TINY_TEMPLATE

LOUD = 0.5
FRAME = (32, 32, 3)
NAMES = ("up", "down", "left", "right")
TURNS = ("turn left", "turn right", "go", "go on")  # shared first tokens, one name that begins another
INSTRUCTIONS = ("go", "go to the far end of the room and wait there", "")  # prompts of unequal length
CHATML = (
    "{%- for message in messages -%}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION = {**TEXT, "image_size": 32, "patch_size": 8, "initializer_range": LOUD}
CROP = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}


def frames(count: int, shape: tuple[int, int, int] = FRAME, seed: int = 0) -> np.ndarray:
    """Random frames (count, H, W, 3) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def byte_tokenizer(special: tuple[str, ...] = (), split: bool = True, **roles: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that knows a few words; `roles` are eos_token and the like.

    Without `split` it may join a line's end with the word after it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=[*roles.values(), *special],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    words = " go to the red ball turn up down left right on A B C D"
    corpus = [words, *words.split()] if split else ["\ngo"]
    tokenizer.train_from_iterator(corpus * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=list(special), **roles)


def text_model(kind: str, tokens: int, **options: Any) -> Any:
    """A random language model of a family."""
    torch.manual_seed(0)
    shared = {**TEXT, "vocab_size": tokens, "num_key_value_heads": 2, "initializer_range": LOUD, **options}
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=tokens, n_embd=32, n_layer=2, n_head=4, n_positions=300, initializer_range=LOUD)
        )
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**shared, tie_word_embeddings=True))
    if kind == "gemma2":
        return Gemma2ForCausalLM(Gemma2Config(**shared, head_dim=8, final_logit_softcapping=1.0))
    return LlamaForCausalLM(LlamaConfig(**shared))


def text_folder(folder: Path, kind: str, template: str | None = CHATML, **options: Any) -> Path:
    """A language model and its tokenizer, which has no image token and may have no chat template."""
    tokenizer = byte_tokenizer(("<|im_start|>", "<|im_end|>"), eos_token="<|endoftext|>")
    tokenizer.chat_template = template
    text_model(kind, len(tokenizer), **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def vision_folder(folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> Path:
    """A vision encoder and its image processor: `clip` has two towers, `dinov2` register tokens."""
    torch.manual_seed(0)
    if kind == "clip":
        text = {**TEXT, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        model, processor = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION)), CLIPImageProcessorPil(**CROP)
    elif kind == "siglip":
        model = SiglipVisionModel(SiglipVisionConfig(**VISION))
        processor = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    else:
        config = {key: value for key, value in VISION.items() if key != "intermediate_size"}
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**config, mlp_ratio=2, num_register_tokens=4))
        processor = BitImageProcessorPil(**CROP)
    model.to(dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def llava_folder(folder: Path, kind: type = LlamaConfig, **text: Any) -> Path:
    """A LLaVA: CLIP encoder whose class token is dropped, projector, Llama or another language model."""
    special = ("<|system|>", "<|user|>", "<|assistant|>", "<image>")
    tokenizer = byte_tokenizer(special, pad_token="<pad>", eos_token="<|end|>")
    torch.manual_seed(0)
    shared = {**TEXT, "vocab_size": len(tokenizer), "num_key_value_heads": 2, "initializer_range": LOUD, **text}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=kind(**shared),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor = LlavaProcessor(
        CLIPImageProcessorPil(**CROP),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TINY_TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder


def idefics3_folder(folder: Path) -> Path:
    """An Idefics3, whose processor cuts each frame into parts and adds the whole frame."""
    parts = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    special = (*parts, "<|system|>", "<|user|>", "<|assistant|>")
    tokenizer = byte_tokenizer(special, pad_token="<pad>", eos_token="<|end|>")
    torch.manual_seed(0)
    shared = {**TEXT, "vocab_size": len(tokenizer), "num_key_value_heads": 2, "initializer_range": LOUD}
    config = Idefics3Config(
        vision_config=VISION,
        text_config=LlamaConfig(**shared, pad_token_id=0),
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


def blip2_folder(folder: Path) -> Path:
    """A BLIP-2: EVA-CLIP encoder, Q-Former with four query tokens, projection, OPT."""
    tokenizer = byte_tokenizer(("<image>",), pad_token="<pad>", eos_token="<|end|>")
    torch.manual_seed(0)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(**VISION),
        qformer_config=Blip2QFormerConfig(**TEXT, vocab_size=50, cross_attention_frequency=1, initializer_range=LOUD),
        text_config=OPTConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=300,
            init_std=LOUD,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        ),
        num_query_tokens=4,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        initializer_range=LOUD,
    )
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)  # the library starts them all alike, at 0
    model.save_pretrained(folder)
    image_processor = BlipImageProcessorPil(size={"height": 32, "width": 32})
    Blip2Processor(image_processor, tokenizer, num_query_tokens=4).save_pretrained(folder)
    return folder
