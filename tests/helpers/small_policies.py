"""Policies as a user would write them, by the interface alone, small enough to be read in a minute.

`ColorNamer` says one of a closed set (S = 1). `TwoTokens` says an action in two tokens of two values each (S = 2), its
second token depending on its first; `TwoTokensRuled` leaves the second to a rule where the first is 0, so that it was
not drawn and is not learned from.
"""

import torch
from torch import nn

from manako.policies.interface import (
    Acted,
    Evaluated,
    Policy,
    PolicySpec,
    Rows,
    act_categorical,
    entropy,
    sample_categorical,
)


class Small(Policy):
    """Mean colour of a frame -> hidden (B, 16) -> what a subclass reads off it."""

    can_learn = True

    def __init__(self, env):
        super().__init__()
        self.spec = PolicySpec(tuple(env.action_names), tuple(env.frame_shape))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.see = nn.Sequential(nn.Linear(3, 16), nn.Tanh())
            self.value = nn.Linear(16, 1)
            self.heads()

    def prepare(self, images, instructions, told=None):
        return Rows({"frames": torch.from_numpy(images.copy())})  # uint8, as they came

    def hidden(self, inputs):
        return self.see(inputs["frames"].float().mean((1, 2)) / 16 - 0.5)

    @torch.no_grad()
    def predict_values(self, inputs):
        return self.value(self.hidden(inputs))[:, 0]


class ColorNamer(Small):
    """One linear layer to the actions."""

    def heads(self):
        self.head = nn.Linear(16, len(self.spec.action_names))

    @torch.no_grad()
    def act(self, inputs, draws, greedy=False):
        hidden = self.hidden(inputs)
        return act_categorical(self.head(hidden).log_softmax(-1), self.value(hidden)[:, 0], draws, greedy)

    def evaluate_actions(self, inputs, actions):
        hidden = self.hidden(inputs)
        logprobs = self.head(hidden).log_softmax(-1)  # (B, A)
        taken = logprobs.gather(1, actions["index"][:, None])
        return Evaluated(taken, entropy(logprobs)[:, None], self.value(hidden)[:, 0], logprobs)


class TwoTokens(Small):
    """Four actions as two tokens of two values; `ruled` leaves the second to a rule where the first is 0."""

    ruled = False

    def heads(self):
        self.first, self.second = nn.Linear(16, 2), nn.Linear(17, 2)

    def second_logprobs(self, hidden, first):
        return self.second(torch.cat([hidden, first[:, None].float()], 1)).log_softmax(-1)

    @torch.no_grad()
    def act(self, inputs, draws, greedy=False):
        hidden = self.hidden(inputs)
        logprobs, tokens = [self.first(hidden).log_softmax(-1)], []
        tokens.append(logprobs[0].argmax(-1) if greedy else sample_categorical(logprobs[0], draws.next()))
        drawn = tokens[0] != 0 if self.ruled else torch.ones(len(inputs), dtype=torch.bool)
        logprobs.append(self.second_logprobs(hidden, tokens[0]))
        second = logprobs[1].argmax(-1)
        if not greedy:
            places = drawn.nonzero()[:, 0].tolist()
            second[drawn] = sample_categorical(logprobs[1][drawn], draws.select(places).next())
        tokens.append(torch.where(drawn, second, 0))
        taken = torch.stack([p.gather(1, token[:, None])[:, 0] for p, token in zip(logprobs, tokens, strict=True)], 1)
        pair = torch.stack(tokens, 1)  # (B, 2)
        return Acted(
            actions=Rows({"tokens": pair}),
            to_env=(2 * pair[:, 0] + pair[:, 1]).numpy(),
            logprobs=taken,
            mask=torch.stack([torch.ones_like(drawn), drawn], 1),
            values=self.value(hidden)[:, 0],
            outcomes=["legal" if chosen else "ruled" for chosen in drawn.tolist()] if self.ruled else None,
        )

    def evaluate_actions(self, inputs, actions):
        hidden, tokens = self.hidden(inputs), actions["tokens"]
        both = [self.first(hidden).log_softmax(-1), self.second_logprobs(hidden, tokens[:, 0])]
        return Evaluated(
            logprobs=torch.stack([p.gather(1, tokens[:, [i]])[:, 0] for i, p in enumerate(both)], 1),
            entropy=torch.stack([entropy(p) for p in both], 1),
            values=self.value(hidden)[:, 0],
        )


class TwoTokensRuled(TwoTokens):
    ruled = True
