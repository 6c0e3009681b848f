"""Any encoder that `AutoModel` loads; of a two-tower model (CLIP, SigLIP) or a whole VLM its vision tower."""

from collections.abc import Iterable

import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, PreTrainedModel

from manako.policies.encoders.encoder import Encoder
from manako.policies.errors import PolicyError
from manako.policies.pretrained import check_complete, check_found, quietly, refusal
from manako.policies.room import check_room

VISION_TOWERS = ("vision_model", "vision_tower", "visual")  # what models call it that have more parts


def load(name: str, others: Iterable[str] = ()) -> Encoder:
    """Loads an encoder and its image processor.

    Args:
        name: a folder or a Hub id.
        others: what else could have been named, for the error's sentence.

    Raises:
        PolicyError: no vision encoder there, weights missing, or a tower that cannot be taken alone.
    """
    places = f"expected {', '.join([*others, 'a folder'])} or a Hub id"
    check_found(name, "vision encoder", places)
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with quietly():
            check_room(name, AutoConfig.from_pretrained(name, trust_remote_code=False), torch.float32, AutoModel)
            model, loading = AutoModel.from_pretrained(name, trust_remote_code=False, **options)
            processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # whatever a model's code says to files that do not fit
        sentence = f"No vision encoder at {name!r}: {places} ({{error}})."
        raise refusal(f"The vision encoder of {name!r}", error, sentence) from error
    if "vision_config" in model.config.sub_configs:
        parts = {part: getattr(model, part, None) for part in VISION_TOWERS}
        found = next((part for part in parts if isinstance(parts[part], PreTrainedModel)), None)
        if found is None:
            raise PolicyError(
                f"{name!r} holds a {type(model).__name__}, whose vision encoder is not a model of its own: expected a "
                "vision encoder, a two-tower model such as CLIP or SigLIP, or a VLM such as a policy of ours."
            )
        # weights of the other parts may lack, as the language model's in a BLIP-2 that only compares
        loading = {kind: [key for key in keys if _is_of(key, found)] for kind, keys in loading.items()}
        model = parts[found]
    check_complete(name, loading)
    return Encoder(model, processor)


def _is_of(key: str | tuple[str, ...], part: str) -> bool:
    """Whether what the library reports of a weight, its name or name and shapes, is of a part."""
    return (key if isinstance(key, str) else key[0]).startswith(f"{part}.")
