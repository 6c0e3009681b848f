"""Evaluation on held-out seeds: success and return with 95 % intervals, beside a random policy and two controls.

`blank_image` shows the policy a black frame, `replaced_instruction` another valid instruction than its own: a policy
that looks and reads falls to what guessing gives. All four play the same episodes, so differences can be tested in
pairs; unless the environment ignores its seeds, which is looked at first and said.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from manako.agent.errors import TrainingError
from manako.agent.interfaces import NOT_FIXED, EvaluationEnv, Shown, ask, remember_for
from manako.agent.report.figures import RecordedEpisode
from manako.agent.report.statistics import bootstrap_interval, wilson_interval
from manako.agent.report.unfinished import Unfinished
from manako.agent.rng import RANDOM_ACTIONS, make_rng
from manako.agent.rollout import Episode, success_rate, verdict
from manako.policies.interface import LEGAL, Draws, Policy, Rows
from manako.spaces import TextCodes, is_vector, shares

Condition = Literal["policy", "random", "blank_image", "replaced_instruction"]
CONDITIONS: tuple[Condition, ...] = ("policy", "random", "blank_image", "replaced_instruction")
MAX_EPISODE_STEPS = 30_000  # an Atari game is cut off at 27,000


@dataclass(frozen=True)
class Evaluation:
    """Episodes of one condition.

    Attributes:
        episodes: in the order of their seeds.
        starts: how many different first observations (frame and instruction) they have; where it is 1, a deterministic
            environment plays the same episode over and over, and an interval over episodes says little.
        fixed_by_seed: whether a seed fixes how an episode begins; else no two evaluations play the same episodes.
        outcomes: how often each outcome of an answer came; empty for a policy whose every answer is an action.
        failed: places in `episodes` of those that the environment broke in. Each is one of the fixed episodes, and no
            other stands in its place: it is no success, and its return and length, which nobody knows, are left out.
    """

    episodes: list[Episode]
    starts: int
    fixed_by_seed: bool
    asked: int | None = None  # how many episodes were asked for, where a budget of steps allowed fewer
    outcomes: dict[str, int] = field(default_factory=dict)
    failed: list[int] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Returns success and mean return with their 95 % intervals, mean length, episodes, starts, what of seeds.

        Success is None, and so is its interval, where not all episodes were `judged`: the return is the measure then.
        """
        lost = set(self.failed)
        whole = [episode for place, episode in enumerate(self.episodes) if place not in lost]
        judged = [episode.success for episode in whole]
        # where nobody judges, a lost episode is no failure either
        success: list[bool | None] = judged if None in judged else [*judged, *[False] * len(lost)]
        returns = [episode.episode_return for episode in whole]
        rate = success_rate(success)
        return {
            "success": rate,
            "success_ci95": None if rate is None else list(wilson_interval(success.count(True), len(success))),
            "judged": len(success) - success.count(None),
            "return_mean": float(np.mean(returns)),
            "return_ci95": list(bootstrap_interval(returns)),
            "length_mean": float(np.mean([episode.length for episode in whole])),
            "episodes": len(self.episodes),
            **({"failed": len(lost)} if lost else {}),
            **({} if self.asked is None else {"episodes_asked": self.asked}),
            "starts": self.starts,
            "fixed_by_seed": self.fixed_by_seed,
            **({} if self.fixed_by_seed else {"note": NOT_FIXED}),
            **({"outcomes": self.outcomes} if self.outcomes else {}),
        }


