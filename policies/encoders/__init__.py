"""Vision encoders: pixels (B, 3, h, w) -> hidden states, one feature vector a patch.

To add one: a file with a `build` and a line in `ENCODERS`; `--vision_encoder NAME` then selects it. Whatever
`AutoModel` loads needs no file: its folder or Hub id is its name.
"""

from manako.policies.encoders import clip_vit, convnext, efficientnet_lite, eva, eva_qformer, pretrained, vit
from manako.policies.encoders.encoder import BuildEncoder, Encoder, LoadEncoder
from manako.policies.errors import PolicyError

__all__ = ["ENCODERS", "Encoder", "LoadEncoder", "build_encoder"]

ENCODERS: dict[str, BuildEncoder] = {
    "vit": vit.build,
    "clip_vit": clip_vit.build,
    "eva": eva.build,
    "eva_qformer": eva_qformer.build,
    "convnext": convnext.build,
    "efficientnet_lite0": efficientnet_lite.build,
}


def build_encoder(
    name: str,
    frame_shape: tuple[int, int, int],
    image_size: int | None = None,
    patch_size: int | None = None,
    load: LoadEncoder = pretrained.load,
) -> Encoder:
    """Builds a vision encoder; a random one draws its weights from torch's global generator.

    Args:
        name: a key of `ENCODERS`, a folder or a Hub id.
        frame_shape: (H, W, 3) of the frames; a small random encoder is sized by it.
        image_size: side of the square that a small random encoder sees, by default the frame's up to 64 pixels; of
            `efficientnet_lite0` a multiple of 32, by default 224.
        patch_size: side of its patches in pixels; by default 8, and 16 at 64 pixels.
        load: what makes an encoder of a folder or a Hub id.

    Returns:
        The encoder and its image processor.

    Raises:
        PolicyError: no encoder of that name, or sizes that do not fit.
    """
    if name in ENCODERS:
        return ENCODERS[name](frame_shape, image_size, patch_size)
    if image_size or patch_size:
        raise PolicyError(f"image_size and patch_size are for the small encoders, not for {name!r}.")
    return load(name, ENCODERS)
