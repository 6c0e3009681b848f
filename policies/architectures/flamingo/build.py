"""The Flamingo-like model around any three parts: a name of ours, a folder or a Hub id each."""

from manako.policies.architectures.composed import build as composed
from manako.policies.architectures.composed.modeling import ManakoForConditionalGeneration
from manako.policies.architectures.composed.processing import ManakoProcessor
from manako.policies.architectures.flamingo.modeling import FlamingoForConditionalGeneration


def build_vlm(
    vision_encoder: str,
    adapter: str,
    language_model: str,
    frame_shape: tuple[int, int, int],
    image_size: int | None = None,
    patch_size: int | None = None,
    seed: int = 0,
) -> tuple[ManakoForConditionalGeneration, ManakoProcessor]:
    """Builds a `FlamingoForConditionalGeneration` with closed gates; see `composed.build.build_vlm`.

    Raises:
        PolicyError: as there, or a decoder without one list of layers.
    """
    kind = FlamingoForConditionalGeneration
    return composed.build_vlm(
        vision_encoder, adapter, language_model, frame_shape, image_size, patch_size, seed, kind=kind
    )
