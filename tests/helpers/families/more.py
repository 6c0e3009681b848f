"""Tiny random model folders of further families that AutoModelForImageTextToText knows."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AriaConfig,
    AriaForConditionalGeneration,
    BartTokenizer,
    ChameleonConfig,
    ChameleonForConditionalGeneration,
    Cohere2VisionConfig,
    Cohere2VisionForConditionalGeneration,
    DeepseekVLConfig,
    DeepseekVLForConditionalGeneration,
    Emu3Config,
    Emu3ForConditionalGeneration,
    FuyuConfig,
    FuyuForCausalLM,
    GenerationConfig,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    JanusConfig,
    JanusForConditionalGeneration,
    Kosmos2_5Config,
    Kosmos2_5ForConditionalGeneration,
    Lfm2VlConfig,
    Lfm2VlForConditionalGeneration,
    Llama4Config,
    Llama4ForConditionalGeneration,
    Ovis2Config,
    Ovis2ForConditionalGeneration,
    Pix2StructConfig,
    Pix2StructForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    TrOCRConfig,
    VisionEncoderDecoderConfig,
    VisionEncoderDecoderModel,
    ViTConfig,
    XLMRobertaTokenizer,
)

from tests.helpers.families.common import (
    SQUARE,
    add_bos,
    edit_json,
    make_loud,
    special_ids,
    text_options,
    write_processor,
)
from tests.helpers.families.queries_and_cross_attention import byte_vocabulary, t5_tokenizer, unigram_vocabulary
from tests.helpers.foreign_models import TEXT, VISION, byte_tokenizer

CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
SIGLIP = {"model_type": "siglip_vision_model", **VISION, "vision_use_head": False}
PATCHES = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
GRID = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "patch_size": 8, "out_hidden_size": 32}
VQ = {"base_channels": 32, "num_res_blocks": 1, "channel_multiplier": [1, 1, 1, 1]}
CODES = 16
DEEPSEEK = ("<|begin▁of▁sentence|>", "<|end▁of▁sentence|>", "<|▁pad▁|>")
DEEPSEEK_TEMPLATE = (
    "{% set seps = ['\n\n', '" + DEEPSEEK[1] + "'] %}You are a helpful language and vision assistant.\n\n"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}Assistant: {% else %}{{ message['role'].capitalize() }}: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<image_placeholder>{% elif content['type'] == 'text' %}"
    "{{ content['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ seps[1 if message['role'] == 'assistant' else 0] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)


def turns_template(image: str, start: str, end: str, first: str = "", last: str = "") -> str:
    """A chat template: `first`, then messages between `start`, which names the role, and `end`, then `last`."""
    return (
        "{{- '" + first + "' }}{%- for message in messages -%}{{- " + start + " }}"
        "{%- if message['content'] is string -%}{{- message['content'] }}{%- else -%}"
        "{%- for content in message['content'] -%}"
        "{%- if content['type'] == 'image' -%}{{- '" + image + "' }}"
        "{%- elif content['type'] == 'text' -%}{{- content['text'] }}{%- endif -%}{%- endfor -%}{%- endif -%}"
        "{{- '" + end + "' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{%- set message = {'role': 'assistant'} -%}{{- "
        + start
        + " + '"
        + last
        + "' }}"
        "{%- endif -%}"
    )


def chatml_template(image: str, first: str = "", last: str = "") -> str:
    """A ChatML template with a family's image token."""
    return turns_template(image, "'<|im_start|>' + message['role'] + '\n'", "<|im_end|>\n", first, last)


def text(tokenizer: Any, **options: Any) -> dict[str, Any]:
    """A small Llama-like text configuration for a tokenizer."""
    return text_options(len(tokenizer), **{**special_ids(tokenizer), **options})


def deepseek_tokenizer() -> Any:
    """A tokenizer as DeepSeek's: byte-level, a start before the text."""
    bos, eos, pad = DEEPSEEK
    names = {"image_token": "<image_placeholder>", "boi_token": "<begin_of_image>", "eoi_token": "<end_of_image>"}
    return add_bos(byte_tokenizer(bos_token=bos, eos_token=eos, pad_token=pad, **names))


