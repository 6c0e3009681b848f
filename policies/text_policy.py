"""The policy that writes: it thinks, then names an action, token by token, and what it wrote is what is learned from.

    prompt ─ keys and values, once ─► sample, say, sample, say ... until the end token or the longest length
    tokens ─ decode ─► template ─► thought, action ─► outcome: legal, unparsed, not allowed, cut
    update: all tokens of all answers in one forward, read where each was sampled

An answer's tokens are kept as they were sampled and never tokenized again. Nothing special can be sampled but the end
token. The probabilities are those of the distribution that was sampled from: without the special tokens, with the
temperature, behind the cue of a constrained answer over what can go on to an allowed action.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from manako.policies.answers.choice import LABELS
from manako.policies.answers.closed_set import ActionCodec
from manako.policies.answers.illegal import CUT, LEGAL, NOT_ALLOWED, SKIP, UNPARSED, stands_in
from manako.policies.answers.template import action_named
from manako.policies.answers.text import TextAnswers
from manako.policies.architectures.composed.processing import special_vocabulary
from manako.policies.architectures.model import Model
from manako.policies.errors import PolicyError
from manako.policies.interface import ACTION_MASK, Acted, Draws, Evaluated, PolicySpec, Rows, sample_categorical
from manako.policies.vlm_policy import VLMPolicy
from manako.spaces import TextCodes, is_skip, text_in_words

Before = tuple[list[int], Sequence[bool] | None]  # an answer's tokens so far, and which actions are allowed
TOKENS, FILLER = "tokens", -1  # of an answer, in the rows of actions
HALF = "\ufffd"  # what a part of a character is decoded to
MOST_OF_CHARACTER = 8  # tokens of one character
KEPT_SHARE = 0.5  # of the answers that are still written; below it the others are left out of the forward


class Read(NamedTuple):
    """What an answer says."""

    outcome: str
    action: int  # SKIP where it names none
    thought: str
    text: str
    written: str | None = None  # the action, where it is a text


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn where nothing is learned from them.

    Args:
        temperature: logits are divided by it.
        top_p: the likeliest tokens that make up this probability can be drawn (nucleus sampling, arXiv:1904.09751).
    """

    temperature: float = 1.0
    top_p: float = 1.0


