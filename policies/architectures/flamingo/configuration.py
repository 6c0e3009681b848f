"""Configuration of the Flamingo-like model: the composed model's three parts, the resampler and the gated layers."""

from manako.policies.architectures.composed.configuration import ManakoConfig


class FlamingoConfig(ManakoConfig):
    """Vision encoder + adapter + resampler, and gated layers between the language model's own.

    Args:
        adapter: maps features to the language model's width, in front of the resampler.
        num_image_tokens: placeholders of one image in the text; the visual tokens do not take their place.
        num_latents: visual tokens of one image, K.
        resampler_depth: layers of the resampler.
        num_gated_layers: how many of the decoder's layers have a gated layer in front, at most; every n-th has one,
            from the first.
    """

    model_type = "manako_flamingo"

    num_latents: int = 8
    resampler_depth: int = 2
    num_gated_layers: int = 4

    def gated_places(self, layers: int) -> range:
        """Returns which of so many decoder layers have a gated layer in front."""
        return range(0, layers, -(-layers // self.num_gated_layers))
