"""Language models: token embeddings (B, L, D) -> hidden states and logits (B, L, V).

To add one: a file with a `build` and a line in `LANGUAGE_MODELS`; `--language_model NAME` then selects it. Whatever
`AutoModelForCausalLM` loads needs no file: its folder or Hub id is its name.
"""

from manako.policies.language_models import pretrained, smollm2, tiny_llama
from manako.policies.language_models.language_model import BuildLanguageModel, LanguageModel

__all__ = ["LANGUAGE_MODELS", "LanguageModel", "build_language_model"]

LANGUAGE_MODELS: dict[str, BuildLanguageModel] = {"tiny-llama": tiny_llama.build, "smollm2": smollm2.build}


def build_language_model(name: str) -> LanguageModel:
    """Builds a language model; a random one draws its weights from torch's global generator.

    Args:
        name: a key of `LANGUAGE_MODELS`, a folder or a Hub id.

    Returns:
        The model, its tokenizer and its chat template.

    Raises:
        PolicyError: no language model of that name.
    """
    if name in LANGUAGE_MODELS:
        return LANGUAGE_MODELS[name]()
    return pretrained.load(name, LANGUAGE_MODELS)