def deepseek_vl(folder: Path) -> Path:
    """DeepSeek-VL: SigLIP, aligner, Llama; its chat template always writes a system prompt of its own."""
    tokenizer = deepseek_tokenizer()
    config = DeepseekVLConfig(
        vision_config=SIGLIP, text_config=text(tokenizer), image_token_id=tokenizer.image_token_id
    )
    make_loud(DeepseekVLForConditionalGeneration(config)).save_pretrained(folder)
    image = {"image_processor_type": "DeepseekVLImageProcessor", "size": SQUARE, "min_size": 8, **HALF}
    write_processor(folder, "DeepseekVLProcessor", tokenizer, image, DEEPSEEK_TEMPLATE, num_image_tokens=16)
    return folder


def janus(folder: Path) -> Path:
    """Janus: an encoder for what is seen and a VQ model for what is drawn, Llama; images between two marks."""
    tokenizer = deepseek_tokenizer()
    vision = {**VISION, "mlp_ratio": 1.5, "projection_dim": 32, "num_image_tokens": 16}
    codes = {**VQ, "num_embeddings": CODES, "latent_channels": 32, "projection_dim": 32, "image_token_embed_dim": 32}
    config = JanusConfig(
        vision_config=vision,
        vq_config=codes,
        text_config=text(tokenizer),
        image_token_id=tokenizer.image_token_id,
        tie_word_embeddings=False,
    )
    make_loud(JanusForConditionalGeneration(config)).save_pretrained(folder)
    image = {"image_processor_type": "JanusImageProcessor", "size": SQUARE, "min_size": 8, **HALF}
    template = DEEPSEEK_TEMPLATE.replace("<image_placeholder>", "<image_placeholder>\n")
    write_processor(folder, "JanusProcessor", tokenizer, image, template, num_image_tokens=16)
    return folder


def ovis2(folder: Path) -> Path:
    """Ovis2: images as mixtures of visual words, tiles between marks that are visual words, too; Qwen2."""
    marks = [f"<IMG_{name}>" for name in ("START", "GRID", "COL", "ROW", "END")]
    parts = ("<|im_start|>", "<image>", "<IMG_ATOM>", *marks)
    tokenizer = byte_tokenizer(parts, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    config = Ovis2Config(
        vision_config={**VISION, "vocab_size": 64, "hidden_stride": 2},
        text_config={"model_type": "qwen2", **text(tokenizer)},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_ATOM>"),
        visual_indicator_token_ids=tokenizer.convert_tokens_to_ids(marks),
        vocab_size=len(tokenizer),
        hidden_size=32,
    )
    make_loud(Ovis2ForConditionalGeneration(config)).save_pretrained(folder)
    image = {"image_processor_type": "Ovis2ImageProcessor", "size": SQUARE, **CLIP, "crop_to_patches": True}
    template = chatml_template("<image>\n")
    write_processor(folder, "Ovis2Processor", tokenizer, {**image, "max_patches": 4}, template, image_seq_length=4)
    return folder


def aria(folder: Path) -> Path:
    """Aria: images of any shape with a mask, padded to a large square; queries by cross-attention; experts."""
    tokenizer = byte_tokenizer(
        ("<|im_start|>", "<fim_prefix>", "<fim_suffix>"),
        unk_token="<unk>",
        eos_token="<|im_end|>",
        image_token="<|img|>",
    )
    experts = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "model_type": "aria_text"}
    config = AriaConfig(
        vision_config={**VISION, "model_type": "idefics3_vision", "image_size": 490, "patch_size": 70},
        text_config={**text(tokenizer, pad_token_id=tokenizer.unk_token_id), **experts},
        image_token_index=tokenizer.image_token_id,
        projector_patch_to_query_dict={49: 8, 196: 16},
    )
    make_loud(AriaForConditionalGeneration(config)).save_pretrained(folder)
    image = {"image_processor_type": "AriaImageProcessor", "max_image_size": 490, "min_image_size": 336}
    template = chatml_template("<fim_prefix><|img|><fim_suffix>")
    sizes = {"490": 8, "980": 16}
    write_processor(folder, "AriaProcessor", tokenizer, image, template, size_conversion=sizes)
    edit_json(folder, "tokenizer_config.json", max_image_size=490)  # the only place that the processor's 980 yields to
    return folder


