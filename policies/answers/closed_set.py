"""The action codec: a closed set of action names as tokens of the language model, with exact probabilities.

What the policy emits for each action is decided by a kind of answer (see `answers/__init__.py`); `auto` takes the first
that the tokenizer allows. Every kind is a token trie, of depth 1 where each answer is one token: at each node the
probabilities are renormalised over the node's children, and an answer's log-probability is the sum along its path, so
the A probabilities add up to 1 whatever the names. No answer holds a special token: such a name is refused. Where one
name begins another ("go", "go on"), the end token closes each, as it would in a chat.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from manako.policies.answers import KINDS
from manako.policies.architectures.composed.processing import special_vocabulary
from manako.policies.errors import PolicyError
from manako.policies.source import ActionFormat


@dataclass(frozen=True)
class Branch:
    """A node of the token trie with more than one child.

    Attributes:
        path: tokens from the root to the node (empty at the root).
        children: the tokens that may follow.
        member: for each action the index of its child here, or -1 where its path does not pass.
    """

    path: tuple[int, ...]
    children: tuple[int, ...]
    member: tuple[int, ...]


class ActionCodec:
    """Action names to tokens and back.

    Args:
        tokenizer: the language model's tokenizer.
        names: A different action names, in the order of the env's `Discrete(A)`.
        action_format: `auto`, or a key of `answers.KINDS`.
        go_on: an answer to the tokens by which the tokenizer goes on from the prompt with it; None: there is no prompt,
            an answer stands alone.
        end_id: the token that ends an answer; None: the tokenizer's end token.

    Raises:
        PolicyError: names missing, repeated, or not representable by this tokenizer in this format.

    Attributes:
        format: the format in use.
        kind: the same as a kind of answer.
        answers: for each action the text that the policy emits.
        token_ids: for each action its answer's tokens.
        ends: whether the end token is one of them.
        branches: the trie's branching nodes, root first.
    """

    def __init__(
        self,
        tokenizer: Any,
        names: Sequence[str],
        action_format: ActionFormat = "auto",
        go_on: Callable[[str], Sequence[int]] | None = None,
        end_id: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.names = tuple(names)
        self.ends = False
        self.end_id = tokenizer.eos_token_id if end_id is None else end_id
        self.go_on = go_on or functools.partial(tokenizer.encode, add_special_tokens=False)
        self._check_names()
        if action_format not in ("auto", *KINDS):
            raise PolicyError(f"action_format is {action_format!r}: expected one of auto, {', '.join(KINDS)}.")
        formats = tuple(KINDS) if action_format == "auto" else (action_format,)
        problems = []
        for self.format in formats:
            self.kind = KINDS[self.format].of_tokenizer(tokenizer)
            problem = self.kind.problem(self.names) or self._tokenize()
            if problem is None:
                break
            problems.append(f"{self.format}: {problem}")
        else:
            instead = "" if action_format == "auto" else ", or leave action_format out"
            raise PolicyError(
                f"The tokenizer cannot hold these actions ({'; '.join(problems)}). Give other names{instead}."
            )
        self.branches = _branches(self.token_ids)
        self.path_tokens = tuple(_longest_paths(branch.path for branch in self.branches))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def legend(self) -> str:
        """How the prompt lists the actions."""
        return self.kind.legend(self.names)

    def action_logprobs(self, branch_logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Returns the exact log-probabilities of the A actions.

        Args:
            branch_logits: for each of `branches` the logits (B, children) of its children.

        Returns:
            Log-probabilities (B, A), float32; each row's exponentials add up to 1.
        """
        if len(branch_logits) == 1 and self.branches[0].member == tuple(range(len(self))):
            return branch_logits[0].float().log_softmax(-1)
        total = torch.zeros(len(branch_logits[0]), len(self), device=branch_logits[0].device)  # (B, A)
        for branch, logits in zip(self.branches, branch_logits, strict=True):
            logp = logits.float().log_softmax(-1)  # (B, children)
            member = torch.tensor(branch.member, device=logits.device)  # (A,)
            total = total + torch.where(member >= 0, logp[:, member.clamp_min(0)], 0.0)
        return total

    def _check_names(self) -> None:
        if len(self.names) < 2:
            raise PolicyError(f"A policy needs at least two actions, got {list(self.names)}.")
        blank = [name for name in self.names if not name.strip()]
        if blank:
            raise PolicyError(f"Action names must not be empty, got {list(self.names)}.")
        repeated = sorted({name for name in self.names if self.names.count(name) > 1})
        if repeated:
            raise PolicyError(f"Action names must differ, got {', '.join(map(repr, repeated))} more than once.")
        special = special_vocabulary(self.tokenizer)
        for name in self.names:
            held = [token for token in special if token in name]
            if held:
                raise PolicyError(
                    f"Action name {name!r} holds the special token {held[0]!r}: expected plain words, rename the "
                    "action."
                )

    def _tokenize(self) -> str | None:
        """Fills `answers` and `token_ids`; returns what is wrong with this format, or None."""
        self.answers = self.kind.answers(self.names)
        if len(self.answers) < len(self.names):
            return f"{len(self.names)} actions but only {len(self.answers)} labels"
        special = set(special_vocabulary(self.tokenizer).values())
        self.token_ids = [tuple(self.go_on(answer)) for answer in self.answers]
        for answer, ids in zip(self.answers, self.token_ids, strict=True):
            if not ids or special.intersection(ids):
                return f"{answer!r} becomes a special or unknown token"
            back = self.tokenizer.decode(list(ids))
            if "".join(back.split()) != "".join(answer.split()):
                return f"{answer!r} does not survive the tokenizer (it comes back as {back!r})"
            if self.kind.one_token and len(ids) != 1:
                return f"{answer!r} takes {len(ids)} tokens"
        if len(set(self.token_ids)) < len(self.token_ids):
            return "two names share the same tokens"
        if any(a != b and b[: len(a)] == a for a in self.token_ids for b in self.token_ids):
            if self.end_id is None:
                return "one name begins another and the tokenizer has no end token to tell them apart"
            self.token_ids = [(*ids, self.end_id) for ids in self.token_ids]
            self.ends = True
        return None


def _branches(token_ids: Sequence[tuple[int, ...]]) -> tuple[Branch, ...]:
    """Branching nodes of the trie over `token_ids`, shortest path first."""
    paths = sorted({ids[:depth] for ids in token_ids for depth in range(len(ids))}, key=lambda path: (len(path), path))
    branches = []
    for path in paths:
        following = [ids[len(path)] if ids[: len(path)] == path and len(ids) > len(path) else None for ids in token_ids]
        children = tuple(dict.fromkeys(token for token in following if token is not None))
        if len(children) > 1:
            member = tuple(-1 if token is None else children.index(token) for token in following)
            branches.append(Branch(path, children, member))
    return tuple(branches)


def _longest_paths(paths: Any) -> list[tuple[int, ...]]:
    """The non-empty paths that are no beginning of another: running them covers every node."""
    every = sorted(set(paths), key=len, reverse=True)
    kept: list[tuple[int, ...]] = []
    for path in every:
        if path and not any(other[: len(path)] == path for other in kept):
            kept.append(path)
    return kept
