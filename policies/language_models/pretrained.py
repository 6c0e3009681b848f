"""Any language model that `AutoModelForCausalLM` loads; its chat template learns to take image parts."""

from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from manako.policies.architectures.composed.processing import vlm_chat_template
from manako.policies.language_models.language_model import LanguageModel
from manako.policies.pretrained import check_complete, check_found, quietly, refusal
from manako.policies.room import check_room


def load(name: str, others: Iterable[str] = (), folder: Path | None = None) -> LanguageModel:
    """Loads a language model and its tokenizer.

    Args:
        name: a folder or a Hub id, as errors call it.
        others: what else could have been named, for the error's sentence.
        folder: where it lies, where that is not its name.

    Raises:
        PolicyError: no language model there, or weights missing.
    """
    place = str(folder or name)
    places = f"expected {', '.join([*others, 'a folder'])} or a Hub id"
    check_found(place, "language model", places)
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        with quietly():
            check_room(
                name, AutoConfig.from_pretrained(place, trust_remote_code=False), torch.float32, AutoModelForCausalLM
            )
            model, loading = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=False, **options)
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # whatever a model's code says to files that do not fit
        sentence = f"No language model at {name!r}: {places} ({{error}})."
        raise refusal(f"The language model of {name!r}", error, sentence) from error
    check_complete(name, loading)
    return LanguageModel(model, tokenizer, vlm_chat_template(tokenizer.chat_template))
