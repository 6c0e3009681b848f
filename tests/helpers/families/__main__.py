"""Writes a tiny random model folder of each family.

python -m tests.helpers.families FOLDER
"""

import sys
from pathlib import Path

from transformers.utils import logging

from tests.helpers.families import FAMILIES

if len(sys.argv) != 2:
    sys.exit(f"{len(sys.argv) - 1} words came, expected one: python -m tests.helpers.families FOLDER")
logging.disable_progress_bar()
for name, make in FAMILIES.items():
    print(make(Path(sys.argv[1]) / name))