def evaluate(
    policy: Policy,
    env: EvaluationEnv,
    seeds: Sequence[int],
    condition: Condition = "policy",
    sample: bool = False,
    seed: int = 0,
    most_steps: int | None = None,
    kept: Unfinished | None = None,
) -> Evaluation:
    """Plays one episode for each seed, or for the first of them where episodes are long.

    How many is fixed once the first N have ended, by their mean length: so many as `most_steps` steps hold, but all
    that have begun by then. All of them are played to their end, so that short ones are not preferred.

    Args:
        policy: the policy or player; with `random` it is not asked.
        env: N environments; their own seeds are not used.
        seeds: held-out episode seeds.
        condition: what the policy sees, or `random` for uniform actions of those allowed.
        sample: sample actions from the policy's probabilities instead of taking the greedy ones.
        seed: of sampled actions.
        most_steps: budget of env steps; None plays them all.
        kept: where it is written down how far this is, and from where it goes on.

    Raises:
        TrainingError: no seeds, an unknown condition, or an episode that does not end.
    """
    if condition not in CONDITIONS:
        raise TrainingError(f"condition is {condition!r}: expected one of {', '.join(CONDITIONS)}.")
    if not seeds:
        raise TrainingError("An evaluation needs at least one episode: give seeds.")
    state = None if kept is None else kept.state_of(condition)
    rng, n = make_rng(seed, RANDOM_ACTIONS), env.num_envs
    draws = Draws([rng] * n)
    results: list[Episode | None] = [None] * len(seeds)
    outcomes: Counter[str] = Counter()
    failed: list[int] = []  # of results
    waiting = list(range(len(seeds)))[::-1]
    playing = [waiting.pop() if waiting else None for _ in range(n)]  # which seed each slot plays
    remember_for(env, policy)
    if state is None:
        fixed_by_seed, budget = env.follows_seeds(), most_steps
        # slots beyond the last seed play its episodes again, uncounted, since all slots step together
        observations = env.reset(seeds=[seeds[-1 if index is None else index] for index in playing])
        starts = {_observation_digest(observations, slot) for slot in range(n) if playing[slot] is not None}
    else:
        observations = _shown_again(env, state["env"])
        fixed_by_seed, budget, waiting, playing = (state[name] for name in ("fixed", "budget", "waiting", "playing"))
        results = [None if episode is None else Episode(*episode) for episode in state["results"]]
        failed = list(state["failed"])
        outcomes, starts = Counter(state["outcomes"]), {bytes.fromhex(text) for text in state["starts"]}
        rng.bit_generator.state = state["rng"]

    def now() -> dict[str, Any]:
        return {
            "env": env.state_dict(),
            "fixed": fixed_by_seed,
            "budget": budget,
            "waiting": waiting,
            "playing": playing,
            "results": [None if episode is None else _first_fields(episode) for episode in results],
            "outcomes": dict(outcomes),
            "failed": failed,
            "starts": sorted(start.hex() for start in starts),
            "rng": rng.bit_generator.state,
        }

    in_vain = _SaidInVain()
    with policy.frozen_weights():
        while any(index is not None for index in playing):
            if kept is not None:
                kept.at(condition, now)
            idle = np.array([index is None for index in playing])
            actions, said = _act(policy, env, observations, condition, sample, draws, idle, in_vain)
            outcomes.update(said[slot] for slot in np.flatnonzero(~idle).tolist() if said)
            result = env.step(actions)
            observations = result.observations
            ended = result.terminated | result.truncated | result.failed
            if (env.episode_lengths[~ended] >= MAX_EPISODE_STEPS).any():
                raise TrainingError(
                    f"An episode has not ended in {MAX_EPISODE_STEPS:,} steps: expected an environment that ends its "
                    "episodes, so set a limit, such as --max_episode_steps 500."
                )
            if not ended.any():
                continue
            following = []
            for slot in np.flatnonzero(ended):
                index = playing[slot]
                if index is not None:
                    won = False if result.failed[slot] else verdict(result.success[slot])
                    results[index] = Episode(float(env.episode_returns[slot]), int(env.episode_lengths[slot]), won)
                    if result.failed[slot]:
                        failed.append(index)
                if budget is not None and all(episode is not None for episode in results[:n]):
                    first = [episode.length for episode in results[:n] if episode is not None]
                    count = int(budget * len(first) / sum(first))
                    waiting, budget = [later for later in waiting if later < count], None  # decided
                playing[slot] = index = waiting.pop() if waiting else None
                following.append(seeds[-1 if index is None else index])
            observations = env.reset_done(ended, seeds=following)
            begun = [slot for slot in np.flatnonzero(ended).tolist() if playing[slot] is not None]
            starts |= {_observation_digest(observations, slot) for slot in begun}
    played = [episode for episode in results if episode is not None]
    asked = len(seeds) if len(played) < len(seeds) else None
    if len(failed) == len(played):
        raise TrainingError(
            f"The environment broke in each of {len(played)} episodes of the evaluation, the last time so: "
            f"{env.take_faults()[-1].sentence}; repair it."
        )
    return Evaluation(played, len(starts), fixed_by_seed, asked, dict(outcomes.most_common()), sorted(failed))


def _first_fields(episode: Episode) -> tuple[float, int, bool | None]:
    return episode.episode_return, episode.length, episode.success


def _shown_again(env: EvaluationEnv, state: Any) -> Shown:
    shown = env.load_state_dict(state)
    assert shown is not None, "a row is kept once its episodes have begun"
    return shown


def _observation_digest(observations: Any, slot: int) -> bytes:
    """Returns a digest, equal where frame and instruction are."""
    text = observations.instructions[slot].encode()
    return hashlib.blake2b(observations.images[slot].tobytes() + text, digest_size=16).digest()