def chameleon(folder: Path) -> Path:
    """Chameleon: images become tokens of the text's vocabulary, which the head never says; no chat template."""
    codes = [f"IMGIMG{''.join(chr(ord('A') + int(digit)) for digit in str(code))}Z" for code in range(CODES)]
    parts = ("<racm3:break>", "<eoss>", "<image>", *codes)
    roles = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "sep_token": "<reserved08706>"}
    tokenizer = add_bos(byte_tokenizer(parts, **roles))
    config = ChameleonConfig(
        **text(tokenizer),
        vq_config={**VQ, "num_embeddings": CODES, "resolution": 32, "embed_dim": 8, "latent_channels": 32},
        vocabulary_map=tokenizer.get_vocab(),
    )
    make_loud(ChameleonForConditionalGeneration(config)).save_pretrained(folder)
    image = {"image_processor_type": "ChameleonImageProcessor", "size": {"shortest_edge": 32}, "crop_size": SQUARE}
    write_processor(folder, "ChameleonProcessor", tokenizer, image, image_seq_length=16, image_token="<image>")
    return folder


def emu3(folder: Path) -> Path:
    """Emu3: images of any size become tokens of the text's vocabulary, each row of them ended; Llama-like."""
    codes = [f"<|visual token {code:06d}|>" for code in range(CODES)]
    names = {
        "image_token": "<image>",
        "boi_token": "<|image start|>",
        "eoi_token": "<|image end|>",
        "image_wrapper_token": "<|image token|>",
        "eof_token": "<|extra_201|>",
    }
    roles = {"bos_token": "<|extra_203|>", "eos_token": "<|extra_204|>", "pad_token": "<|endoftext|>"}
    tokenizer = byte_tokenizer(("<|extra_200|>", *codes), **roles, **names)
    config = Emu3Config(
        vq_config={**VQ, "codebook_size": CODES, "hidden_size": 32},
        text_config=text(tokenizer),
        vocabulary_map=tokenizer.get_vocab(),
    )
    make_loud(Emu3ForConditionalGeneration(config)).save_pretrained(folder)
    image = {"image_processor_type": "Emu3ImageProcessor", "min_pixels": 24 * 24, "max_pixels": 48 * 48}
    start = "{'user': 'USER: ', 'assistant': 'ASSISTANT:'}.get(message['role'], '')"
    template = turns_template("<image>", start, " ", "You are a helpful assistant. ")
    write_processor(folder, "Emu3Processor", tokenizer, image, template)
    return folder


def fuyu(folder: Path) -> Path:
    """Fuyu: no encoder, patches in rows that end in a token; Persimmon; no chat template; wants torchvision."""
    pieces = unigram_vocabulary(("<unk>", "<s>", "|ENDOFTEXT|", "|SPEAKER|", "|NEWLINE|", "<0x04>"))
    model = Tokenizer(models.Unigram(pieces, unk_id=0))
    model.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    model.decoder = decoders.Metaspace()
    roles = {"bos_token": "|ENDOFTEXT|", "eos_token": "|ENDOFTEXT|", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, **roles)
    shared = {"vocab_size": len(tokenizer), "bos_token_id": 2, "eos_token_id": 2}
    config = FuyuConfig(
        text_config={"model_type": "persimmon", **TEXT, **shared},
        patch_size=16,
        image_token_id=tokenizer.convert_tokens_to_ids("|SPEAKER|"),
    )
    make_loud(FuyuForCausalLM(config)).save_pretrained(folder)
    image = {
        "image_processor_type": "FuyuImageProcessor",
        "size": {"height": 96, "width": 64},
        "patch_size": {"height": 16, "width": 16},
    }
    write_processor(folder, "FuyuProcessor", tokenizer, image)
    return folder


