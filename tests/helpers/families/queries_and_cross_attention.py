"""Tiny random model folders of families whose decoder is fed by learned queries or by cross-attention."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartTokenizer,
    BertTokenizer,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    BlipTextConfig,
    BlipVisionConfig,
    CLIPImageProcessorPil,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    Florence2VisionConfig,
    GenerationConfig,
    GitConfig,
    GitForCausalLM,
    GitProcessor,
    GPT2Tokenizer,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    IdeficsImageProcessorPil,
    IdeficsProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    Kosmos2Config,
    Kosmos2ForConditionalGeneration,
    Kosmos2Processor,
    LlamaConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaImageProcessorPil,
    MllamaProcessor,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    T5Config,
    T5Tokenizer,
    XLMRobertaTokenizer,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from tests.helpers.families.common import (
    ASCII,
    CLIP_SIZES,
    SQUARE,
    WORDS,
    edit_json,
    llama2_tokenizer,
    make_loud,
    text_options,
    write_json,
)
from tests.helpers.foreign_models import TEXT, VISION

QFORMER = {**TEXT, "max_position_embeddings": 300}
QUERIES = 4
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
MLLAMA_TEMPLATE = (
    "{{- bos_token }}"
    "{%- set found = namespace(image=false) %}"
    "{%- for message in messages %}{%- if message['content'] is not string %}{%- for content in message['content'] %}"
    "{%- if content['type'] == 'image' %}{%- set found.image = true %}{%- endif %}"
    "{%- endfor %}{%- endif %}{%- endfor %}"
    "{%- if messages[0]['role'] == 'system' or not found.image %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\n' }}"
    "{{- 'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' }}"
    "{%- if messages[0]['role'] == 'system' %}"
    "{%- if messages[0]['content'] is string %}{{- messages[0]['content'] | trim }}"
    "{%- else %}{{- messages[0]['content'][0]['text'] | trim }}{%- endif %}"
    "{%- endif %}{{- '<|eot_id|>' }}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set messages = messages[1:] %}{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['content'] is string %}{{- message['content'] | trim }}"
    "{%- else %}{%- for content in message['content'] %}"
    "{%- if content['type'] == 'image' %}{{- '<|image|>' }}{%- elif content['type'] == 'text' %}"
    "{{- content['text'] | trim }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


def byte_vocabulary(first: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a GPT-2-like BPE: `first`, the 256 bytes, a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=len(first) + 256 + 100,
        special_tokens=list(first),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS, *WORDS.split()] * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def unigram_vocabulary(first: tuple[str, ...], without: str = "") -> list[tuple[str, float]]:
    """Pieces and scores of a SentencePiece Unigram model: `first`, '▁', ASCII but `without`, a few words."""
    words = [piece for word in sorted(set(WORDS.split())) for piece in (word, f"▁{word}") if len(piece) > 1]
    letters = [letter for letter in ASCII if letter not in without]
    return [
        *((piece, 0.0) for piece in first),
        *((letter, -5.0) for letter in ["▁", *letters]),
        *((w, -3.0) for w in words),
    ]


def opt_tokenizer() -> GPT2Tokenizer:
    """A tokenizer as OPT's: byte-level, `</s>` before the text."""
    vocab, merges = byte_vocabulary(("<s>", "<pad>", "</s>", "<unk>"))
    roles = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    return GPT2Tokenizer(vocab=vocab, merges=merges, add_bos_token=True, **roles)


def t5_tokenizer() -> T5Tokenizer:
    """A tokenizer as T5's: `</s>` after the text, '▁' for runs of blanks, no piece for line ends and braces."""
    return T5Tokenizer(vocab=unigram_vocabulary(("<pad>", "</s>", "<unk>"), "<{}~\\^`"), extra_ids=8)


def bert_tokenizer(**roles: str) -> BertTokenizer:
    """A tokenizer as BERT's: lower case, `[CLS]` before the text, `[SEP]` after it."""
    letters = [letter for letter in ASCII if not letter.isupper()]
    words = [word for word in sorted({word.lower() for word in WORDS.split()}) if len(word) > 1 and word.isalpha()]
    first = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    pieces = [*first, *letters, *(f"##{letter}" for letter in letters), *words]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    return BertTokenizer(vocab=vocab, model_input_names=["input_ids", "attention_mask"], **roles)