class TextPolicy(VLMPolicy):
    """A vision-language model that acts by an answer in text.

    Args:
        model: see `VLMPolicy`.
        spec: with `text`.
        check: see `VLMPolicy`.

    Raises:
        PolicyError: see `VLMPolicy`; a template that the tokenizer cannot hold; a model that writes no text.

    Attributes:
        template: of its answers.
        sampling: how answers are drawn; None: as they are learned from.
    """

    def __init__(self, model: Model, spec: PolicySpec, check: bool = True) -> None:
        assert spec.text is not None, "put_policy_around gives it"
        self.text: TextAnswers = spec.text
        self.texts = spec.vectors if isinstance(spec.vectors, TextCodes) else None
        self.template = self.text.check(spec.action_names, self.texts)
        if model.one_token_answers:
            raise PolicyError(
                f"{type(model.base_vlm).__name__} answers with one token at a mask, so it writes no text: expected "
                "another action_format, or a causal model such as the preset tiny."
            )
        held = [token for token in special_vocabulary(model.processor.tokenizer) if token in self.template.text]
        if held:
            raise PolicyError(
                f"The answer template {self.template.text!r} holds the special token {held[0]!r}, which no answer can: "
                "expected plain text."
            )
        super().__init__(model, spec, check)
        self.illegal_penalty = self.text.illegal_penalty
        self.sampling: Sampling | None = None
        tokenizer = self.processor.tokenizer
        if self.codec.end_id is None:
            raise PolicyError(
                "The tokenizer has no end token, so an answer in text would never end: use another model."
            )
        self.end_id = int(self.codec.end_id)
        size = self.base_vlm.get_output_embeddings().weight.shape[0]
        banned = torch.zeros(size, dtype=torch.bool)  # (V,)
        banned[len(tokenizer) :] = True  # rows of the head that no token has
        special = {*special_vocabulary(tokenizer).values(), *self.prompts.mark_ids} - {self.end_id}
        banned[[token for token in special if token < size]] = True
        if model.placeholder_id is not None and model.placeholder_id < size:
            banned[model.placeholder_id] = True
        self.register_buffer("_banned", banned, persistent=False)
        self._banned: Tensor
        self._tries: dict[tuple[tuple[str, ...], tuple[int, ...]], list[int]] = {}
        self._parts: dict[str, tuple[int, ...]] = {}  # tokens of the characters that are several
        self._spelled: dict[str, list[int]] | None = None
        self._computed = self._needed = 0  # tokens, in updates

    def _make_codec(self, end_id: int | None) -> ActionCodec:
        if self.texts is None:
            return super()._make_codec(end_id)
        # there is no list to choose from: two labels stand where the reading is compared with the library's
        return ActionCodec(self.processor.tokenizer, LABELS[:2], "auto", self.prompts.go_on, end_id)

    # ---- what VLMPolicy asks -------------------------------------------------------------------------------------

    @property
    def format(self) -> str:
        """How actions are said."""
        return "text"

    @property
    def ends(self) -> bool:
        """The end token closes every answer."""
        return True

    @property
    def longest_answer(self) -> int:
        """In tokens."""
        return self.text.longest

    def legend(self) -> str:
        """How the prompt lists the actions, and what form it asks for."""
        actions = ", ".join(self.spec.action_names) if self.texts is None else text_in_words(self.texts)
        return f"{actions}; answer in the form {self.template.form}"

    def describe(self) -> list[tuple[str, str]]:
        """Returns the lines of the header."""
        text, lines = self.text, dict(super().describe())
        illegal = "not stepped" if text.illegal_action is None else f"stepped by {text.illegal_action!r}"
        ratio = "a ratio a token" if text.thought_coef is None else f"one ratio, thought x {text.thought_coef:g}"
        lines["answers"] = (
            f"in text as {self.template.text!r}, {text.longest} tokens at most{', constrained' * text.constrained}; "
            f"{ratio}; without an action the environment is {illegal}, {text.illegal_penalty:g} is paid"
        )
        return list(lines.items())

    # ---- from a frame to an action -------------------------------------------------------------------------------

    @torch.no_grad()
    def act(self, inputs: Rows, draws: Draws, greedy: bool = False) -> Acted:
        """Returns B answers of S tokens: sampled, or the likeliest token each time."""
        inputs = inputs.to(self.device)
        sampling = self.sampling or Sampling(self.text.temperature)
        allowed = inputs[ACTION_MASK].tolist() if ACTION_MASK in inputs else None  # (B, A)
        count = len(inputs)
        tokens = torch.full((count, self.text.longest), FILLER)  # (B, S)
        logprobs = torch.zeros(count, self.text.longest)
        token_values = torch.zeros(count, self.text.longest)
        going = self.reading.go_on(inputs)
        values = self.value_head(going.now.hidden).cpu()
        live = torch.arange(count)  # rows that are still written
        inside = torch.arange(count)  # their places in the forward
        for step in range(self.text.longest):
            token_values[live, step] = self.value_head(going.now.hidden[inside]).cpu()
            logits = going.now.logits[inside.to(self.device)].float()
            before = [(tokens[row, :step].tolist(), allowed and allowed[row]) for row in live.tolist()]
            logp = self._logprobs(logits, before, sampling)
            drawn = logp.argmax(-1) if greedy else sample_categorical(logp, draws.select(live.tolist()).next())
            drawn = drawn.cpu()
            tokens[live, step] = drawn
            logprobs[live, step] = logp.cpu().gather(1, drawn[:, None])[:, 0]
            goes_on = drawn != self.end_id
            said = torch.zeros(len(going.now.hidden), dtype=torch.int64)  # what ended says anything; nobody reads it
            said[inside] = drawn
            live, inside = live[goes_on], inside[goes_on]
            if not len(live) or step + 1 == self.text.longest:
                break
            going.say(said.to(self.device))
            if len(live) < KEPT_SHARE * len(going.now.hidden):
                going.keep(inside.to(self.device))
                inside = torch.arange(len(live))
        longest = int((tokens != FILLER).sum(-1).max())
        tokens, logprobs, token_values = tokens[:, :longest], logprobs[:, :longest], token_values[:, :longest]
        read = [self.read(row, allowed and allowed[at]) for at, row in enumerate(self._trimmed(tokens))]
        mask = tokens != FILLER
        if self.text.thought_coef is not None:
            logprobs, mask = self._weighted(logprobs, mask, self._action_tokens(tokens)), mask[:, :1]
        return Acted(
            Rows({TOKENS: tokens}, {TOKENS: FILLER}),
            np.array([self._to_env(answer) for answer in read], np.int64),  # (B,), or texts (B, d)
            logprobs,
            mask,
            values,
            [answer.outcome for answer in read],
            token_values,
        )

    def evaluate_actions(self, inputs: Rows, actions: Rows) -> Evaluated:
        """Returns log-probabilities and entropy (B, S) of the tokens, and values (B,), in one forward.

        Where prompts and answers differ much in length, those of like length have a forward each.
        """
        tokens = actions[TOKENS]  # (B, S)
        lengths = inputs["lengths"] + (tokens != FILLER).sum(-1)  # (B,)
        groups = groups_by_length(lengths.cpu())
        self._computed += sum(len(rows) * int(lengths[rows].max()) for rows in groups)
        self._needed += int(lengths.sum())
        if len(groups) == 1:
            return self._evaluate(inputs, tokens)
        parts = [self._evaluate(inputs.select(rows), tokens[rows]) for rows in groups]
        back = torch.argsort(torch.cat(groups)).to(tokens.device)
        return Evaluated(
            torch.cat([part.logprobs for part in parts])[back],
            torch.cat([part.entropy for part in parts])[back],
            torch.cat([part.values for part in parts])[back],
            token_values=torch.cat([part.token_values for part in parts if part.token_values is not None])[back],
        )

    def _evaluate(self, inputs: Rows, tokens: Tensor) -> Evaluated:
        lengths = (tokens != FILLER).sum(-1)
        longest, width = int(lengths.max()), tokens.shape[1]
        mask = tokens[:, :longest] != FILLER
        said = self.reading.read_answers(inputs, tokens[:, :longest].clamp_min(0), lengths, mask)
        sampling = Sampling(self.text.temperature)  # what rollouts are played with
        before: list[Before] = []
        if self.text.constrained:
            allowed = inputs[ACTION_MASK].tolist() if ACTION_MASK in inputs else None
            rows = enumerate(self._trimmed(tokens.cpu()))
            before = [(row[:at], allowed and allowed[place]) for place, row in rows for at in range(len(row))]
        logp = self._logprobs(said.logits.float(), before, sampling)  # (M, V)
        taken = logp.gather(1, tokens[:, :longest][mask][:, None])[:, 0]
        spread = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)  # (M,)

        def filled(of_tokens: Tensor) -> Tensor:
            return of_tokens.new_zeros(len(tokens), width).index_put(mask.nonzero(as_tuple=True), of_tokens)

        logprobs, entropy = filled(taken), filled(spread)
        values, token_values = self.value_head(said.hidden[:, 0]), filled(self.value_head(said.hidden[mask]))
        if self.text.thought_coef is not None:
            wide = tokens != FILLER
            entropy = entropy.sum(-1, keepdim=True) / lengths[:, None]
            logprobs = self._weighted(logprobs, wide, self._action_tokens(tokens))
        return Evaluated(logprobs, entropy, values, token_values=token_values)

    def padding_share(self) -> float | None:
        """Returns which share of the tokens that were computed in updates was padding, since it was last asked."""
        share = 1 - self._needed / self._computed if self._computed else None
        self._computed = self._needed = 0
        return share

    def own_losses(self, inputs: Rows, actions: Rows) -> dict[str, Tensor]:
        """Returns none: an answer in text says no next frame."""
        return {}

    # ---- what was said -------------------------------------------------------------------------------------------

    def read(self, tokens: Sequence[int], allowed: Sequence[bool] | None = None) -> Read:
        """Returns what an answer says.

        Args:
            tokens: without filler, with its end token.
            allowed: (A,) which actions are; all by default.
        """
        ended = bool(tokens) and tokens[-1] == self.end_id
        text = self.processor.tokenizer.decode(list(tokens[:-1] if ended else tokens))
        parsed = self.template.parse(text, exact=self.texts is not None)
        if not ended:
            return Read(CUT, SKIP, "" if parsed is None else parsed.thought, text)
        if parsed is None:
            return Read(UNPARSED, SKIP, "", text)
        if self.texts is not None:
            fits = self.texts.text.contains(parsed.action)
            return Read(LEGAL if fits else NOT_ALLOWED, SKIP, parsed.thought, text, parsed.action if fits else None)
        action = action_named(parsed.action, self.spec.action_names)
        if action is None:
            return Read(UNPARSED, SKIP, parsed.thought, text)
        if allowed is not None and not allowed[action]:
            return Read(NOT_ALLOWED, SKIP, parsed.thought, text)
        return Read(LEGAL, action, parsed.thought, text)

    def reads(self, actions: Rows) -> list[Read]:
        """Returns what each of B answers says."""
        return [self.read(row) for row in self._trimmed(actions[TOKENS].cpu())]

    def writes(self, actions: Rows) -> bool:
        """Returns whether these are answers that it wrote."""
        return TOKENS in actions

    def thoughts(self, actions: Rows) -> list[str] | None:
        """Returns what was thought before each action; None where the template has no thought."""
        return [answer.thought for answer in self.reads(actions)] if self.template.has_thought else None

    def answers(self, actions: Rows) -> list[str]:
        """Returns the text of each answer."""
        return [answer.text for answer in self.reads(actions)]

    def answer_tokens(self, actions: Rows) -> list[list[int]]:
        """Returns the tokens of each answer."""
        return self._trimmed(actions[TOKENS].cpu())

    def answer_for(self, action: Any, thought: str = "") -> str:
        """Returns the answer that names an action, or the code points (d,) of one, with a thought before it."""
        named = self.spec.action_names[action] if self.texts is None else self.texts.decode(action)
        return self.template.write(named, thought)

    def actions_from_env(self, to_env: np.ndarray, thoughts: Sequence[str] | None = None) -> Rows:
        """Returns the answers that name actions (B,) int64, or texts (B, d), as the tokenizer writes them.

        Args:
            to_env: actions.
            thoughts: one before each; none by default.

        Raises:
            PolicyError: an answer longer than the longest, or none, where the environment was not stepped.
        """
        rows = []
        for place, action in enumerate(np.asarray(to_env).tolist()):
            if is_skip(self.spec.action_space, action):
                raise PolicyError("An answer that named no action has no other words: expected its own tokens.")
            answer = self.answer_for(action, "" if thoughts is None else thoughts[place])
            rows.append([*self._spell(answer), self.end_id])
        longest = max(map(len, rows))
        if longest > self.text.longest:
            raise PolicyError(
                f"An answer takes {longest} tokens, and at most {self.text.longest} are written: expected "
                f"answer_tokens of {longest} or more."
            )
        tokens = torch.tensor([row + [FILLER] * (longest - len(row)) for row in rows])
        return Rows({TOKENS: tokens}, {TOKENS: FILLER})

    # ---- inside --------------------------------------------------------------------------------------------------

    def _spell(self, answer: str) -> tuple[int, ...]:
        return self.prompts.go_on_once(answer)

    def _to_env(self, answer: Read) -> Any:
        if self.texts is not None:
            stated = self.text.illegal_action if answer.written is None else answer.written
            return self.texts.skipped if stated is None else self.texts.encode(stated)
        if answer.outcome == LEGAL:
            return answer.action
        return stands_in(self.spec.action_names, self.text.illegal_action)

    def _trimmed(self, tokens: Tensor) -> list[list[int]]:
        return [[token for token in row if token != FILLER] for row in tokens.tolist()]

    def _logprobs(self, logits: Tensor, before: "Sequence[Before]", sampling: Sampling) -> Tensor:
        """Log-probabilities (M, V) of what is sampled from.

        Args:
            logits: (M, V) of the model, float32.
            before: for a constrained answer its tokens so far, and which actions are allowed.
            sampling: temperature and nucleus.
        """
        logits = logits.masked_fill(self._banned, -torch.inf)
        if self.text.constrained:
            allowed = [self._allowed(*each) for each in before]
            rows = [row for row, tokens in enumerate(allowed) if tokens is not None]
            closed = torch.ones(len(rows), logits.shape[1], dtype=torch.bool)
            for row, place in enumerate(rows):
                closed[row, allowed[place]] = False
            at = torch.tensor(rows, dtype=torch.int64, device=logits.device)
            logits = logits.index_put((at,), logits[at].masked_fill(closed.to(logits.device), -torch.inf))
        logp = (logits / sampling.temperature).log_softmax(-1)
        return logp if sampling.top_p >= 1 else nucleus(logp, sampling.top_p)

    def _allowed(self, before: list[int], actions: Sequence[bool] | None) -> list[int] | None:
        """What may follow in a constrained answer; None: anything, since there is no cue yet, or it went astray."""
        text, pending = self._whole_characters(before)
        start = self.template.action_part(text)
        if start is None:
            return None
        written = text[start:]
        if self.texts is not None:
            return self._continues(written, pending) or None
        endings = tuple(
            rest[len(written) :]
            for place, name in enumerate(self.spec.action_names)
            for rest in (name + self.template.after,)
            if actions is None or actions[place]
            if rest.startswith(written)
        )
        if not endings:
            return None
        if (endings, pending) not in self._tries:
            self._tries[endings, pending] = self._first_tokens(endings, pending)
        return self._tries[endings, pending] or None

    def _whole_characters(self, tokens: list[int]) -> tuple[str, tuple[int, ...]]:
        """The text up to the last whole character, and the tokens by which the next one has begun."""
        decode = self.processor.tokenizer.decode
        for whole in range(len(tokens), max(-1, len(tokens) - MOST_OF_CHARACTER), -1):
            text = decode(tokens[:whole])
            if not text.endswith(HALF):
                return text, tuple(tokens[whole:])
        return decode(tokens), ()

    def _continues(self, written: str, pending: tuple[int, ...]) -> list[int]:
        """The tokens by which a text that has begun goes on within the space; [] where it has left it."""
        assert self.texts is not None, "there is a list of actions"
        space, after = self.texts.text, self.template.after
        characters = space.character_set
        known = next((at for at, character in enumerate(written) if character not in characters), len(written))
        if known > space.max_length or not after.startswith(written[known:]):
            return []
        ends = self._first_tokens((after[len(written) - known :],), pending) if known >= space.min_length else []
        if known < len(written):  # what stands behind the text has begun
            return ends
        room = int(space.max_length) - known
        key = ((str(room),), pending)
        if key not in self._tries:
            found = self._next_parts(space.character_list, pending) if room else set()
            for said, ids in () if pending else self._spelling().items():
                if len(said) <= room and characters.issuperset(said):
                    found.update(ids)
            self._tries[key] = sorted(found)
        return sorted({*self._tries[key], *ends})

    def _first_tokens(self, endings: tuple[str, ...], pending: tuple[int, ...] = ()) -> list[int]:
        """The tokens by which a text can go on to one of these; the end token where nothing is left.

        Args:
            endings: what is to come.
            pending: tokens by which its first character has begun.
        """
        found = self._next_parts([ending[0] for ending in endings if ending], pending)
        if not pending:
            spelled = self._spelling()
            found |= {self.end_id} if "" in endings else set()
            for ending in endings:
                for stop in range(1, len(ending) + 1):
                    found.update(spelled.get(ending[:stop], ()))
        return sorted(found)

    def _next_parts(self, characters: Sequence[str], pending: tuple[int, ...]) -> set[int]:
        """The tokens by which one of these characters goes on, of those that are several tokens."""
        found, done = set(), len(pending)
        for character in characters:
            if character not in self._parts:
                parts = () if character in self._spelling() else self._written_alone(character)
                self._parts[character] = parts
            parts = self._parts[character]
            if len(parts) > done and parts[:done] == pending:
                found.add(parts[done])
        return found

    def _written_alone(self, character: str) -> tuple[int, ...]:
        """The tokens of a character behind something; () where the tokenizer cannot write it."""
        tokenizer = self.processor.tokenizer
        anchor = tokenizer.encode("a", add_special_tokens=False)
        ids = tokenizer.encode("a" + character, add_special_tokens=False)
        written = ids[: len(anchor)] == anchor and tokenizer.decode(ids) == "a" + character
        return tuple(ids[len(anchor) :]) if written and not self._banned[ids].any() else ()

    def _spelling(self) -> dict[str, list[int]]:
        """Of each text that is one token, which tokens say it behind something."""
        if self._spelled is None:
            tokenizer, self._spelled = self.processor.tokenizer, {}
            anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
            stem = tokenizer.decode(anchor)
            for token in range(min(len(tokenizer), len(self._banned))):
                if not self._banned[token] and token != self.end_id:
                    said = tokenizer.decode([*anchor, token])
                    if said.startswith(stem) and len(said) > len(stem):
                        self._spelled.setdefault(said[len(stem) :], []).append(token)
        return self._spelled

    def _action_tokens(self, tokens: Tensor) -> Tensor:
        """(B, S) bool: what belongs to the action and not to the thought; all of an answer without a cue is thought."""
        of_action = torch.zeros_like(tokens, dtype=torch.bool)
        decode = self.processor.tokenizer.decode
        for row, ids in enumerate(self._trimmed(tokens.cpu())):
            place = self.template.action_part(decode(ids))
            if place is None:
                continue
            start = next((at for at in range(len(ids)) if len(decode(ids[: at + 1])) > place), len(ids))
            of_action[row, start : len(ids)] = True
        return of_action

    def _weighted(self, logprobs: Tensor, mask: Tensor, of_action: Tensor) -> Tensor:
        """RL4VLM's log-probability of a step, (B, 1): lambda x sum over the thought + sum over the action."""
        assert self.text.thought_coef is not None
        weights = torch.where(of_action, 1.0, self.text.thought_coef).to(logprobs)
        return (weights * logprobs.masked_fill(~mask, 0.0)).sum(-1, keepdim=True)


