"""What every reading does: from stored inputs to the hidden state and the logits at which the answer is read."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from manako.policies.interface import Rows
from manako.policies.reading.going_on import GoingOn, SaidAll

if TYPE_CHECKING:  # architectures name their reading
    from manako.policies.answers.bins import BinCodec
    from manako.policies.answers.closed_set import ActionCodec
    from manako.policies.architectures.model import Model
    from manako.policies.processing import Processing


Choose = Callable[[int, Tensor], Tensor]


def behind(answer: Sequence[int] | Tensor, lengths: Tensor) -> Tensor:
    """Returns an answer for each of B prompts, (B, K) int64: the same tokens for all, or those that came for each."""
    if torch.is_tensor(answer):
        return answer
    return torch.tensor(tuple(answer), dtype=torch.int64, device=lengths.device).expand(len(lengths), -1)


class Read(NamedTuple):
    """Where the answer is read, of B samples."""

    hidden: Tensor  # (B, D) at the token before the answer
    logits: list[Tensor]  # for each branching node of the codec's token trie (B, children)


class Reading(ABC):
    """Runs a model over rows of `Processing.rows`.

    Args:
        model: the model and what stands where in it.
        codec: the actions' tokens, of which the `branches` and `path_tokens` are read.
        processing: rows to the model's inputs.
    """

    def __init__(self, model: "Model", codec: "ActionCodec | BinCodec", processing: "Processing") -> None:
        self.model, self.codec, self.processing = model, codec, processing

    @property
    def vlm(self) -> Any:
        """The model without PEFT's wrapper; LoRA's layers are inside it."""
        return self.model.base_vlm

    @property
    @abstractmethod
    def name(self) -> str:
        """How it reads, in words, for a run's header."""

    @abstractmethod
    def read(self, inputs: Rows) -> Read:
        """Returns hidden states and logits; gradients flow where they are enabled."""

    @abstractmethod
    def read_hidden(self, inputs: Rows) -> Tensor:
        """Returns the hidden states (B, D) of `read` alone."""

    @abstractmethod
    def go_on(self, inputs: Rows) -> GoingOn:
        """Returns the prompts, behind which tokens can be said one by one."""

    @abstractmethod
    def read_answers(self, inputs: Rows, answers: Tensor, lengths: Tensor, asked: Tensor) -> SaidAll:
        """Returns what the model says of whole answers; gradients flow where they are enabled.

        Args:
            inputs: B rows.
            answers: (B, S) int64, padded on the right with any token.
            lengths: (B,) of the answers.
            asked: (B, S) bool, whose logits are returned.
        """

    @abstractmethod
    def read_vectors(self, inputs: Rows, answers: Tensor) -> Read:
        """Returns hidden states before the answers, and logits of their tokens and the one behind, in one forward.

        Args:
            inputs: B rows.
            answers: (B, K) int64, the tokens of the first K entries, so that the logits are of K + 1 entries: those of
                the codec's `branches`, each behind its own sample's answer instead of the branch's path.
        """

    def say_vector(self, inputs: Rows, choose: Choose) -> Tensor:
        """Has an answer said token by token, one for each of the codec's `branches`.

        Args:
            inputs: B rows.
            choose: entry, its logits (B, children) -> tokens (B,).

        Returns:
            Hidden states (B, D) at the token before the answer.
        """
        tokens = torch.zeros(len(inputs), 0, dtype=torch.int64, device=inputs["lengths"].device)
        hidden = None
        for entry in range(len(self.codec.branches)):
            read = self.read_vectors(inputs, tokens)
            hidden = read.hidden if hidden is None else hidden
            tokens = torch.cat([tokens, choose(entry, read.logits[entry])[:, None]], 1)
        assert hidden is not None, "an action has an entry"
        return hidden

    def accepts(self, prompt: tuple[int, ...]) -> bool:
        """Returns whether it can read a prompt with these tokens."""
        return True

    @contextmanager
    def frozen_weights(self) -> Iterator[None]:
        """Promises that no weight changes inside the block, so what does not depend on the samples may be kept."""
        with torch.no_grad():
            yield


@contextmanager
def what_the_head_sees(vlm: Any) -> Iterator[list[Tensor]]:
    """Collects what the model's LM head is given inside the block: the last hidden states (B, L, D), a forward each.

    Args:
        vlm: the plain model; families put these states into different outputs, or into none.
    """
    seen: list[Tensor] = []
    hook = vlm.get_output_embeddings().register_forward_pre_hook(lambda head, given: seen.append(given[0]))
    try:
        yield seen
    finally:
        hook.remove()
