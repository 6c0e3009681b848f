"""Kosmos-2 (arXiv:2306.14824): image embeddings in the token stream of one decoder, and places as tokens of its words.

    python experiments/run_ppo.py --config experiments/configs/touch_kosmos2.yaml

    frame ─ CLIP tower ─ (B, P + 1, Dv) ─ unit length ─ dense ─┐
                        latent queries (K, D) ─────────────────┴─ cross-attention ─ (B, K, D)
                                                                                       │
    <s> <image>  . . . K image embeddings . . .  </image> <grounding> system, instruction, <|assistant|>   (B, L)
                                                                                       │
                                             causal decoder, positions of sines ─ LM head ─ (B, L, V)
                                                                                       │
                  words, or a box of the frame's 32 x 32 bins:  <object> <patch_index_0320> <patch_index_0682> </object>

`Kosmos2ForConditionalGeneration` is the library's, with any weights. The processor writes the image's places in front
of the text, and `image_embeds_position_mask` says where they are. Where the action is a place, the policy says it in
grounding tokens: see `manako.policies.answers.place`.

`build_vlm` makes a small random one, whose CLIP tower, latent queries and decoder belong together: none is replaced
alone. It differs from the paper's in size, in a head of its own (the paper's is tied to the words), and in weights that
are drawn larger. Left out: the paper's pretraining on text and boxes of images from the web (GrIT).
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoProcessor, Kosmos2Config, Kosmos2ForConditionalGeneration, Kosmos2Processor

from manako.policies.architectures.model import Model, plain
from manako.policies.encoders.encoder import TRANSFORMER, sides, square_processor
from manako.policies.errors import PolicyError
from manako.policies.language_models.tiny_llama import tiny_tokenizer
from manako.policies.reading import AnswerPlaces

QUERIES = 16  # K
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
WORDS = "touch tap point place row rows column columns"  # beside those of the tiny tokenizer
TEMPLATE = (
    "{{ '<grounding>' }}"
    "{%- for message in messages -%}{{ '<|' + message['role'] + '|>' }}"
    "{%- for part in message['content'] -%}{%- if part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
# As the library draws them, words and the frame hardly reach the state at which the answer is read: with layers of .1
# and the others at 1, exchanging the frame changed that state by .01 of its size, the instruction by .04. With these it
# is .4, and .1 to .25 (four seeds, Touch).
WORD_STD = 2.0
LAYER_STD = 0.25
DENSE_STD = 2.0  # its input has unit length, 1 / 8 a number
PATCH_STD = 0.1
HEAD_STD = 0.015  # the first policy is nearly uniform, so that PPO explores


class GroundingProcessor(Kosmos2Processor):
    """The library's processor, whose folder keeps how many places an image has, and a chat template.

    Args:
        image_processor: frames to pixels.
        tokenizer: of the text; the grounding tokens are added to it.
        num_patch_index_tokens: bins of the frame.
        num_image_tokens: the model's latent queries, K.
        chat_template: Jinja template of the text behind the image.
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        num_patch_index_tokens: int = 1024,
        num_image_tokens: int = 64,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, num_patch_index_tokens)
        self.num_image_tokens = num_image_tokens
        self.chat_template = chat_template


def name_parts(vlm: Any, processor: Any) -> Model:
    """Names the parts; see `manako.policies.architectures.name_parts`."""
    processor.num_image_tokens = plain(vlm).config.latent_query_num  # the library's own forgets it
    return Model(
        vlm=vlm,
        processor=processor,
        encoder="vision_model",
        adapter=("image_to_text_projection",),
        decoder="text_model",
        placeholder=None,
        placeholder_id=None,
        reading=AnswerPlaces,
    )


def build_vlm(
    vision_encoder: str | None,
    adapter: str | None,
    language_model: str | None,
    frame_shape: tuple[int, int, int],
    image_size: int | None = None,
    patch_size: int | None = None,
    seed: int = 0,
) -> tuple[Kosmos2ForConditionalGeneration, GroundingProcessor]:
    """Builds a small random one.

    Args:
        vision_encoder: None, for its own is a part of it, as for the two that follow.
        adapter: None.
        language_model: None.
        frame_shape: (H, W, 3).
        image_size: see `manako.policies.encoders.build_encoder`.
        patch_size: see `manako.policies.encoders.build_encoder`.
        seed: of the random weights.

    Returns:
        The model in evaluation mode and its processor.

    Raises:
        PolicyError: a part to replace, or sizes that do not fit.
    """
    given = {"--vision_encoder": vision_encoder, "--adapter": adapter, "--language_model": language_model}
    for flag, name in given.items():
        if name is not None:
            raise PolicyError(
                f"{flag} {name!r} came, but the parts of kosmos2 are the library's own and belong together: leave it "
                "out, or give a folder of a Kosmos-2."
            )
    side, patch = sides(frame_shape, image_size, patch_size)
    roles = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = tiny_tokenizer((*SPECIAL, *ROLES), WORDS, **roles)
    processor = GroundingProcessor(square_processor(side), tokenizer, num_image_tokens=QUERIES, chat_template=TEMPLATE)
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 2048,
        "embed_dim": 64,
        "layers": 2,
        "ffn_dim": 128,
        "attention_heads": 4,
        "scale_embedding": False,
        "init_std": LAYER_STD,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
    }
    vision = {**TRANSFORMER, "image_size": side, "patch_size": patch, "initializer_range": PATCH_STD}
    config = Kosmos2Config(text_config=text, vision_config=vision, latent_query_num=QUERIES, tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vlm = Kosmos2ForConditionalGeneration(config)
        _draw(vlm)
    return vlm.eval(), processor


@torch.no_grad()
def _draw(vlm: Kosmos2ForConditionalGeneration) -> None:
    """Draws words, places and what projects the frame large, and the head small."""
    words: Any = vlm.get_input_embeddings()
    nn.init.normal_(words.weight, std=WORD_STD)
    words.weight[words.padding_idx].zero_()
    nn.init.normal_(vlm.get_output_embeddings().weight, std=HEAD_STD)
    nn.init.normal_(vlm.vision_model.model.embeddings.position_embedding.weight, std=1.0)
    nn.init.normal_(vlm.image_to_text_projection.dense.weight, std=DENSE_STD)


AutoProcessor.register(Kosmos2Config, GroundingProcessor, exist_ok=True)  # found by its name in a folder