def groups_by_length(lengths: Tensor, most_padding: float = 0.1, least: int = 8) -> list[Tensor]:
    """Returns rows (n,) int64 in groups of like length, so that little is padded; one group where that is little.

    Args:
        lengths: (B,).
        most_padding: share of padding in a group that begins another.
        least: rows of a group, but for the last.
    """
    every = torch.arange(len(lengths))
    if 1 - float(lengths.float().mean() / lengths.max()) <= most_padding:
        return [every]
    order = torch.argsort(lengths, descending=True, stable=True)
    groups, first, total = [], 0, 0
    for at, length in enumerate(lengths[order].tolist()):
        count = at - first
        padded = 1 - (total + length) / ((count + 1) * int(lengths[order[first]]))
        if count >= least and padded > most_padding and len(order) - at >= least:
            groups.append(order[first:at])
            first, total = at, 0
        total += length
    return [*groups, order[first:]]


def nucleus(logp: Tensor, top_p: float) -> Tensor:
    """Returns log-probabilities (B, V) of the likeliest tokens alone that make up `top_p`, renormalised.

    The token that crosses the limit is kept, so at least one is (Holtzman et al. 2019, arXiv:1904.09751).
    """
    ordered, places = logp.sort(-1, descending=True)
    beyond = ordered.exp().cumsum(-1) - ordered.exp() >= top_p
    kept = logp.scatter(-1, places, ordered.masked_fill(beyond, -torch.inf))
    return kept.log_softmax(-1)
