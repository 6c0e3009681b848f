"""The weights that learn, as they travel from the learner to the workers, and a digest of the others."""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from manako.agent.errors import TrainingError

if TYPE_CHECKING:
    import torch

    from manako.policies.interface import Policy


def trainable_tensors(policy: "Policy") -> dict[str, "torch.Tensor"]:
    """Returns the parameters that learn, by name."""
    return {name: parameter.detach() for name, parameter in policy.named_parameters() if parameter.requires_grad}


def as_arrays(tensors: Mapping[str, "torch.Tensor"]) -> dict[str, np.ndarray]:
    """Returns tensors as NumPy arrays; bfloat16, which numpy does not know, as its bits."""
    import torch

    return {
        name: (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
        for name, tensor in tensors.items()
    }


def load_trainable(policy: "Policy", arrays: Mapping[str, np.ndarray]) -> None:
    """Puts the broadcast weights in place.

    Raises:
        TrainingError: they are not exactly this policy's trainable ones.
    """
    import torch

    expected = trainable_tensors(policy)
    if expected.keys() != arrays.keys():
        names = sorted(expected.keys() ^ arrays.keys())
        raise TrainingError(
            f"The weights that came are not those that learn here ({len(names)} differ, such as {names[0]!r}): "
            "expected the learner's policy and settings on every worker."
        )
    for name, tensor in expected.items():
        array = torch.from_numpy(np.array(arrays[name]))  # a copy: the shared memory is read-only
        tensor.copy_(array.view(torch.bfloat16) if tensor.dtype == torch.bfloat16 else array)


def frozen_digest(policy: "Policy") -> str:
    """Returns a digest of the frozen weights, which learner and workers must share."""
    frozen = {name: tensor for name, tensor in policy.named_parameters() if not tensor.requires_grad}
    digest = hashlib.sha256()
    for name, array in sorted(as_arrays({name: tensor.detach() for name, tensor in frozen.items()}).items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
