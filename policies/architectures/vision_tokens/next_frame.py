"""The next frame's codes, of a frame, an instruction and an action: a loss, and what the model imagines.

    prompt (with the frame's P codes) | answer | P codes of the next frame, which are predicted each from those before

One forward over all of it, teacher forced, gives the loss; one code after another, on the prompt's keys and values, is
how the model imagines.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from manako.policies.answers.closed_set import ActionCodec
from manako.policies.architectures.model import Model
from manako.policies.features import COLUMN
from manako.policies.interface import NEXT_CODES, Rows
from manako.policies.processing import Processing


class NextFrame:
    """What a model of vision tokens says of the next frame.

    Args:
        model: the model.
        processing: rows to the model's inputs.
        codec: the actions' tokens.
    """

    def __init__(self, model: Model, processing: Processing, codec: ActionCodec) -> None:
        self.model, self.processing, self.codec = model, processing, codec
        self.num_patches = model.base_vlm.config.vision_config.num_patches  # P

    def codes(self, images: np.ndarray) -> Tensor:
        """Returns the codes (B, P) int64 of frames (B, H, W, 3) uint8, on the CPU."""
        pipeline, vlm = self.processing.pipeline, self.model.base_vlm
        frames = pipeline.resize(images)
        seen = self.processing.seen(frames)
        if seen is not None:
            return seen[..., 0].long()  # they are kept, for when the policy sees these
        frames = frames.to(vlm.device)
        with torch.autocast(vlm.device.type, enabled=False):
            return vlm.model.get_vision_features(pipeline.pixels(frames)["pixel_values"])[..., 0].long().cpu()

    @torch.no_grad()
    def pictures(self, codes: Tensor) -> np.ndarray:
        """Returns what codes (B, P) are drawn as, (B, side, side, 3) uint8."""
        vlm, processor = self.model.base_vlm, self.processing.processor.image_processor
        pixels = vlm.model.vision_tower.draw_codes(codes.to(vlm.device)).float().cpu()  # (B, 3, h, w)
        mean, std = (torch.tensor(value)[:, None, None] for value in (processor.image_mean, processor.image_std))
        return ((pixels * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()

    def loss(self, inputs: Rows, actions: Sequence[int]) -> Tensor:
        """Returns the mean of -log p(code | those before it) over B samples and their P codes, ().

        Args:
            inputs: B rows with `next_codes` (B, P) int64, of the frame that the step returned.
            actions: index of each sample's action.
        """
        following = inputs[NEXT_CODES]  # (B, P)
        logprobs = self.logits(inputs, actions, following).log_softmax(-1)
        return -logprobs.gather(2, following[..., None]).mean()

    def logits(self, inputs: Rows, actions: Sequence[int], following: Tensor) -> Tensor:
        """Returns logits (B, P, C) of the next frame's codes, each given the true ones before it (B, P)."""
        vlm = self.model.base_vlm
        given, last = self._with_actions(inputs, actions, self.num_patches)
        now = self._features(given)  # (B k, P, 1)
        now = now.unflatten(0, (len(following), -1))  # (B, k, P, 1)
        both = torch.cat([now, following[:, None, :, None].to(now.dtype)], dim=1).flatten(0, 1)  # (B (k + 1), P, 1)
        hidden = vlm.model(**{**given, COLUMN: both}).last_hidden_state  # (B, L, D)
        places = last[:, None] + torch.arange(self.num_patches, device=last.device)  # (B, P)
        rows = torch.arange(len(last), device=last.device)[:, None]
        return vlm.model.adapter.head(hidden[rows, places]).float()

    @torch.no_grad()
    def imagine(self, inputs: Rows, actions: Sequence[int]) -> Tensor:
        """Returns the likeliest next codes (B, P), one after another, each given those that were said before it."""
        vlm = self.model.base_vlm
        given, last = self._with_actions(inputs, actions, 0)
        cache = DynamicCache(config=vlm.config)
        features = {COLUMN: self._features(given)}
        hidden = vlm.model(**given, **features, past_key_values=cache, use_cache=True).last_hidden_state
        mask = given["attention_mask"]
        state = hidden[torch.arange(len(last), device=last.device), last]  # (B, D)
        said: list[Tensor] = []
        while True:
            said.append(vlm.model.adapter.head(state).argmax(-1))  # (B,)
            if len(said) == self.num_patches:
                return torch.stack(said, dim=1)
            mask = F.pad(mask, (0, 1), value=1)
            step = {COLUMN: said[-1][:, None, None].to(vlm.dtype), "attention_mask": mask}
            ids = torch.full_like(mask[:, :1], vlm.config.image_token_id)
            places = last[:, None] + len(said)
            output = vlm.model(ids, position_ids=places, past_key_values=cache, use_cache=True, **step)
            state = output.last_hidden_state[:, -1]

    def _with_actions(self, inputs: Rows, actions: Sequence[int], codes: int) -> tuple[dict[str, Tensor], Tensor]:
        """The model's inputs with each sample's answer and room for so many codes; the answers' last places (B,)."""
        image = self.model.base_vlm.config.image_token_id
        answers = [[*self.codec.token_ids[action], *[image] * codes] for action in actions]
        lengths = torch.tensor([len(answer) for answer in answers], device=inputs["lengths"].device)
        longest = int(lengths.max())
        padded = [answer + [self.processing.pad_id] * (longest - len(answer)) for answer in answers]
        given = self.processing.with_answers(inputs, torch.tensor(padded, device=lengths.device), lengths)
        return given, inputs["lengths"] + lengths - codes - 1

    def _features(self, given: dict[str, Tensor]) -> Tensor:
        """The frames' codes (B k, P, 1), in place of their pixels; k frames a prompt."""
        if COLUMN in given:
            return given.pop(COLUMN)
        return self.model.base_vlm.model.get_vision_features(given.pop("pixel_values"))