def kosmos2_5(folder: Path) -> Path:
    """Kosmos-2.5: patches with their row and column, latent queries in places that have the id of `<s>`."""
    marks = {"image_token": "<s>", "boi_token": "<image>", "eoi_token": "</image>"}
    pieces = XLMRobertaTokenizer(vocab=unigram_vocabulary(("<s>", "<pad>", "</s>", "<unk>"))).backend_tokenizer
    pieces.post_processor = processors.TemplateProcessing(single="$A")
    roles = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces, **roles, **marks)
    tokenizer.add_tokens(["<ocr>", "<md>"], special_tokens=True)
    words = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 300,
        "embed_dim": 32,
        "layers": 2,
        "ffn_dim": 48,
        "attention_heads": 4,
    }
    vision = {**VISION, "head_dim": 8, "patch_embed_hidden_size": 8 * 8 * 3, "max_num_patches": 16}
    config = Kosmos2_5Config(text_config=words, vision_config=vision, latent_query_num=8)
    make_loud(Kosmos2_5ForConditionalGeneration(config)).save_pretrained(folder)
    image = {"image_processor_type": "Kosmos2_5ImageProcessor", "patch_size": {"height": 8, "width": 8}}
    write_processor(folder, "Kosmos2_5Processor", tokenizer, image, num_image_tokens=8)
    edit_json(folder, "tokenizer_config.json", max_patches=16)  # the only place that the processor's 4096 yields to
    return folder


def pix2struct(folder: Path) -> Path:
    """Pix2Struct: patches with their row and column; the text is the decoder's first part; no chat template."""
    tokenizer = t5_tokenizer()
    heads = {"d_kv": 8, "d_ff": 48, "hidden_size": 32}
    config = Pix2StructConfig(
        text_config={**heads, "num_layers": 2, "num_heads": 4, "vocab_size": len(tokenizer)},
        vision_config={
            **heads,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "patch_embed_hidden_size": 8 * 8 * 3,
            "seq_len": 32,
        },
    )
    model = make_loud(Pix2StructForConditionalGeneration(config))
    model.save_pretrained(folder)
    image = {"image_processor_type": "Pix2StructImageProcessor", "patch_size": {"height": 8, "width": 8}}
    write_processor(folder, "Pix2StructProcessor", tokenizer, image)
    edit_json(folder, "tokenizer_config.json", max_patches=16)  # the only place that the processor's 2048 yields to
    return folder


def vision_encoder_decoder(folder: Path) -> Path:
    """A TrOCR: ViT and a BART-like decoder; the processor makes labels of the text; no chat template."""
    vocab, merges = byte_vocabulary(("<s>", "<pad>", "</s>", "<unk>"))
    tokenizer = BartTokenizer(vocab=vocab, merges=merges)
    words = {"decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "d_model": 32}
    decoder = TrOCRConfig(
        **words, vocab_size=len(tokenizer), max_position_embeddings=300, cross_attention_hidden_size=32
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), decoder)
    ids = {"decoder_start_token_id": 2, "pad_token_id": 1, "eos_token_id": 2}
    for name, number in ids.items():
        setattr(config, name, number)
    model = make_loud(VisionEncoderDecoderModel(config))
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    image = {"image_processor_type": "ViTImageProcessor", "size": SQUARE, **HALF}
    write_processor(folder, "TrOCRProcessor", tokenizer, image)
    return folder


