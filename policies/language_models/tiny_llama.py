"""A random Llama of width 64 with a tokenizer built here, for learning from scratch on a CPU.

At the library's initializer_range of 0.02 the last hidden state hardly depends on the image and learning fails; with
0.15 it learns.
"""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from manako.policies.architectures.composed.processing import IMAGE_TOKEN
from manako.policies.language_models.language_model import LanguageModel

INITIALIZER_RANGE = 0.15
SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", IMAGE_TOKEN)

# What the tiny tokenizer learns its merges from: the words of prompts, of our envs and of common action names. Any
# other text is held as bytes.
TINY_WORDS = (
    "you act in an environment look at the image and follow the instruction actions answer go to the reach pick up "
    "drop red green blue yellow purple grey gray white black orange pink cyan ball box key door square triangle "
    "circle object up down left right forward toggle pickup done noop fire stay wait turn move north south east west "
    "push cart pole name colour color of without holes frozen lake goal goals start agent passenger taxi drive open "
    "put next behind get use avoid lava keep balance balanced it is a on by fetch a unlock room maze find hit stand "
    "number card cards equal target current play move step stop accelerate swing highest possible score"
)
TINY_TEMPLATE = (
    "{%- for message in messages -%}{{ '<|' + message['role'] + '|>' }}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '" + IMAGE_TOKEN + "' }}{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)


def build() -> LanguageModel:
    """Returns a random model, its tokenizer and its template."""
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=8192,  # costs nothing, and the longest instruction fits
        initializer_range=INITIALIZER_RANGE,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)  # the first policy is nearly uniform, so that PPO explores
    return LanguageModel(model, tokenizer, TINY_TEMPLATE)


def tiny_tokenizer(special: Sequence[str] = SPECIAL, more_words: str = "", **roles: str) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer of some 500 tokens: each word of `TINY_WORDS` is one, any text can be held.

    Args:
        special: special tokens, which have the first ids.
        more_words: beside `TINY_WORDS`.
        roles: those of them with a role, such as `eos_token`; none: `<|pad|>` and `<|end|>`.
    """
    roles = roles or {"pad_token": "<|pad|>", "eos_token": "<|end|>"}
    words = f"{TINY_WORDS} {more_words}".split()
    corpus = [" ".join(words), *words, *(word.capitalize() for word in words), ", ".join(words), ". ".join(words)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1400,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=[token for token in special if token not in roles.values()],
        **roles,
    )
