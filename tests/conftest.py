"""Settings of every test run: no network, one thread, no window.

They stand here and not in each test because they only work before the libraries are imported. One thread because on a
busy machine the same test takes ten times longer with more.
"""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="manako-tests-")  # which modules were named
os.environ["RAY_AUTH_MODE"] = "disabled"  # Ray reads it once a process, and several clusters are started here

import gc

import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What the imports made is looked at by no later garbage collection; accelerate makes one after every training."""
    gc.collect()
    gc.freeze()
