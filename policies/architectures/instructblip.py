"""InstructBLIP (arXiv:2305.06500): BLIP-2 whose Q-Former reads the instruction, so that what is seen is what is asked.

    frame ── EVA ──► features (B, P, Dv) ────────────┐ cross-attention
                                                     ▼
    K queries ───────┬─ self-attention ─► queries, text ─► K queries ── linear ──► (B, K, D) ── language model
    instruction ─────┘

As small random parts, the composed model with the encoder `eva` and the adapter `instruct_qformer`:

    python experiments/run_ppo.py --policy instructblip
    python experiments/run_sft.py --policy instructblip --dataset data/goto --trainable full --loss actions

A model of the library is a row as BLIP-2 is, and its processor makes `qformer_input_ids` of the instruction:

    python experiments/check_model.py Salesforce/instructblip-flan-t5-xl

Otherwise than in the paper the preset's Q-Former has no words of its own: it reads the prompt's text before the image,
embedded by the language model; `--stage represent` teaches it as BLIP-2's (qformer_pretraining.py). Left out: the
paper's training on 13 data sets; a Q-Former of BLIP-2 to start from.
"""

from manako.policies.architectures.blip2 import name_parts

__all__ = ["name_parts"]
