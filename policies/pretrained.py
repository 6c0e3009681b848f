"""What every `from_pretrained` of this package needs: no noise, complete weights, errors of one line."""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

from safetensors import SafetensorError
from transformers.utils import logging

from manako.policies.errors import PolicyError

LOADING_ERRORS = (OSError, ValueError, ImportError, KeyError, SafetensorError)  # what a bad folder or name raises


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Silences warnings and progress bars of transformers and PEFT; what matters in them the caller checks."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def check_complete(name: str, loading: dict[str, Any]) -> None:
    """Raises PolicyError where `from_pretrained` left weights random; a pooler may be, since nothing here uses it.

    Args:
        name: folder or Hub id.
        loading: what `from_pretrained` returns beside the model, with `output_loading_info` and
            `ignore_mismatched_sizes` set.
    """
    lacking = sorted(key for key in loading["missing_keys"] if "pooler" not in key)
    lacking += sorted(str(key[0] if isinstance(key, tuple) else key) for key in loading["mismatched_keys"])
    if lacking:
        raise PolicyError(
            f"{name!r} lacks {len(lacking)} of the model's weights, such as {lacking[0]}: expected all of them; the "
            "folder is incomplete, or of another kind of model than its config.json says."
        )
