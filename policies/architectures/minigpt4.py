"""MiniGPT-4 (arXiv:2304.10592): what sees is BLIP-2's and frozen, and one matrix carries it over to a language model.

    frame ── EVA ──► (B, 1 + P, Dv) ── Q-Former ──► (B, K, width) ── linear ──► (B, K, D) ── language model
             └──────────── frozen ─────────────┘                    learns                  frozen

    python experiments/run_sft.py --stage align --policy minigpt4 --vision_encoder runs/blip2/final
    python experiments/run_ppo.py --policy runs/.../final --trainable adapter

The row is the composed model with `eva_qformer` as its encoder and `linear` as its adapter. A folder in
`--vision_encoder` brings EVA and the Q-Former that BLIP-2 trained: a BLIP-2 of the library, or a run of `--policy
blip2`. Without one both are small and random, and nothing is worth freezing: `--trainable full`, as is PPO's default,
trains all of it. `--trainable adapter` is the paper's: the matrix, and the value head of PPO.

Left out: the prompts of Vicuna (a language model's own chat template is used), and the second stage's hand-picked
descriptions, of which `run_sft.py --stage instruct` on demonstrations takes the place.
"""

from functools import partial

from manako.policies.architectures.composed import build as composed
from manako.policies.architectures.composed.modeling import ManakoForConditionalGeneration
from manako.policies.architectures.composed.processing import ManakoProcessor
from manako.policies.encoders import build_encoder, eva_qformer


def build_vlm(
    vision_encoder: str,
    adapter: str,
    language_model: str,
    frame_shape: tuple[int, int, int],
    image_size: int | None = None,
    patch_size: int | None = None,
    seed: int = 0,
) -> tuple[ManakoForConditionalGeneration, ManakoProcessor]:
    """Composes the parts as `composed.build.build_vlm` does; of a folder it takes EVA together with the Q-Former.

    Raises:
        PolicyError: as there, or a folder without both.
    """
    return composed.build_vlm(
        vision_encoder,
        adapter,
        language_model,
        frame_shape,
        image_size,
        patch_size,
        seed,
        make_encoder=partial(build_encoder, load=eva_qformer.load),
    )
