"""Small folders of our own architectures, as a preset makes them: `write(preset, folder)`."""

from pathlib import Path

import torch

from manako.policies import PolicySource, load_policy
from manako.policies.architectures.presets import PRESETS
from tests.helpers.foreign_models import NAMES

FRAME = (64, 64, 3)
MASKED = ("uniter", "vilbert")  # they say one token, and have a contract of their own: test_masked_rows.py
OF_LIBRARY = ("blip2", "instructblip", "kosmos2", "llava")  # names that families of the library have as well
OWN_ROWS = tuple(  # smollm2 is tiny with larger parts
    f"preset_{name}" if name in OF_LIBRARY else name for name in PRESETS if name not in (*MASKED, "smollm2")
)


def write(preset: str, folder: Path) -> Path:
    """Writes the preset's random model and processor, gates open, since behind closed ones no image counts."""
    policy = load_policy(PolicySource(preset.removeprefix("preset_")), NAMES, FRAME)
    with torch.no_grad():
        for name, parameter in policy.base_vlm.named_parameters():
            if name.split(".")[-1] in ("gate", "feed_forward_gate"):
                parameter.fill_(1.0)
    policy.base_vlm.save_pretrained(folder)
    policy.processor.save_pretrained(folder)
    return folder