def llama3_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 3's: byte-level, `<|begin_of_text|>` before the text, `special` behind all other tokens."""
    roles = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|finetune_right_pad_id|>"}
    heads = ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>")
    vocab, merges = byte_vocabulary((*roles.values(), *heads))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos = roles["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(single=[bos, "$A"], special_tokens=[(bos, vocab[bos])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=[*heads, *special], **roles)


def padded(tokenizer: Any) -> int:
    """Size of a vocabulary that has rows without a token, as the real ones have."""
    return (len(tokenizer) // 32 + 1) * 32


def save(folder: Path, model: PreTrainedModel, processor: ProcessorMixin, seed: int = 0, **generation: Any) -> Path:
    """Write a folder, its processor in the files of the Hub's: the images' part in preprocessor_config.json."""
    make_loud(model, seed=seed)
    if generation:
        model.generation_config = GenerationConfig(**generation)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    content = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    name = content["processor_class"]
    write_json(folder, "preprocessor_config.json", {**content.pop("image_processor"), "processor_class": name})
    if set(content) == {"processor_class"}:
        (folder / "processor_config.json").unlink()
    else:
        edit_json(folder, "processor_config.json", image_processor=None)
    return folder


def blip2(folder: Path) -> Path:
    """A BLIP-2 with OPT: the query tokens stand before the text and its `</s>`; generation ends at a line's end."""
    tokenizer = opt_tokenizer()
    processor = Blip2Processor(BlipImageProcessorPil(size=SQUARE), tokenizer, num_query_tokens=QUERIES)
    text = OPTConfig(
        vocab_size=padded(tokenizer),
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=300,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.convert_tokens_to_ids("Ċ"),
    )
    model = Blip2ForConditionalGeneration(blip2_config(text, tokenizer))
    return save(folder, model, processor, seed=3)  # with which its image weighs more than with 0


def blip2_t5(folder: Path) -> Path:
    """A BLIP-2 with FLAN-T5: the query tokens stand before the encoder's text."""
    tokenizer = t5_tokenizer()
    processor = Blip2Processor(BlipImageProcessorPil(size=SQUARE), tokenizer, num_query_tokens=QUERIES)
    model = Blip2ForConditionalGeneration(blip2_config(flan_t5(tokenizer), tokenizer))
    return save_flan_t5(folder, model, processor)


def blip2_config(text: OPTConfig | T5Config, tokenizer: Any) -> Blip2Config:
    """The parts of a BLIP-2."""
    return Blip2Config(
        vision_config=Blip2VisionConfig(**VISION),
        qformer_config=Blip2QFormerConfig(**QFORMER, vocab_size=50),
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )


def flan_t5(tokenizer: Any) -> T5Config:
    """The configuration of a FLAN-T5; save_flan_t5 makes its head a matrix of its own."""
    return T5Config(vocab_size=padded(tokenizer), **T5, decoder_start_token_id=0, bos_token_id=1)


def save_flan_t5(folder: Path, model: Any, processor: ProcessorMixin) -> Path:
    """Write a folder whose language model is a FLAN-T5: its head is not its embedding."""
    head = model.language_model.lm_head
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    save(folder, model, processor)
    text = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    text.pop("scale_decoder_outputs")  # newer than the Hub's folders, which say it by `tie_word_embeddings`
    edit_json(folder, "config.json", text_config={**text, "tie_word_embeddings": False})
    return folder


def instructblip(folder: Path) -> Path:
    """An InstructBLIP with Vicuna: its Q-Former reads the instruction by a tokenizer of its own."""
    tokenizer = llama2_tokenizer(legacy=True, bos_token="</s>", unk_token="</s>", pad_token="[PAD]")
    tokenizer.truncation_side = "left"
    processor = instructblip_processor(tokenizer)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 1, "eos_token_id": 2}
    text = LlamaConfig(**text_options(len(tokenizer)), **ids, max_position_embeddings=300)
    return save(folder, InstructBlipForConditionalGeneration(instructblip_config(text, processor)), processor)


def instructblip_t5(folder: Path) -> Path:
    """An InstructBLIP with FLAN-T5."""
    processor = instructblip_processor(t5_tokenizer())
    text = flan_t5(processor.tokenizer)
    model = InstructBlipForConditionalGeneration(instructblip_config(text, processor))
    return save_flan_t5(folder, model, processor)


def instructblip_processor(tokenizer: Any) -> InstructBlipProcessor:
    """The processor of an InstructBLIP, with BERT's tokenizer for the Q-Former."""
    reader = bert_tokenizer(bos_token="[DEC]", truncation_side="left")
    return InstructBlipProcessor(BlipImageProcessorPil(size=SQUARE), tokenizer, reader, num_query_tokens=QUERIES)


def instructblip_config(text: LlamaConfig | T5Config, processor: InstructBlipProcessor) -> InstructBlipConfig:
    """The parts of an InstructBLIP."""
    return InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(**VISION),
        qformer_config=InstructBlipQFormerConfig(**QFORMER, vocab_size=len(processor.qformer_tokenizer)),
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )


def kosmos2(folder: Path) -> Path:
    """A Kosmos-2: 64 latent queries, whose places have the ids of ordinary tokens and are told by a mask."""
    tokenizer = XLMRobertaTokenizer(vocab=unigram_vocabulary(("<s>", "<pad>", "</s>", "<unk>")))
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=SQUARE)
    processor = Kosmos2Processor(image_processor, tokenizer, num_patch_index_tokens=16)
    text = {
        "vocab_size": padded(tokenizer),
        "max_position_embeddings": 300,
        "embed_dim": 32,
        "layers": 2,
        "ffn_dim": 48,
        "attention_heads": 4,
    }
    config = Kosmos2Config(text_config=text, vision_config=VISION, latent_query_num=64)
    return save(folder, Kosmos2ForConditionalGeneration(config), processor)


