"""The model that reads frames as codes, around any language model: a name of ours, a folder or a Hub id."""

from manako.policies.architectures.composed import build as composed
from manako.policies.architectures.composed.modeling import ManakoForConditionalGeneration
from manako.policies.architectures.composed.processing import ManakoProcessor
from manako.policies.architectures.vision_tokens.configuration import FrameTokenizerConfig
from manako.policies.architectures.vision_tokens.frame_tokenizer import FrameTokenizer
from manako.policies.architectures.vision_tokens.modeling import VisionTokensForConditionalGeneration
from manako.policies.encoders.encoder import Encoder, sides, square_processor
from manako.policies.errors import PolicyError

FSQ_NAME, CODES = "fsq", "codes"  # what the preset calls its two parts


def build_vlm(
    vision_encoder: str,
    adapter: str,
    language_model: str,
    frame_shape: tuple[int, int, int],
    image_size: int | None = None,
    patch_size: int | None = None,
    seed: int = 0,
) -> tuple[ManakoForConditionalGeneration, ManakoProcessor]:
    """Builds one with a new frame tokenizer; see `composed.build.build_vlm`.

    Raises:
        PolicyError: another encoder or adapter, or sizes that do not fit.
    """
    for flag, value, own in (("vision_encoder", vision_encoder, FSQ_NAME), ("adapter", adapter, CODES)):
        if value != own:
            raise PolicyError(
                f"--{flag} {value!r} came, but vision_tokens reads frames as codes of its own tokenizer: leave it out."
            )
    return composed.build_vlm(
        vision_encoder,
        None,
        language_model,
        frame_shape,
        image_size,
        patch_size,
        seed,
        kind=VisionTokensForConditionalGeneration,
        make_encoder=_frame_tokenizer,
    )


def _frame_tokenizer(
    name: str, frame_shape: tuple[int, int, int], image_size: int | None, patch_size: int | None
) -> Encoder:
    """A new one; it is the only one that there is."""
    side, patch = sides(frame_shape, image_size, patch_size)
    return Encoder(FrameTokenizer(FrameTokenizerConfig(image_size=side, patch_size=patch)), square_processor(side))
