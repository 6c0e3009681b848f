"""Frames to pixels: the library's image processor, split so that the hot path is a table look-up.

transformers' PIL processors work image by image in float64-friendly NumPy; 32 frames cost some 26 ms. Rescaling and
normalising act on each of the 256 values of a channel alone, so the processor is asked once for its 3 x 256 answers,
and frames (already resized, uint8) are looked up in that table: the same float32 numbers, bit for bit. Resizing and
cropping stay with Pillow, once a frame, before the frames are stored. A processor that does more (image splitting,
padding masks) is recognised by comparing the two on a random frame, and is then called as it is.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers.image_utils import SizeDict


class PixelPipeline:
    """`resize` once a frame (uint8 in, uint8 out), `pixels` at every forward.

    Args:
        image_processor: any of transformers' image processors.
        frame_shape: (H, W, 3) of the frames to come.
        call: frames (B, H, W, 3) uint8, or (B, k, H, W, 3), to all inputs that the model gets of them, by the processor
            around it, which may give its image processor other defaults; by default the image processor itself.
        frames: how many of them a prompt has, k.

    Attributes:
        is_table: whether the table look-up gives what the processor gives; if not, frames stay as they are and
            the processor is called at every forward.
    """

    def __init__(
        self,
        image_processor: Any,
        frame_shape: tuple[int, int, int],
        call: Callable[[np.ndarray], dict[str, torch.Tensor]] | None = None,
        frames: int = 1,
    ) -> None:
        self.image_processor = image_processor
        self.call = call or self._call_alone
        self.table: torch.Tensor | None = None
        count = 2 * frames
        probe = np.random.default_rng(0).integers(0, 256, (count, *frame_shape), dtype=np.uint8)  # (2 k, H, W, 3)
        self._resizes = True
        several = probe.reshape(2, frames, *frame_shape) if frames > 1 else probe
        expected = self.call(several)
        pixel_values = expected.get("pixel_values")
        others = {name: value for name, value in expected.items() if name != "pixel_values"}
        # such as image_sizes; whether there is one for each image, and not for each prompt
        self._constants = {name: (value[:1], len(value) == count) for name, value in others.items()}
        same = all(len(value) in (2, count) and bool((value == value[:1]).all()) for value in others.values())
        shape = () if pixel_values is None else tuple(pixel_values.shape)
        self._nested = frames > 1 and len(shape) == 5 and shape[:2] == (2, frames)  # (B, k, 3, h, w)
        if same and pixel_values is not None and (self._nested or (len(shape) == 4 and shape[0] == count)):
            self.table = self._ask_table()
            if self.table is not None:
                stored = self._resize_by_processor(probe)
                if stored is None:
                    self.table = None
                    return
                self._resizes = not torch.equal(stored, torch.from_numpy(probe))  # a resize can keep the size
                made = self.pixels(stored.unflatten(0, (2, frames)) if frames > 1 else stored)["pixel_values"]
                if not torch.equal(made, pixel_values.float()):
                    self.table = None

    @property
    def is_table(self) -> bool:
        """Whether the table stands for the processor."""
        return self.table is not None

    def resize(self, images: np.ndarray) -> torch.Tensor:
        """Returns frames (B, H, W, 3) uint8 resized and cropped to (B, h, w, 3) uint8, what rollouts store."""
        if not self.is_table or not self._resizes:
            return torch.from_numpy(np.ascontiguousarray(images))
        resized = self._resize_by_processor(images)
        assert resized is not None, "the probe had a size"
        return resized

    def pixels(self, frames: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the model inputs of stored frames (B, h, w, 3) uint8: `pixel_values` (B, 3, h, w) float32, ...

        Of (B, k, h, w, 3), k frames a prompt: (B k, 3, h, w), prompt after prompt, or (B, k, 3, h, w) where the
        processor makes that.
        """
        if self.table is None:
            return {name: value.to(frames.device) for name, value in self.call(frames.cpu().numpy()).items()}
        prompts = len(frames)
        nested = (prompts, frames.shape[1]) if frames.ndim == 5 and self._nested else None
        frames = frames.flatten(0, 1) if frames.ndim == 5 else frames
        planes = frames.permute(0, 3, 1, 2)  # (B, 3, h, w)
        if frames.device.type == "cpu":
            table, index = self.table.numpy(), planes.numpy()
            values = torch.from_numpy(np.stack([table[c].take(index[:, c]) for c in range(3)], axis=1))
        else:
            channel = torch.arange(3, device=frames.device).view(1, 3, 1, 1)
            values = self.table.to(frames.device)[channel, planes.long()]
        constants = {
            name: value.to(frames.device).expand(len(frames) if of_each else prompts, *value.shape[1:])
            for name, (value, of_each) in self._constants.items()
        }
        return {"pixel_values": values if nested is None else values.unflatten(0, nested), **constants}

    def _call_alone(self, frames: np.ndarray) -> dict[str, torch.Tensor]:
        images = [list(frame) if frame.ndim == 4 else [frame] for frame in frames]
        made = self.image_processor(images=images, return_tensors="pt", input_data_format="channels_last")
        return {name: value for name, value in made.items() if torch.is_tensor(value)}

    def _resize_by_processor(self, images: np.ndarray) -> torch.Tensor | None:
        """Frames (B, h, w, 3) uint8 by the processor; None where it makes something else of them."""
        resized = np.asarray(
            self.image_processor(
                images=list(images),
                do_rescale=False,
                do_normalize=False,
                return_tensors="np",
                input_data_format="channels_last",
            )["pixel_values"]
        )  # (B, 3, h, w)
        if resized.ndim != 4 or resized.shape[:2] != (len(images), 3):
            return None
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(resized, 1, -1).astype(np.uint8)))

    def _ask_table(self) -> torch.Tensor | None:
        """The processor's answer to each value of each channel: (3, 256) float32, or None where it has none."""
        ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)  # (16, 16, 3)
        try:
            answer = self.image_processor(
                images=[ramp],
                do_resize=False,
                do_center_crop=False,
                return_tensors="pt",
                input_data_format="channels_last",
            )["pixel_values"]
        except (TypeError, ValueError, RuntimeError):  # it cannot do without its resizing
            return None
        if answer.shape != (1, 3, 16, 16):
            return None
        return answer[0].reshape(3, 256).float()


def in_words(frame_shape: tuple[int, int, int], processor: Any) -> str:
    """Returns the frames' size and what the processor says of sizes, for a sentence."""
    said = []
    for name in ("size", "crop_size", "patch_size", "merge_size"):
        value = getattr(processor.image_processor, name, None)
        value = getattr(processor, name, None) if value is None else value
        if isinstance(value, SizeDict):
            value = " ".join(f"{key} {number}" for key, number in vars(value).items() if number is not None)
        if value is not None:
            said.append(f"{name} {value}")
    return f"frames of {frame_shape[0]} x {frame_shape[1]} pixels ({', '.join(said) or 'it names no size'})"