def _act(
    policy: Policy,
    env: EvaluationEnv,
    observations: Shown,
    condition: Condition,
    sample: bool,
    draws: Draws,
    idle: np.ndarray,
    in_vain: "_SaidInVain",
) -> tuple[np.ndarray, Sequence[str]]:
    """The actions (N,), and the outcomes of the answers, N or none; `idle` (N,) bool are slots beyond the last seed."""
    if condition == "random":
        return env.random_actions(draws.next), ()
    images, instructions, told = observations.images, observations.instructions, ask(env, policy.needs)
    if condition == "blank_image":
        images = np.zeros_like(images)
        told |= {name: np.zeros_like(told[name]) for name in told if name == "past_frames"}
    elif condition == "replaced_instruction":
        instructions = env.replaced_instructions()
    if "uncounted" in told:
        told["uncounted"] = idle
    inputs = policy.prepare(images, instructions, told)
    if sample or not policy.can_learn:
        acted = policy.act(inputs, draws, greedy=not sample)
        return acted.to_env, acted.outcomes or ()
    return in_vain.act(policy, inputs, draws)


class _SaidInVain:
    """Greedy answers that were no actions: where a slot shows the same again, the same would be written again."""

    def __init__(self) -> None:
        self._seen: list[int | None] = []  # digest of what each slot showed, where its answer was no action
        self._actions: np.ndarray = np.empty(0)
        self._outcomes: list[str] = []

    def act(self, policy: Policy, inputs: Rows, draws: Draws) -> tuple[np.ndarray, Sequence[str]]:
        """As `Policy.act`, without writing again what is known."""
        known = [digest is not None for digest in self._seen]
        digests = inputs.digests().tolist() if any(known) else []
        same = [a is not None and a == b for a, b in zip(self._seen, digests, strict=True)] if digests else []
        if not any(same):
            acted = policy.act(inputs, draws, greedy=True)
            actions, outcomes = acted.to_env, list(acted.outcomes or ())
        else:
            actions, outcomes = self._actions.copy(), list(self._outcomes)
            others = [slot for slot, repeats in enumerate(same) if not repeats]
            if others:
                acted = policy.act(inputs.select(torch.tensor(others)), draws.select(others), greedy=True)
                actions[others] = acted.to_env
                for slot, outcome in zip(others, acted.outcomes or (), strict=True):
                    outcomes[slot] = outcome
        self._actions, self._outcomes, self._seen = actions, outcomes, []
        if any(outcome != LEGAL for outcome in outcomes):
            digests = digests or inputs.digests().tolist()
            said = zip(digests, outcomes, strict=True)
            self._seen = [None if outcome == LEGAL else digest for digest, outcome in said]
        return actions, outcomes


def evaluate_all(
    policy: Policy,
    env: EvaluationEnv,
    seeds: Sequence[int],
    sample: bool = False,
    done: Callable[[Condition, Evaluation], None] | None = None,
    most_steps: int | None = None,
    kept: Unfinished | None = None,
    conditions: Sequence[Condition] = CONDITIONS,
) -> dict[Condition, Evaluation]:
    """Evaluates the policy, a random policy and the two controls on the same episodes.

    Args:
        policy: the policy.
        env: N environments.
        seeds: held-out episode seeds.
        sample: as of `evaluate`.
        done: hears of each row.
        most_steps: budget of env steps for all rows together; what it allows to the first row, all rows play.
        kept: as of `evaluate`; rows that are done are not played again.
        conditions: those of these rows that are played.
    """
    evaluations: dict[Condition, Evaluation] = {}
    asked, budget = len(seeds), None if most_steps is None else most_steps // len(conditions)
    for condition in conditions:
        row = None if kept is None else kept.rows.get(condition)
        if row is not None:
            episodes = [Episode(*episode) for episode in row["episodes"]]
            played = Evaluation(**{**row, "episodes": episodes})
        else:
            played = evaluate(policy, env, seeds, condition, sample, most_steps=budget, kept=kept)
            if kept is not None:
                kept.done(condition, {**vars(played), "episodes": [_first_fields(each) for each in played.episodes]})
        seeds, budget = seeds[: len(played.episodes)], None
        evaluations[condition] = replace(played, asked=asked if len(seeds) < asked else None)
        if done is not None:
            done(condition, evaluations[condition])
    return evaluations


class Agreement(NamedTuple):
    """How often a policy would do what the environment's expert does."""

    agreed: int  # states
    states: int  # of whole episodes that the expert plays

    @property
    def share(self) -> float:
        """Of the states."""
        return self.agreed / self.states


