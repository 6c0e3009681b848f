"""Frames to pixels: the library's image processor, split so that the hot path is a table look-up.

transformers' PIL processors work image by image in float64-friendly NumPy; 32 frames cost some 26 ms. Rescaling and
normalising act on each of the 256 values of a channel alone, so the processor is asked once for its 3 x 256 answers,
and frames (already resized, uint8) are looked up in that table: the same float32 numbers, bit for bit. Resizing and
cropping stay with Pillow, once a frame, before the frames are stored. A processor that does more (image splitting,
padding masks) is recognised by comparing the two on a random frame, and is then called as it is.
"""

from typing import Any

import numpy as np
import torch


class PixelPipeline:
    """`resize` once a frame (uint8 in, uint8 out), `pixels` at every forward.

    Args:
        image_processor: any of transformers' image processors.
        frame_shape: (H, W, 3) of the frames to come.

    Attributes:
        is_table: whether the table look-up gives what the processor gives; if not, frames stay as they are and
            the processor is called at every forward.
    """

    def __init__(self, image_processor: Any, frame_shape: tuple[int, int, int]) -> None:
        self.image_processor = image_processor
        self.table: torch.Tensor | None = None
        probe = np.random.default_rng(0).integers(0, 256, (2, *frame_shape), dtype=np.uint8)  # (2, H, W, 3)
        self._resizes = True
        expected = dict(image_processor(images=list(probe), return_tensors="pt", input_data_format="channels_last"))
        self.extra_keys = tuple(sorted(key for key in expected if key != "pixel_values"))
        if not self.extra_keys and expected["pixel_values"].ndim == 4:
            self.table = self._ask_table()
            if self.table is not None:
                stored = self.resize(probe)
                self._resizes = not torch.equal(stored, torch.from_numpy(probe))  # a resize can keep the size
                if not torch.equal(self.pixels(stored)["pixel_values"], expected["pixel_values"].float()):
                    self.table = None

    @property
    def is_table(self) -> bool:
        """Whether the table stands for the processor."""
        return self.table is not None

    def resize(self, images: np.ndarray) -> torch.Tensor:
        """Returns frames (B, H, W, 3) uint8 resized and cropped to (B, h, w, 3) uint8, what rollouts store."""
        if not self.is_table or not self._resizes:
            return torch.from_numpy(np.ascontiguousarray(images))
        resized = self.image_processor(
            images=list(images),
            do_rescale=False,
            do_normalize=False,
            return_tensors="np",
            input_data_format="channels_last",
        )["pixel_values"]  # (B, 3, h, w)
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.asarray(resized), 1, -1).astype(np.uint8)))

    def pixels(self, frames: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the model inputs of stored frames (B, h, w, 3) uint8: `pixel_values` (B, 3, h, w) float32, ..."""
        if self.table is None:
            inputs = self.image_processor(
                images=[[frame] for frame in frames.cpu().numpy()],
                return_tensors="pt",
                input_data_format="channels_last",
            )
            return {key: value.to(frames.device) for key, value in inputs.items() if torch.is_tensor(value)}
        planes = frames.permute(0, 3, 1, 2)  # (B, 3, h, w)
        if frames.device.type == "cpu":
            table, index = self.table.numpy(), planes.numpy()
            values = torch.from_numpy(np.stack([table[c].take(index[:, c]) for c in range(3)], axis=1))
        else:
            channel = torch.arange(3, device=frames.device).view(1, 3, 1, 1)
            values = self.table.to(frames.device)[channel, planes.long()]
        return {"pixel_values": values}

    def _ask_table(self) -> torch.Tensor | None:
        """The processor's answer to each value of each channel: (3, 256) float32, or None where it has none."""
        ramp = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)  # (16, 16, 3)
        answer = self.image_processor(
            images=[ramp], do_resize=False, do_center_crop=False, return_tensors="pt", input_data_format="channels_last"
        )["pixel_values"]
        if answer.shape != (1, 3, 16, 16):
            return None
        return answer[0].reshape(3, 256).float()