def idefics(folder: Path) -> Path:
    """An IDEFICS: images resampled to latents, gated cross-attention before each layer, two added token rows."""
    parts = ("<fake_token_around_image>", "<image>")
    tokenizer = llama2_tokenizer(parts, pad_token="<unk>")
    config = IdeficsConfig(
        **TEXT,
        vocab_size=len(tokenizer) - len(parts),
        additional_vocab_size=len(parts),
        max_position_embeddings=300,
        qk_layer_norms=True,
        use_resampler=True,
        freeze_text_layers=False,
        freeze_vision_layers=False,
        vision_config={**VISION, "embed_dim": 32},
        perceiver_config={
            "use_resampler": True,
            "resampler_n_latents": 8,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "qk_layer_norms_perceiver": True,
        },
    )
    processor = IdeficsProcessor(IdeficsImageProcessorPil(image_size=32), tokenizer)
    return save(folder, IdeficsForVisionText2Text(config), processor)


def git(folder: Path) -> Path:
    """A GIT: the image's tokens go before the text inside the model and have no place in the input ids."""
    tokenizer = bert_tokenizer()
    ids = {"bos_token_id": tokenizer.cls_token_id, "eos_token_id": tokenizer.sep_token_id}
    config = GitConfig(**TEXT, **ids, vocab_size=len(tokenizer), max_position_embeddings=300, vision_config=VISION)
    return save(folder, GitForCausalLM(config), GitProcessor(CLIPImageProcessorPil(**CLIP_SIZES), tokenizer))


def blip(folder: Path) -> Path:
    """A BLIP captioner: the text reads the image by cross-attention; its start `[DEC]` is not in the tokenizer."""
    tokenizer = bert_tokenizer()
    text = BlipTextConfig(
        **TEXT,
        vocab_size=len(tokenizer) + 2,
        max_position_embeddings=300,
        projection_dim=32,
        bos_token_id=len(tokenizer),
        sep_token_id=tokenizer.sep_token_id,
    )
    vision = BlipVisionConfig(**VISION, projection_dim=32)
    config = BlipConfig(text_config=text, vision_config=vision, projection_dim=32, image_text_hidden_size=32)
    processor = BlipProcessor(BlipImageProcessorPil(size=SQUARE), tokenizer)
    return save(folder, BlipForConditionalGeneration(config), processor)


def florence2(folder: Path) -> Path:
    """A Florence-2: DaViT encoder of four stages, BART whose encoder reads image tokens and text."""
    places = [f"<loc_{place}>" for place in range(8)]
    vocab, merges = byte_vocabulary(("<s>", "<pad>", "</s>", "<unk>"))
    names = {"image_token": "<image>", "additional_special_tokens": places}
    tokenizer = BartTokenizer(vocab=vocab, merges=merges, **names)
    image_processor = CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False)
    image_processor.image_seq_length = 5
    text = BartConfig(
        vocab_size=padded(tokenizer),
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        max_position_embeddings=300,
        forced_bos_token_id=0,
    )
    vision = Florence2VisionConfig(
        depths=(1, 1, 1, 1),
        embed_dim=(16, 16, 32, 32),
        num_heads=(2, 2, 4, 4),
        num_groups=(2, 2, 4, 4),
        window_size=4,
        projection_dim=32,
        max_temporal_embeddings=10,
    )
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    model = Florence2ForConditionalGeneration(
        Florence2Config(text_config=text, vision_config=vision, image_token_id=image_token)
    )
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    forced = {"forced_bos_token_id": 0, "forced_eos_token_id": 2, "no_repeat_ngram_size": 3, "num_beams": 3}
    return save(folder, model, Florence2Processor(image_processor, tokenizer), **ids, **forced, early_stopping=True)


def mllama(folder: Path) -> Path:
    """A Llama 3.2 Vision: up to four tiles read by gated cross-attention; the head has no row for `<|image|>`."""
    tokenizer = llama3_tokenizer("<|image|>")
    image_token = tokenizer.convert_tokens_to_ids("<|image|>")
    text = MllamaTextConfig(
        **{**text_options(image_token), "num_hidden_layers": 3},
        cross_attention_layers=[1],
        max_position_embeddings=300,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = MllamaVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_global_layers=1,
        attention_heads=4,
        image_size=32,
        patch_size=16,
        intermediate_layers_indices=[0, 1],
        vision_output_dim=96,
    )
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=image_token)
    image_processor = MllamaImageProcessorPil(size=SQUARE, max_image_tiles=4)
    processor = MllamaProcessor(image_processor, tokenizer, chat_template=MLLAMA_TEMPLATE)
    return save(folder, MllamaForConditionalGeneration(config), processor)


QUERIES_AND_CROSS_ATTENTION: dict[str, Callable[[Path], Path]] = {
    "blip2": blip2,
    "blip2_t5": blip2_t5,
    "instructblip": instructblip,
    "instructblip_t5": instructblip_t5,
    "kosmos2": kosmos2,
    "idefics": idefics,
    "git": git,
    "blip": blip,
    "florence2": florence2,
    "mllama": mllama,
}
