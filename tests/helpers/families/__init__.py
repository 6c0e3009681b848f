"""Tiny random folders of families of vision-language models, by plain transformers: `FAMILIES[name](folder)`.

python -m tests.helpers.families FOLDER     # writes one folder a family
"""

from collections.abc import Callable
from pathlib import Path

from tests.helpers.families.more import MORE
from tests.helpers.families.queries_and_cross_attention import QUERIES_AND_CROSS_ATTENTION
from tests.helpers.families.token_stream import TOKEN_STREAM

FAMILIES: dict[str, Callable[[Path], Path]] = {**TOKEN_STREAM, **QUERIES_AND_CROSS_ATTENTION, **MORE}
