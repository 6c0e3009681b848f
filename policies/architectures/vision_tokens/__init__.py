r"""Vision tokens: frames as words of a second vocabulary, which the model reads and, for what comes next, also says.

    frame ── patches ── small network ── FSQ ──►  P codes of 200          frozen but in its own stage, `represent`
                                                   │ looked up, (P, D)
    system, instruction, <image> x P, cue ─ embeddings ─► language model ─► LM head ─► the action
                                                   then, behind prompt and action, teacher forced:
                                                   P codes of the next frame ◄── head of codes

Finite scalar quantization (arXiv:2309.15505) makes the codes; one stream of words and codes is Chameleon's
(arXiv:2405.09818), and a world that is imagined code by code is that of IRIS (arXiv:2209.00588). The codes continue the
language model's vocabulary in tables of their own, for embeddings and for the head, so that they learn while its own
rows stay: the part `adapter`. Words and codes are never in one softmax, so no answer can hold a code, and no text of an
environment can bring one in.

    python experiments/run_sft.py --stage represent --policy vision_tokens --output_dir runs/codes     frames to codes
    python experiments/run_ppo.py --policy runs/codes/final --next_frame_coef 1                        act, and predict
    python experiments/imagine.py --policy runs/...                                    imagined beside real frames

To predict alone, from the play of chance, whose last frames the data set holds:

    python experiments/run_sft.py --stage represent --policy vision_tokens --captions 1000 --epochs 10 \
        --learning_rate 3e-3 --output_dir runs/codes
    python experiments/collect.py --player random --episodes 400 --output data/random
    python experiments/run_sft.py --policy runs/codes/final --trainable full --dataset data/random --loss actions \
        --next_frame_coef 1 --learning_rate 2e-3 --epochs 8 --output_dir runs/world
    python experiments/imagine.py --policy runs/world/final --gif imagined.gif

Left out: a decoder that draws across patches, so each patch is drawn from its code alone, and what does not fit into
200 kinds of patches is lost; a model of rewards and ends, which IRIS learns in imagination.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from manako.policies.architectures.composed.processing import ManakoProcessor
from manako.policies.architectures.vision_tokens.configuration import FrameTokenizerConfig, VisionTokensConfig
from manako.policies.architectures.vision_tokens.frame_tokenizer import FrameTokenizer
from manako.policies.architectures.vision_tokens.modeling import VisionTokensForConditionalGeneration, VisionTokensModel

AutoConfig.register(FrameTokenizerConfig.model_type, FrameTokenizerConfig, exist_ok=True)
AutoModel.register(FrameTokenizerConfig, FrameTokenizer, exist_ok=True)
AutoConfig.register(VisionTokensConfig.model_type, VisionTokensConfig, exist_ok=True)
AutoModel.register(VisionTokensConfig, VisionTokensModel, exist_ok=True)
AutoModelForImageTextToText.register(VisionTokensConfig, VisionTokensForConditionalGeneration, exist_ok=True)
AutoModelForCausalLM.register(VisionTokensConfig, VisionTokensForConditionalGeneration, exist_ok=True)  # for TRL's DPO
AutoProcessor.register(VisionTokensConfig, ManakoProcessor, exist_ok=True)

__all__ = [
    "FrameTokenizer",
    "FrameTokenizerConfig",
    "VisionTokensConfig",
    "VisionTokensForConditionalGeneration",
    "VisionTokensModel",
]
