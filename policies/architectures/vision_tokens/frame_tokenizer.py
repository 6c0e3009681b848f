"""Frames to codes and back: a patch becomes a point, and the point's coordinates are rounded to a few levels each.

bound(z) = tanh(z + s) (L - 1) / 2 - o        o = 1/2 for an even number of levels L, else 0; s = atanh(o / ((L-1)/2))
code     = round(bound(z)), whose gradient is taken to be 1                      FSQ, arXiv:2309.15505
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from manako.policies.architectures.vision_tokens.configuration import FrameTokenizerConfig
from manako.policies.errors import PolicyError

LOADED = "_is_hf_initialized"  # how the library marks weights that come from a file
MOST_CODES = 256  # codes travel as numbers of the model's precision, and bfloat16 tells no more whole numbers apart
EPSILON = 1e-3  # keeps the outermost levels reachable


class FSQ(nn.Module):
    """Finite scalar quantization.

    Args:
        levels: of each of the d dimensions.
    """

    levels: Tensor  # (d,)
    basis: Tensor  # (d,)

    def __init__(self, levels: list[int]) -> None:
        super().__init__()
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor([1, *levels[:-1]]).cumprod(0), persistent=False)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns points in [-1, 1] (..., d), through which gradients flow, and codes (...) int64, of z (..., d)."""
        half = (self.levels - 1) * (1 + EPSILON) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        bounded = torch.tanh(z.float() + torch.atanh(offset / half)) * half - offset
        rounded = bounded + (bounded.round() - bounded).detach()
        width = self.levels // 2
        return rounded / width, ((rounded.detach().round().long() + width) * self.basis).sum(-1)

    def points(self, codes: Tensor) -> Tensor:
        """Returns the points (..., d) of codes (...)."""
        width = self.levels // 2
        return (codes[..., None] // self.basis % self.levels - width) / width


class FrameTokenizer(PreTrainedModel):
    """Pixels to codes and back, each patch by itself."""

    config: FrameTokenizerConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: FrameTokenizerConfig) -> None:
        super().__init__(config)
        if config.num_codes > MOST_CODES:
            raise PolicyError(
                f"levels {list(config.levels)} give {config.num_codes} codes: expected {MOST_CODES} at most, which "
                "every precision of the weights can number."
            )
        width, depth, patch = config.hidden_size, len(config.levels), config.patch_size
        self.encoder = nn.Sequential(nn.Conv2d(3, width, patch, stride=patch), nn.GELU(), nn.Conv2d(width, depth, 1))
        self.fsq = FSQ(list(config.levels))
        self.decoder = nn.Sequential(
            nn.Conv2d(depth, width, 1), nn.GELU(), nn.ConvTranspose2d(width, 3, patch, stride=patch)
        )
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FSQ):  # whose tables are lost by a model that is loaded onto the meta device
            module.levels = torch.tensor(list(self.config.levels))
            module.basis = torch.tensor([1, *self.config.levels[:-1]]).cumprod(0)
        elif isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)) and not module.weight.__dict__.get(LOADED):
            module.reset_parameters()  # the library's 0.02 leaves all patches at one point

    def quantize(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns points (B, P, d) and codes (B, P) of pixels (B, 3, h, w), row by row."""
        z = self.encoder(pixel_values.to(self.dtype)).flatten(2).transpose(1, 2)  # (B, P, d)
        points, codes = self.fsq(z)
        return points, codes

    def draw(self, points: Tensor) -> Tensor:
        """Returns pixels (B, 3, h, w) of points (B, P, d)."""
        side = self.config.image_size // self.config.patch_size
        return self.decoder(points.to(self.dtype).transpose(1, 2).unflatten(2, (side, side)))

    def draw_codes(self, codes: Tensor) -> Tensor:
        """Returns pixels (B, 3, h, w) of codes (B, P)."""
        return self.draw(self.fsq.points(codes))

    def reconstruct(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the mean squared error of what is drawn of pixels (B, 3, h, w), (), and their codes (B, P)."""
        points, codes = self.quantize(pixel_values)
        return F.mse_loss(self.draw(points).float(), pixel_values.float()), codes

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Returns the codes as hidden states (B, P, 1) of pixels (B, 3, h, w)."""
        return BaseModelOutput(last_hidden_state=self.quantize(pixel_values)[1][..., None].to(self.dtype))
