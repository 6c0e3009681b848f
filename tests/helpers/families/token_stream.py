"""Tiny random model folders of the families whose images stand in the decoder's token stream.

Folders as those on the Hub: tokenizers, chat templates, processor files in the older or today's style. A frame of
24 x 24, 64 x 64 or 160 x 64 makes at most about 64 image tokens, and 160 x 64 several tiles where the family has tiles.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    CLIPVisionConfig,
    Cohere2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    Idefics2Config,
    Idefics2ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from tests.helpers.families.common import (
    CLIP_SIZES,
    SQUARE,
    add_bos,
    as_llama2_file,
    edit_json,
    gemma_tokenizer,
    llama2_tokenizer,
    make_loud,
    special_ids,
    text_options,
    write_processor,
)
from tests.helpers.foreign_models import LOUD, VISION, byte_tokenizer

COARSE = {**VISION, "patch_size": 16}  # four patches a tile
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
CLIP = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}

LLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAVA_NEXT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
    "{% elif message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{{ ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'][0]['text'] + '</s>' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VIPLLAVA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }}"
    "{% else %}{{ '###' + message['role'].title() + ': ' }}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '###Assistant:' }}{% endif %}"
)
AYA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|START_OF_TURN_TOKEN|>' }}"
    "{% if message['role'] == 'system' %}{{ '<|SYSTEM_TOKEN|>' }}"
    "{% elif message['role'] == 'user' %}{{ '<|USER_TOKEN|>' }}"
    "{% else %}{{ '<|CHATBOT_TOKEN|><|START_RESPONSE|>' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'text' %}{{ item['text'] }}{% elif item['type'] == 'image' %}{{ '<image>' }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<|END_RESPONSE|>' }}{% endif %}"
    "{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>' }}{% endif %}"
)
IDEFICS_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}"
    "{% if line['type'] == 'text' %}{{ line['text'] }}{% elif line['type'] == 'image' %}{{ '<image>' }}"
    "{% elif line['type'] == 'video' %}{{ '<video>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
PIXTRAL_TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system_message = messages[0]['content'] if messages[0]['content'] is string"
    " else messages[0]['content'][0]['text'] -%}{%- set loop_messages = messages[1:] -%}"
    "{%- else -%}{%- set loop_messages = messages -%}{%- endif -%}"
    "{{- bos_token }}{%- for message in loop_messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{%- if loop.last and system_message is defined -%}{{- '[INST]' + system_message + '\n\n' }}"
    "{%- else -%}{{- '[INST]' }}{%- endif -%}"
    "{%- if message['content'] is string -%}{{- message['content'] }}{%- else -%}"
    "{%- for chunk in message['content'] -%}"
    "{%- if chunk['type'] == 'text' -%}{{- chunk['text'] }}{%- else -%}{{- '[IMG]' }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{- '[/INST]' }}"
    "{%- else -%}{{- (message['content'] if message['content'] is string else message['content'][0]['text'])"
    " + eos_token }}{%- endif -%}{%- endfor -%}"
)
MISTRAL3_TEMPLATE = (
    "{{- bos_token }}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set system_message = messages[0]['content'] if messages[0]['content'] is string"
    " else messages[0]['content'][0]['text'] -%}{%- set loop_messages = messages[1:] -%}"
    "{%- else -%}{%- set system_message = 'You are left.' -%}{%- set loop_messages = messages -%}{%- endif -%}"
    "{{- '[SYSTEM_PROMPT]' + system_message + '[/SYSTEM_PROMPT]' }}"
    "{%- for message in loop_messages -%}{%- if message['role'] == 'user' -%}"
    "{%- if message['content'] is string -%}{{- '[INST]' + message['content'] + '[/INST]' }}{%- else -%}{{- '[INST]' }}"
    "{%- for block in message['content'] -%}"
    "{%- if block['type'] == 'text' -%}{{- block['text'] }}"
    "{%- elif block['type'] in ['image', 'image_url'] -%}{{- '[IMG]' }}{%- endif -%}"
    "{%- endfor -%}{{- '[/INST]' }}{%- endif -%}"
    "{%- else -%}{{- (message['content'] if message['content'] is string else message['content'][0]['text'])"
    " + eos_token }}{%- endif -%}{%- endfor -%}"
)
INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
    "{% elif content['type'] == 'video' %}{{ '<video>\n' }}"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif content['type'] == 'video' %}{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN2_TEMPLATE = QWEN3_TEMPLATE.replace(
    "{{ '<|im_start|>' + message['role']",
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are left.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role']",
)
GEMMA3_TEMPLATE = (
    "{{ bos_token }}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- if messages[0]['content'] is string -%}{%- set prefix = messages[0]['content'] + '\n\n' -%}"
    "{%- else -%}{%- set prefix = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}"
    "{%- set loop_messages = messages[1:] -%}"
    "{%- else -%}{%- set prefix = '' -%}{%- set loop_messages = messages -%}{%- endif -%}"
    "{%- for message in loop_messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + (prefix if loop.first else '') }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}{%- else -%}"
    "{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}"
    "{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)


def _save(folder: Path, kind: type, config: Any, louder: tuple[str, ...] = ()) -> None:
    model = make_loud(kind(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in louder):
                parameter.add_(2.0)
    model.save_pretrained(folder)


def _text(tokenizer: Any, **options: Any) -> dict[str, Any]:
    return text_options(len(tokenizer), **{**special_ids(tokenizer), **options})


def llava(folder: Path) -> Path:
    """LLaVA-1.5: CLIP's last but one layer without the class token, projector, Llama 2 and its tokenizer."""
    tokenizer = llama2_tokenizer(("<image>",), pad_token="<pad>")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=LlamaConfig(**_text(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    _save(folder, LlavaForConditionalGeneration, config)
    image = {"image_processor_type": "CLIPImageProcessor", **CLIP_SIZES, **CLIP}
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    write_processor(folder, "LlavaProcessor", tokenizer, image, LLAVA_TEMPLATE, image_token="<image>", **options)
    as_llama2_file(folder)
    return folder


def llava_next(folder: Path) -> Path:
    """LLaVA-NeXT (Mistral): a whole view and tiles after a table of resolutions, a learned end of each row."""
    tokenizer = llama2_tokenizer(("<image>",), legacy=True, pad_token="<pad>")
    pinpoints = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**COARSE, projection_dim=32),
        text_config=MistralConfig(**_text(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        image_seq_length=4,
    )
    _save(folder, LlavaNextForConditionalGeneration, config)
    image = {"image_processor_type": "LlavaNextImageProcessor", **CLIP_SIZES, **CLIP, "image_grid_pinpoints": pinpoints}
    options = {"patch_size": 16, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    write_processor(folder, "LlavaNextProcessor", tokenizer, image, LLAVA_NEXT_TEMPLATE, nested=True, **options)
    return folder


def llava_onevision(folder: Path) -> Path:
    """LLaVA-OneVision: SigLIP, tiles that are shrunk where they are too many, Qwen2; a part for videos."""
    special = ("<|im_start|>", "<|im_end|>", "<image>", "<video>")
    tokenizer = byte_tokenizer(special, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    pinpoints = [[height, width] for height in (32, 64, 96) for width in (32, 64, 96)]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**COARSE, vision_use_head=False),
        text_config=Qwen2Config(**_text(tokenizer, tie_word_embeddings=True)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        vision_aspect_ratio="anyres_max_2",
    )
    _save(folder, LlavaOnevisionForConditionalGeneration, config)
    shared = {"size": SQUARE, **HALF}
    image = {"image_processor_type": "LlavaOnevisionImageProcessor", **shared, "image_grid_pinpoints": pinpoints}
    video = {"video_processor_type": "LlavaOnevisionVideoProcessor", **shared}
    options = {"num_image_tokens": 4, "vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_2"}
    write_processor(folder, "LlavaOnevisionProcessor", tokenizer, image, ONEVISION_TEMPLATE, video=video, **options)
    return folder


def vipllava(folder: Path) -> Path:
    """ViP-LLaVA: several of CLIP's layers side by side, a norm before the projector, Llama."""
    tokenizer = llama2_tokenizer(("<image>",), pad_token="<pad>")
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, projection_dim=32),
        text_config=LlamaConfig(**_text(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=[-2, -1, 0],
        image_seq_length=16,
    )
    _save(folder, VipLlavaForConditionalGeneration, config)
    image = {"image_processor_type": "CLIPImageProcessor", **CLIP_SIZES, **CLIP}
    options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    write_processor(folder, "LlavaProcessor", tokenizer, image, VIPLLAVA_TEMPLATE, **options)
    return folder


def aya_vision(folder: Path) -> Path:
    """Aya Vision: SigLIP on named tiles and a whole view, a gated projector, Cohere2 with a sliding layer."""
    turns = ("<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>")
    parts = ("<|END_RESPONSE|>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_LINE_BREAK|>", "<|IMG_PATCH|>")
    tiles = ("TILE_GLOBAL", *(f"TILE_{number}" for number in range(1, 5)))
    roles = {"pad_token": "<PAD>", "bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>"}
    tokenizer = add_bos(byte_tokenizer((*turns, *parts, *tiles), **roles))
    layers = ["sliding_attention", "full_attention"]
    config = AyaVisionConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=Cohere2Config(**_text(tokenizer, layer_types=layers, sliding_window=128, logit_scale=0.25)),
        image_token_index=tokenizer.convert_tokens_to_ids("<|IMG_PATCH|>"),
    )
    _save(folder, AyaVisionForConditionalGeneration, config)
    image = {"image_processor_type": "GotOcr2ImageProcessor", "size": SQUARE, **HALF, "max_patches": 4}
    options = {"patch_size": 8, "img_size": 32, "downsample_factor": 2, "image_token": "<image>"}
    write_processor(folder, "AyaVisionProcessor", tokenizer, image, AYA_TEMPLATE, nested=True, **options)
    return folder


def idefics2(folder: Path) -> Path:
    """Idefics2: images of any shape with a mask, four parts and the whole, a resampler, Mistral."""
    parts = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    tokenizer = llama2_tokenizer(parts, legacy=True, pad_token="<pad>")
    latents = {"resampler_n_latents": 4, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 8}
    config = Idefics2Config(
        vision_config=VISION,
        perceiver_config={"hidden_size": 32, "num_key_value_heads": 2, "initializer_range": LOUD, **latents},
        text_config=MistralConfig(**_text(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    _save(folder, Idefics2ForConditionalGeneration, config)
    sizes = {"size": {"shortest_edge": 16, "longest_edge": 32}, "do_image_splitting": True}
    image = {"image_processor_type": "Idefics2ImageProcessor", **sizes, **HALF}
    write_processor(folder, "Idefics2Processor", tokenizer, image, IDEFICS_TEMPLATE, image_seq_len=4)
    return folder


def _tile_names() -> tuple[str, ...]:
    return tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))


def idefics3(folder: Path) -> Path:
    """Idefics3: named tiles and a whole view, pixel shuffle, Llama 3."""
    parts = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")
    roles = {"pad_token": "<|pad|>", "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    tokenizer = add_bos(byte_tokenizer((*parts, *_tile_names()), **roles))
    config = Idefics3Config(
        vision_config=VISION,
        text_config=LlamaConfig(**_text(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    _save(folder, Idefics3ForConditionalGeneration, config)
    sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    image = {"image_processor_type": "Idefics3ImageProcessor", **sizes, **HALF}
    template = "<|begin_of_text|>" + IDEFICS_TEMPLATE
    write_processor(folder, "Idefics3Processor", tokenizer, image, template, nested=True, image_seq_len=4)
    return folder


def smolvlm(folder: Path) -> Path:
    """SmolVLM2: as Idefics3, with a part for videos that wants num2words."""
    named = {"fake_image_token": "<fake_token_around_image>", "image_token": "<image>"}
    named |= {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
    roles = {"pad_token": "<|im_end|>", "bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>"}
    tokenizer = byte_tokenizer(_tile_names(), **roles, **named)
    config = SmolVLMConfig(
        vision_config=VISION,
        text_config=LlamaConfig(**_text(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
    )
    _save(folder, SmolVLMForConditionalGeneration, config)
    sizes = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}}
    sampling = {"fps": 1, "max_frames": 4, "video_size": {"longest_edge": 32}}
    image = {"image_processor_type": "SmolVLMImageProcessor", **sizes, **HALF, "video_sampling": sampling}
    write_processor(folder, "SmolVLMProcessor", tokenizer, image, "<|im_start|>" + IDEFICS_TEMPLATE, image_seq_len=4)
    return folder


def _tekken(*special: str) -> Any:
    marks = ("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", *special)
    return add_bos(byte_tokenizer(marks, pad_token="<pad>", bos_token="<s>", eos_token="</s>"))


def pixtral(folder: Path) -> Path:
    """Pixtral, a LLaVA with an encoder for images of any shape; rows end in a token of the text."""
    tokenizer = _tekken()
    config = LlavaConfig(
        vision_config=PixtralVisionConfig(**{**COARSE, "image_size": 96}),
        text_config=MistralConfig(**_text(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        image_seq_length=1,
    )
    _save(folder, LlavaForConditionalGeneration, config)
    sizes = {"size": {"longest_edge": 96}, "patch_size": {"height": 16, "width": 16}}
    image = {"image_processor_type": "PixtralImageProcessor", **sizes, **CLIP}
    write_processor(folder, "PixtralProcessor", tokenizer, image, PIXTRAL_TEMPLATE, patch_size=16)
    return folder


def mistral3(folder: Path) -> Path:
    """Mistral Small 3.1: Pixtral's encoder, a merger of 2 x 2 patches, Mistral; a system prompt by default."""
    tokenizer = _tekken("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    config = Mistral3Config(
        vision_config=PixtralVisionConfig(**{**VISION, "image_size": 96}),
        text_config=MistralConfig(**_text(tokenizer, head_dim=8)),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        tie_word_embeddings=False,
    )
    _save(folder, Mistral3ForConditionalGeneration, config)
    sizes = {"size": {"longest_edge": 96}, "patch_size": 8}
    image = {"image_processor_type": "PixtralImageProcessorFast", **sizes, **CLIP}
    options = {"patch_size": 8, "spatial_merge_size": 2}
    write_processor(folder, "PixtralProcessor", tokenizer, image, MISTRAL3_TEMPLATE, nested=True, **options)
    return folder


def internvl(folder: Path) -> Path:
    """InternVL3: tiles as the processor's own default, pixel shuffle, Qwen2; a part for videos."""
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    roles = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    tokenizer = byte_tokenizer(("<|im_start|>",), **roles, **named, video_token="<video>")
    config = InternVLConfig(
        vision_config={**VISION, "image_size": [32, 32], "patch_size": [8, 8]},
        text_config=Qwen2Config(**_text(tokenizer)),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    _save(folder, InternVLForConditionalGeneration, config)
    shared = {"size": SQUARE, **CLIP}
    image = {"image_processor_type": "GotOcr2ImageProcessorFast", **shared, "crop_to_patches": False, "max_patches": 4}
    video = {"video_processor_type": "InternVLVideoProcessor", **shared}
    write_processor(folder, "InternVLProcessor", tokenizer, image, INTERNVL_TEMPLATE, video=video, image_seq_length=4)
    return folder


def _qwen_tokenizer() -> Any:
    vision = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
    return byte_tokenizer(("<|im_start|>", *vision), pad_token="<|endoftext|>", eos_token="<|im_end|>")


def _qwen_tokens(tokenizer: Any) -> dict[str, int]:
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{key}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in names.items()}


QWEN_PATCHES = {"patch_size": 8, "temporal_patch_size": 2, "merge_size": 2}
QWEN_VISION = {
    "depth": 2,
    "num_heads": 4,
    "patch_size": 8,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "initializer_range": LOUD,
}
MROPE = {"type": "mrope", "mrope_section": [2, 1, 1]}


def qwen2_vl(folder: Path) -> Path:
    """Qwen2-VL: patches in one flat list with a grid, positions in three parts; config.json is flat, as on the Hub."""
    tokenizer = _qwen_tokenizer()
    config = Qwen2VLConfig(
        vision_config={**QWEN_VISION, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
        text_config=_text(tokenizer, rope_scaling=MROPE, bos_token_id=tokenizer.pad_token_id),
        **_qwen_tokens(tokenizer),
    )
    _save(folder, Qwen2VLForConditionalGeneration, config)
    flat = config.get_text_config().to_dict() | {"model_type": "qwen2_vl", "rope_scaling": MROPE}
    edit_json(folder, "config.json", text_config=None, **{key: flat[key] for key in flat if key != "rope_parameters"})
    image = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 1024, "max_pixels": 8192, **CLIP}
    write_processor(folder, "Qwen2VLProcessor", tokenizer, {**image, **QWEN_PATCHES}, QWEN2_TEMPLATE)
    return folder


def qwen2_5_vl(folder: Path) -> Path:
    """Qwen2.5-VL: as Qwen2-VL, with windows in the encoder."""
    tokenizer = _qwen_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32}
    config = Qwen2_5_VLConfig(
        vision_config={**QWEN_VISION, **sizes, "window_size": 32, "fullatt_block_indexes": [1]},
        text_config=_text(tokenizer, rope_scaling=MROPE, bos_token_id=tokenizer.pad_token_id),
        **_qwen_tokens(tokenizer),
    )
    _save(folder, Qwen2_5_VLForConditionalGeneration, config)
    shared = {"size": {"shortest_edge": 1024, "longest_edge": 8192}, **CLIP, **QWEN_PATCHES}
    image = {"image_processor_type": "Qwen2VLImageProcessor", **shared}
    video = {"video_processor_type": "Qwen2VLVideoProcessor", **shared}
    write_processor(folder, "Qwen2_5_VLProcessor", tokenizer, image, QWEN2_TEMPLATE, video=video, nested=True)
    return folder


def qwen3_vl(folder: Path) -> Path:
    """Qwen3-VL: features of the encoder's first layer are added inside the decoder's first layers, too."""
    tokenizer = _qwen_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 16}
    rope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [2, 1, 1]}
    config = Qwen3VLConfig(
        vision_config={**QWEN_VISION, **sizes, "deepstack_visual_indexes": [0]},
        text_config=_text(tokenizer, head_dim=8, rope_scaling=rope, bos_token_id=tokenizer.pad_token_id),
        **_qwen_tokens(tokenizer),
        tie_word_embeddings=True,
    )
    _save(folder, Qwen3VLForConditionalGeneration, config)
    shared = {"size": {"shortest_edge": 1024, "longest_edge": 8192}, **HALF, **QWEN_PATCHES}
    image = {"image_processor_type": "Qwen2VLImageProcessorFast", **shared}
    video = {"video_processor_type": "Qwen3VLVideoProcessor", **shared}
    write_processor(folder, "Qwen3VLProcessor", tokenizer, image, QWEN3_TEMPLATE, video=video)
    return folder


def gemma3(folder: Path) -> Path:
    """Gemma 3: SigLIP, pooled and projected, image tokens that see each other, a sliding layer, `<bos>` from both."""
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    tokenizer = gemma_tokenizer(("<start_of_turn>", "<end_of_turn>"), **named)
    layers = ["sliding_attention", "full_attention"]
    sizes = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 128, "layer_types": layers}
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=Gemma3TextConfig(**_text(tokenizer, **sizes)),
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        initializer_range=LOUD,
    )
    louder = ("language_model.layers.0.post_", "language_model.layers.1.post_")  # norms that keep a layer's word small
    _save(folder, Gemma3ForConditionalGeneration, config, louder)
    image = {"image_processor_type": "Gemma3ImageProcessor", "size": SQUARE, **HALF, "do_pan_and_scan": None}
    write_processor(folder, "Gemma3Processor", tokenizer, image, GEMMA3_TEMPLATE, image_seq_length=4)
    return folder


def paligemma(folder: Path) -> Path:
    """PaliGemma: SigLIP, one linear layer, Gemma that sees its whole prompt at once; no chat template."""
    tokenizer = gemma_tokenizer(image_token="<image>")
    more = [f"<loc{number:0>4}>" for number in range(1024)] + [f"<seg{number:0>3}>" for number in range(128)]
    text = GemmaConfig(**{**_text(tokenizer, head_dim=8), "vocab_size": len(tokenizer) + len(more)})
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False, projection_dim=32),
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    tokenizer.add_tokens(more[:4])  # the processor adds the others
    _save(folder, PaliGemmaForConditionalGeneration, config)
    image = {"image_processor_type": "SiglipImageProcessor", "size": SQUARE, **HALF, "image_seq_length": 16}
    write_processor(folder, "PaliGemmaProcessor", tokenizer, image)
    return folder


TOKEN_STREAM: dict[str, Callable[[Path], Path]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "vipllava": vipllava,
    "aya_vision": aya_vision,
    "idefics2": idefics2,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "pixtral": pixtral,
    "mistral3": mistral3,
    "internvl": internvl,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "gemma3": gemma3,
    "paligemma": paligemma,
}