def got_ocr2(folder: Path) -> Path:
    """GOT-OCR 2.0: SAM's encoder with windows and relative places, Qwen2; no chat template."""
    parts = ("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>")
    tokenizer = byte_tokenizer(parts, pad_token="<|endoftext|>", eos_token="<|endofturn|>")
    vision = {**VISION, "image_size": 64, "patch_size": 4, "mlp_dim": 48, "output_channels": 32, "window_size": 6}
    config = GotOcr2Config(
        vision_config={**vision, "global_attn_indexes": [1]},
        text_config={"model_type": "qwen2", **text(tokenizer), "tie_word_embeddings": True},
        image_token_index=tokenizer.convert_tokens_to_ids("<imgpad>"),
        image_seq_length=16,
    )
    make_loud(GotOcr2ForConditionalGeneration(config)).save_pretrained(folder)
    image = {"image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 64, "width": 64}, **CLIP}
    write_processor(folder, "GotOcr2Processor", tokenizer, image)
    edit_json(folder, "tokenizer_config.json", num_image_tokens=16)  # the only place that the processor's 256 yields to
    return folder


def glm4v(folder: Path) -> Path:
    """GLM-4.1V: patches with a grid, positions in three parts, sandwich norms; a part for videos."""
    names = ("image", "video", "begin_of_image", "end_of_image", "begin_of_video", "end_of_video")
    parts = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", *(f"<|{name}|>" for name in names))
    tokenizer = byte_tokenizer(parts, pad_token="<|endoftext|>", eos_token="<|observation|>")
    ids = dict(zip(names, tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in names]), strict=True))
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    config = Glm4vConfig(
        vision_config={**GRID, "image_size": 32, "spatial_merge_size": 2},
        text_config=text(tokenizer, num_attention_heads=2, num_key_value_heads=1, rope_parameters=rope),
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        image_start_token_id=ids["begin_of_image"],
        image_end_token_id=ids["end_of_image"],
        video_start_token_id=ids["begin_of_video"],
        video_end_token_id=ids["end_of_video"],
    )
    make_loud(Glm4vForConditionalGeneration(config), seed=1).save_pretrained(folder)
    shared = {"size": {"shortest_edge": 1024, "longest_edge": 16384}, **CLIP, **PATCHES}
    image = {"image_processor_type": "Glm4vImageProcessor", **shared}
    video = {"video_processor_type": "Glm4vVideoProcessor", **shared}
    marked = "<|begin_of_image|><|image|><|end_of_image|>"
    template = turns_template(marked, "'<|' + message['role'] + '|>\n'", "", "[gMASK]<sop>")
    write_processor(folder, "Glm4vProcessor", tokenizer, image, template, video=video)
    return folder


