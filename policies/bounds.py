"""Sizes that no model has, in the JSON files of a model folder: refused before the library builds what they say.

The weights' room is asked of the configuration's model (`room.py`). That model itself has to be buildable first: a
billion layers are a billion Python objects, a frame resized to a million pixels a side is made before any weight is.
"""

import re
from collections.abc import Iterator
from typing import Any

from manako.bounded import shown

# what a setting is called -> the most it may be, and what it counts
LIMITS = (
    (re.compile(r"(^|_)(layers?|depths?|blocks?|experts?|stages?)(_per_\w+|_num)?$"), 4_096, "modules"),
    (re.compile(r"(^|_)(height|width|image_size|crop_size|img_size|input_size)$"), 2**14, "pixels a side"),
    (
        re.compile(r"^(num_image_tokens?|image_seq_len\w*|image_token_len|num_query_tokens?|latent_\w*len)$"),
        2**16,
        "tokens",
    ),
    (re.compile(r"^(shortest_edge|longest_edge|max_pixels|min_pixels)$"), 2**28, "pixels"),
)
EDGES, COUNT_PIXELS = ("shortest_edge", "longest_edge"), ("merge_size", "temporal_patch_size")
LARGEST = 2**63


def size_fault(settings: dict[str, Any]) -> str | None:
    """Returns what is said of a size that no model has, in words; None where there is none.

    Args:
        settings: a JSON file of a model folder.
    """
    for name, value, of_pixels in _numbers(settings, "", any(name in settings for name in COUNT_PIXELS)):
        if abs(value) > LARGEST and name != "model_max_length":
            return f"says {name} is {shown(value)}, which is more than any size"
        for pattern, most, what in LIMITS:
            most = 2**14 if name in EDGES and not of_pixels else most
            if pattern.search(name) and value > most:
                return f"says {name} is {shown(value)}, and no more than {most:,} {what} are read"
    return None


def _numbers(value: Any, name: str, of_pixels: bool) -> Iterator[tuple[str, int, bool]]:
    """Every whole number below a value, with the name of the setting that it stands in."""
    if isinstance(value, dict):
        for key, part in value.items():
            # `size: {"height": 8}` and `crop_size: 8` are both sides
            yield from _numbers(part, str(key), of_pixels or any(name in value for name in COUNT_PIXELS))
    elif isinstance(value, list):
        for part in value:
            yield from _numbers(part, name, of_pixels)
    elif isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        yield name, int(value) if abs(value) < 1e300 else 2**1000, of_pixels
