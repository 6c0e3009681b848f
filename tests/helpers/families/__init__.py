"""Tiny random model folders of families of vision-language models, by name.

python -m tests.helpers.families DIR
"""

from collections.abc import Callable
from pathlib import Path

from tests.helpers.families.more import MORE
from tests.helpers.families.queries_and_cross_attention import QUERIES_AND_CROSS_ATTENTION
from tests.helpers.families.token_stream import TOKEN_STREAM

FAMILIES: dict[str, Callable[[Path], Path]] = {**TOKEN_STREAM, **QUERIES_AND_CROSS_ATTENTION, **MORE}


def make_families(folder: Path) -> list[Path]:
    """A folder of each family inside `folder`, in the table's order."""
    return [make(folder / name) for name, make in FAMILIES.items()]
