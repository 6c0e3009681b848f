"""The VLM policy of action vectors: `MultiDiscrete`, `MultiBinary` and `Box`, an entry a token (`answers/bins.py`).

    act                 entry 0 after the prompt, entry 1 after that, ...     d tokens on the prompt's cache
    evaluate_actions    all of them at once, each after those before it       one forward

S is d: log-probabilities and entropies (B, d) are of one entry each, given those before, and are exact. Together they
are one action: `Evaluated.is_joint` gives it one ratio.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from manako.policies.answers.bins import BinCodec
from manako.policies.errors import PolicyError
from manako.policies.interface import Acted, Draws, Evaluated, Rows, entropy, sample_categorical
from manako.policies.reading import Reading
from manako.policies.vlm_policy import VLMPolicy


class BinsPolicy(VLMPolicy):
    """A vision-language model that acts by saying a bin for each entry of an action vector.

    Its rows of actions are `bins` (B, d) int64. Arguments and errors are those of `VLMPolicy`.
    """

    needs = ()
    codec: BinCodec  # type: ignore[assignment]  # what both have is what readings read

    def distribution(self, inputs: Rows, reading: Reading | None = None) -> tuple[Tensor, Tensor]:
        """Raises PolicyError: the vectors are too many to list."""
        raise PolicyError(
            "Actions that are vectors have no list of probabilities: expected an env of Discrete actions."
        )

    @torch.no_grad()
    def act(self, inputs: Rows, draws: Draws, greedy: bool = False) -> Acted:
        """Returns B vectors with S = d: sampled, or the likeliest of each entry given those before."""
        bins: list[Tensor] = []
        taken: list[Tensor] = []

        def choose(entry: int, logits: Tensor) -> Tensor:
            logprobs = logits.float().log_softmax(-1).cpu()  # (B, bins)
            index = logprobs.argmax(-1) if greedy else sample_categorical(logprobs, draws.next())  # (B,)
            bins.append(index)
            taken.append(logprobs.gather(1, index[:, None])[:, 0])
            return self.codec.tokens[entry][index].to(logits.device)

        hidden = self.reading.say_vector(inputs.to(self.device), choose)
        chosen, logprobs = torch.stack(bins, 1), torch.stack(taken, 1)  # (B, d)
        return Acted(
            Rows({"bins": chosen}),
            self.codec.to_env(chosen.numpy()),
            logprobs,
            torch.ones_like(chosen, dtype=torch.bool),
            self.value_head(hidden).cpu(),
        )

    def evaluate_actions(self, inputs: Rows, actions: Rows) -> Evaluated:
        """Returns log-probabilities and entropies (B, d) of the entries, and values (B,)."""
        bins = actions["bins"]
        hidden, logits = self.reading.read_vectors(inputs, self.codec.said(bins[:, :-1]))
        logprobs = [of_entry.float().log_softmax(-1) for of_entry in logits]  # d times (B, bins)
        taken = [of_entry.gather(1, bins[:, [entry]])[:, 0] for entry, of_entry in enumerate(logprobs)]
        return Evaluated(
            logprobs=torch.stack(taken, 1),
            entropy=torch.stack([entropy(of_entry) for of_entry in logprobs], 1),
            values=self.value_head(hidden),
            is_joint=True,
        )

    def own_losses(self, inputs: Rows, actions: Rows) -> Mapping[str, Tensor]:  # type: ignore[override]
        """Returns none: no frames are predicted of vectors."""
        return {}

    def actions_from_env(self, to_env: np.ndarray, thoughts: Sequence[str] | None = None) -> Rows:
        """Returns the rows of vectors (B, d), the nearest bin for each entry."""
        return Rows({"bins": torch.from_numpy(self.codec.from_env(np.asarray(to_env)))})

    def answers(self, actions: Rows) -> list[str]:
        """Returns what the policy says for each vector."""
        return [self.codec.text(bins) for bins in actions["bins"].tolist()]

    def answer_tokens(self, actions: Rows) -> list[list[int]]:
        """Returns the same as token ids."""
        return self.codec.said(actions["bins"]).tolist()

    def _make_codec(self, end_id: int | None) -> BinCodec:  # type: ignore[override]
        spec = self.spec
        if spec.action_format != "auto":
            raise PolicyError(
                f"action_format is {spec.action_format!r}, and the actions are vectors of {len(spec.action_names)}, "
                "which are said as bins: leave action_format out."
            )
        tokenizer, names = self.processor.tokenizer, spec.action_names
        return BinCodec(tokenizer, spec.action_space, names, spec.bins, spec.bin_spacing, self.prompts.go_on)

    def _check_answers(self) -> None:
        if self.parts.one_token_answers and len(self.codec) > 1:
            raise PolicyError(
                f"{type(self.base_vlm).__name__} answers with one token at a mask, but an action has {len(self.codec)} "
                "entries of a token each: expected a causal model such as the preset tiny."
            )