def expert_agreement(policy: Policy, env: EvaluationEnv, seeds: Sequence[int]) -> Agreement:
    """Lets the expert play an episode for each seed, and asks the policy for its likeliest action in every state.

    Args:
        policy: the policy; where several actions are as good, only the expert's counts.
        env: as many environments as there are seeds.
        seeds: held-out episode seeds.

    Raises:
        EnvError: the environment has no expert.
        TrainingError: an episode that does not end.
    """
    remember_for(env, policy)
    observations = env.reset(seeds=list(seeds))
    going = np.ones(env.num_envs, dtype=bool)
    agreed = states = 0
    with policy.frozen_weights():
        for _ in range(MAX_EPISODE_STEPS):
            expert = np.asarray(env.expert_actions())
            inputs = policy.prepare(observations.images, observations.instructions, ask(env, policy.needs))
            chosen = policy.act(inputs, Draws([]), greedy=True).to_env
            agreed += int(_same_actions(policy, chosen, expert)[going].sum())
            states += int(going.sum())
            result = env.step(expert)
            ended = result.terminated | result.truncated
            going &= ~ended
            if not going.any():
                return Agreement(agreed, states)
            observations = env.reset_done(ended) if ended.any() else result.observations
    raise TrainingError(f"The expert has not ended an episode in {MAX_EPISODE_STEPS:,} steps: set a limit of steps.")


def _same_actions(policy: Policy, chosen: np.ndarray, expert: np.ndarray) -> np.ndarray:
    """(N,) bool; vectors are the same where they fall into the same bins."""
    if chosen.ndim == 1:
        return chosen == expert
    if isinstance(policy.spec.action_space, TextCodes):
        return (chosen == expert).all(1)
    one, other = (policy.actions_from_env(actions).columns for actions in (chosen, expert))
    return np.all([(one[name] == other[name]).numpy().all(1) for name in one], axis=0)


def record_episodes(
    policy: Policy, env: EvaluationEnv, seeds: Sequence[int], max_steps: int = 2_000, most_frames: int = 60
) -> list[RecordedEpisode]:
    """Returns greedy episodes with all that a GIF shows.

    A long episode is thinned: of `most_frames` or fewer steps its frames are kept, every k-th. One that is still going
    on after `max_steps` is cut there.

    Args:
        policy: the policy.
        env: as many environments as there are seeds.
        seeds: held-out episode seeds.
        max_steps: longest episode that is played.
        most_frames: kept of an episode, at least 2, beside its last one.
    """
    remember_for(env, policy)
    observations = env.reset(seeds=list(seeds))
    slots = range(env.num_envs)
    frames = [[observations.images[slot]] for slot in slots]  # before each k-th step
    last = list(observations.images)
    every = [1] * env.num_envs
    instructions = [[observations.instructions[slot]] for slot in slots]
    probabilities: list[list[np.ndarray]] = [[] for _ in slots]
    answers: list[list[str]] = [[] for _ in slots]  # of a policy that writes
    actions: list[list[Any]] = [[] for _ in slots]
    rewards: list[list[float]] = [[] for _ in slots]
    success: list[bool | None] = [False] * env.num_envs
    going = set(slots)
    draws = Draws([])  # greedy actions ask for none
    with policy.frozen_weights():
        for _ in range(max_steps):
            inputs = policy.prepare(observations.images, observations.instructions, ask(env, policy.needs))
            acted = policy.act(inputs, draws, greedy=True)
            texts: list[str] = []
            if policy.writes(acted.actions):
                bars, texts = np.zeros((env.num_envs, len(env.action_names))), policy.answers(acted.actions)
            elif is_vector(env.action_space):
                bars = shares(env.action_space, acted.to_env)
            else:
                said = policy.evaluate_actions(inputs.to(policy.device), acted.actions.to(policy.device)).distribution
                assert said is not None, "the bars of a GIF are those of a closed set"
                bars = said.exp().cpu().numpy()
            result = env.step(acted.to_env)
            observations = result.observations
            ended = result.terminated | result.truncated
            for slot in sorted(going):
                last[slot] = observations.images[slot]
                instructions[slot].append(observations.instructions[slot])
                probabilities[slot].append(bars[slot])
                answers[slot] += texts[slot : slot + 1]
                actions[slot].append(acted.to_env[slot].tolist())
                rewards[slot].append(float(result.rewards[slot]))
                if ended[slot]:
                    success[slot] = verdict(result.success[slot])
                    going.discard(slot)
                elif len(actions[slot]) % every[slot] == 0:
                    if len(frames[slot]) == most_frames:
                        frames[slot], every[slot] = frames[slot][::2], 2 * every[slot]
                    if len(actions[slot]) % every[slot] == 0:
                        frames[slot].append(last[slot])
            if not going:
                break
            if ended.any():
                observations = env.reset_done(ended)
    return [
        RecordedEpisode(
            [*frames[slot][: -(-len(actions[slot]) // every[slot])], last[slot]],
            instructions[slot],
            np.stack(probabilities[slot]),
            actions[slot],
            rewards[slot],
            success[slot],
            every[slot],
            slot not in going,
            answers[slot],
        )
        for slot in slots
    ]