def qwen3_5(folder: Path) -> Path:
    """Qwen3.5: as Qwen3-VL, with a layer of linear attention; its answers begin by thinking; a part for videos."""
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    parts = ("<|im_start|>", *(f"<|{name}|>" for name in names))
    tokenizer = byte_tokenizer(parts, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    image_id, video_id, start, end = tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in names])
    linear = {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    rope = {
        "rope_type": "default",
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.25,
    }
    config = Qwen3_5Config(
        vision_config={**GRID, "spatial_merge_size": 2, "num_position_embeddings": 16},
        text_config={**text(tokenizer, head_dim=32, rope_parameters=rope), **linear},
        image_token_id=image_id,
        video_token_id=video_id,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    make_loud(Qwen3_5ForConditionalGeneration(config)).save_pretrained(folder)
    shared = {"size": {"shortest_edge": 1024, "longest_edge": 8192}, **HALF, **PATCHES}
    image = {"image_processor_type": "Qwen2VLImageProcessorFast", **shared}
    video = {"video_processor_type": "Qwen3VLVideoProcessor", **shared}
    template = chatml_template("<|vision_start|><|image_pad|><|vision_end|>", last="<think>\n")
    write_processor(folder, "Qwen3VLProcessor", tokenizer, image, template, video=video)
    return folder


def cohere2_vision(folder: Path) -> Path:
    """Command A Vision: tiles between marks, pixel shuffle, a gated projector, Cohere2; wants torchvision."""
    named = {
        "image_token": "<|IMG_PATCH|>",
        "boi_token": "<|START_OF_IMG|>",
        "eoi_token": "<|END_OF_IMG|>",
        "img_line_break_token": "<|IMG_LINE_BREAK|>",
    }
    turns = [f"<|{name}|>" for name in ("START_OF_TURN_TOKEN", "USER_TOKEN", "CHATBOT_TOKEN", "SYSTEM_TOKEN")]
    roles = {"pad_token": "<PAD>", "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>"}
    tokenizer = add_bos(byte_tokenizer(tuple(turns), **roles, **named))
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4096, "logit_scale": 0.25}
    config = Cohere2VisionConfig(
        vision_config=SIGLIP,
        text_config={"model_type": "cohere2", **text(tokenizer, **layers)},
        image_token_id=tokenizer.image_token_id,
        alignment_intermediate_size=64,
    )
    make_loud(Cohere2VisionForConditionalGeneration(config)).save_pretrained(folder)
    image = {"image_processor_type": "Cohere2VisionImageProcessorFast", "size": SQUARE, **HALF, "patch_size": 2}
    named_roles = (
        "{'user': '<|USER_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}.get(message['role'], '<|SYSTEM_TOKEN|>')"
    )
    start = f"'<|START_OF_TURN_TOKEN|>' + {named_roles}"
    template = turns_template("<|IMG_PATCH|>", start, "<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>")
    write_processor(folder, "Cohere2VisionProcessor", tokenizer, {**image, "max_patches": 4}, template)
    return folder


def lfm2_vl(folder: Path) -> Path:
    """LFM2-VL: SigLIP 2 on images of any shape, named tiles, a decoder layer of convolution; wants torchvision."""
    tiles = [f"<|img_row_{row}_col_{column}|>" for row, column in itertools.product(range(1, 5), repeat=2)]
    named = {
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail": "<|img_thumbnail|>",
    }
    roles = {"pad_token": "<|pad|>", "bos_token": "<|startoftext|>", "eos_token": "<|im_end|>"}
    tokenizer = add_bos(byte_tokenizer(("<|im_start|>", *tiles), **roles, **named))
    layers = {"layer_types": ["full_attention", "conv"], "block_auto_adjust_ff_dim": False, "model_type": "lfm2"}
    vision = {key: value for key, value in SIGLIP.items() if key != "image_size"}
    config = Lfm2VlConfig(
        vision_config={**vision, "model_type": "siglip2_vision_model", "num_patches": 16},
        text_config=text(tokenizer, **layers),
        image_token_id=tokenizer.image_token_id,
        projector_hidden_size=48,
    )
    make_loud(Lfm2VlForConditionalGeneration(config)).save_pretrained(folder)
    image = {
        "image_processor_type": "Lfm2VlImageProcessorFast",
        **HALF,
        "do_image_splitting": True,
        "min_tiles": 2,
        "max_tiles": 4,
        "use_thumbnail": True,
        "min_image_tokens": 4,
        "max_image_tokens": 8,
        "encoder_patch_size": 8,
        "tile_size": 32,
        "downsample_factor": 2,
        "max_pixels_tolerance": 1.5,
    }
    write_processor(folder, "Lfm2VlProcessor", tokenizer, image, chatml_template("<image>", "<|startoftext|>"))
    return folder


def llama4(folder: Path) -> Path:
    """Llama 4: tiles and a whole view, pixel shuffle, experts, a layer without positions; wants torchvision."""
    names = ("image_start", "image_end", "image", "patch", "tile_x_separator", "tile_y_separator")
    parts = ("<|header_start|>", "<|header_end|>", *(f"<|{name}|>" for name in names))
    roles = {"pad_token": "<|finetune_right_pad|>", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot|>"}
    tokenizer = add_bos(byte_tokenizer(parts, **roles))
    begin, finish, _, patch, *_ = tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in names])
    experts = {"intermediate_size_mlp": 48, "num_local_experts": 4, "no_rope_layers": [1, 0], "head_dim": 8}
    widths = {"intermediate_size": 128, "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
    config = Llama4Config(
        vision_config={**VISION, **widths},
        text_config=text(tokenizer, **experts),
        image_token_index=patch,
        boi_token_index=begin,
        eoi_token_index=finish,
    )
    make_loud(Llama4ForConditionalGeneration(config)).save_pretrained(folder)
    image = {"image_processor_type": "Llama4ImageProcessorFast", "size": SQUARE, **HALF, "max_patches": 4}
    start = "'<|header_start|>' + message['role'] + '<|header_end|>\n\n'"
    template = turns_template("<|image|>", start, "<|eot|>", "<|begin_of_text|>")
    write_processor(folder, "Llama4Processor", tokenizer, image, template, patch_size=8, pixel_shuffle_ratio=0.5)
    return folder


MORE: dict[str, Callable[[Path], Path]] = {
    "deepseek_vl": deepseek_vl,
    "janus": janus,
    "ovis2": ovis2,
    "aria": aria,
    "chameleon": chameleon,
    "emu3": emu3,
    "fuyu": fuyu,
    "kosmos2_5": kosmos2_5,
    "pix2struct": pix2struct,
    "vision_encoder_decoder": vision_encoder_decoder,
    "got_ocr2": got_ocr2,
    "glm4v": glm4v,
    "qwen3_5": qwen3_5,
    "cohere2_vision": cohere2_vision,
    "lfm2_vl": lfm2_vl,
    "llama4": llama4,
}
