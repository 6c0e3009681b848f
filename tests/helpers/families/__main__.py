"""Makes a tiny random model folder of each family.

python -m tests.helpers.families DIR
"""

import sys
from pathlib import Path

from transformers.utils import logging

from tests.helpers.families import make_families

if len(sys.argv) != 2:
    sys.exit(f"{len(sys.argv) - 1} words came, expected one: python -m tests.helpers.families DIR")
logging.disable_progress_bar()
for made in make_families(Path(sys.argv[1])):
    print(made)
