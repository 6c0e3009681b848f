"""Is a folder as it was written? Asked of its manifest before anything in it is read."""

import os
from pathlib import Path

from manako.manifest import fault, is_manifest, seal_command
from manako.policies.default_trainable import POLICY_FILE
from manako.policies.errors import PolicyError

NEEDED = (  # of a policy; `a|b` is one of the two
    "config.json|adapter_config.json",
    "model.safetensors|model.safetensors.index.json|adapter_model.safetensors",
    "value_head.safetensors",
    POLICY_FILE,
)


def check_folder(folder: Path) -> None:
    """Compares a folder of `save_policy` with its manifest; one of other programs has none, and passes.

    Raises:
        PolicyError: something was changed, is missing, or was added.
    """
    if not (os.path.lexists(folder / POLICY_FILE) or is_manifest(folder)):
        return
    found = fault(folder, NEEDED)
    if found:
        raise PolicyError(
            f"The policy in {folder} is damaged: {found}; use another copy of it (if it was changed on purpose, "
            f"`{seal_command(folder)}` shows what differs and writes the manifest anew)."
        )
