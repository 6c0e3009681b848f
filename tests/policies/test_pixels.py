"""The table look-up gives the library's pixels bit for bit, or stands aside."""

import numpy as np
import pytest
import torch
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    ConvNextImageProcessorPil,
    Idefics3ImageProcessorPil,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)

from manako.policies.architectures.composed.build import build_vlm
from manako.policies.pixels import PixelPipeline
from tests.helpers.foreign_models import frames

CROP = {"height": 32, "width": 32}
PROCESSORS = {
    "vit": ViTImageProcessorPil(size={"height": 32, "width": 32}),
    "clip": CLIPImageProcessorPil(size={"shortest_edge": 36}, crop_size=CROP),
    "clip without crop": CLIPImageProcessorPil(size={"shortest_edge": 36}, do_center_crop=False),
    "convnext": ConvNextImageProcessorPil(size={"shortest_edge": 32}, crop_pct=0.875),
    "siglip": SiglipImageProcessorPil(size={"height": 32, "width": 32}),
    "bit, padded by its crop": BitImageProcessorPil(size={"shortest_edge": 20}, crop_size=CROP),
    "neither resized nor normalised": ViTImageProcessorPil(do_resize=False, do_normalize=False),
    "as bytes": ViTImageProcessorPil(size={"height": 32, "width": 32}, do_normalize=False, do_rescale=False),
}


def library(processor, images):
    """The processor's own answer."""
    return processor(images=list(images), return_tensors="pt", input_data_format="channels_last")["pixel_values"]


@pytest.mark.parametrize("shape", [(32, 32, 3), (64, 64, 3), (40, 56, 3), (210, 160, 3), (20, 20, 3)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_the_table_gives_the_librarys_pixels(name, shape):
    pipeline = PixelPipeline(PROCESSORS[name], shape)
    assert pipeline.is_table
    images = frames(5, shape, seed=1)
    images[0], images[1] = 0, 255
    stored = pipeline.resize(images)
    assert stored.dtype == torch.uint8 and stored.shape[-1] == 3 and stored.is_contiguous()
    pixels = pipeline.pixels(stored)
    assert list(pixels) == ["pixel_values"]
    expected = library(PROCESSORS[name], images)
    assert pixels["pixel_values"].dtype == torch.float32
    assert torch.equal(pixels["pixel_values"], expected.float())


def test_channels_are_not_exchanged():
    processor = ViTImageProcessorPil(
        size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3], image_std=[1.0, 2.0, 4.0]
    )
    pipeline = PixelPipeline(processor, (8, 8, 3))
    red = np.zeros((1, 8, 8, 3), dtype=np.uint8)
    red[..., 0] = 255
    pixels = pipeline.pixels(pipeline.resize(red))["pixel_values"]
    assert torch.allclose(pixels[0, :, 0, 0], torch.tensor([0.9, -0.2 / 2, -0.3 / 4]), atol=1e-6)


@pytest.mark.parametrize("vision_encoder", ["vit", "clip_vit", "convnext"])
def test_the_small_encoders_use_the_table(vision_encoder):
    _, processor = build_vlm(vision_encoder, "mlp", "tiny-llama", (100, 100, 3))
    assert PixelPipeline(processor.image_processor, (100, 100, 3)).is_table


def test_a_processor_that_cuts_frames_is_called_as_it_is():
    processor = Idefics3ImageProcessorPil(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    pipeline = PixelPipeline(processor, (40, 40, 3))
    assert not pipeline.is_table
    images = frames(3, (40, 40, 3))
    stored = pipeline.resize(images)
    assert torch.equal(stored, torch.from_numpy(images))  # frames stay as they are
    pixels = pipeline.pixels(stored)
    expected = processor(images=[[image] for image in images], return_tensors="pt", input_data_format="channels_last")
    assert pixels["pixel_values"].shape == (3, 5, 3, 32, 32)  # four parts and the whole frame
    assert pixels.keys() == {"pixel_values", "pixel_attention_mask"}
    for key, value in pixels.items():
        assert torch.equal(value, expected[key])


class Brightened(ViTImageProcessorPil):
    """A processor whose pixels depend on the whole frame, which no table can say."""

    def __call__(self, images, **options):
        outputs = super().__call__(images, **options)
        outputs["pixel_values"] = outputs["pixel_values"] - outputs["pixel_values"].mean()
        return outputs


def test_a_processor_that_looks_at_the_whole_frame_is_called_as_it_is():
    processor = Brightened(size={"height": 16, "width": 16})
    pipeline = PixelPipeline(processor, (16, 16, 3))
    assert not pipeline.is_table
    images = frames(1, (16, 16, 3))
    assert torch.equal(pipeline.pixels(pipeline.resize(images))["pixel_values"], library(processor, images))
