"""Scripted experts: what a perfect player would do now, for demonstrations.

An environment of your own offers one by a method `expert_action()`, which returns the action for its current state (in
its own numbering). Known here beside that: Gymnasium's toy_text environments, whose transition table `P` is solved
exactly, MiniGrid's BabyAI levels by the bot that comes with them, and CarRacing, by a driver that looks ahead.
"""

import functools
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np

from manako.envs.attributes import owner_of
from manako.envs.errors import EnvError
from manako.errors import type_and_text

Expert = Callable[[Any], Any]  # the action before, as the env's own step() takes it, None at the start -> the next
GAMMA, TOLERANCE = 0.99, 1e-9


def make_expert(env: gym.Env, env_id: str) -> Expert:
    """Returns an expert from the current state to the end of the episode.

    Args:
        env: the environment, after its reset or later.
        env_id: for the message.

    Raises:
        EnvError: there is none for this environment.
    """
    raw: Any = env.unwrapped
    found = owner_of(env, "expert_action")
    if found is not None:
        expert = found[0]
        _check_same_actions(env, expert, env_id)
        return lambda _: expert.expert_action()
    _check_same_actions(env, raw, env_id)
    if isinstance(getattr(raw, "P", None), dict) and hasattr(raw, "s"):
        policy = _solve(_frozen_table(raw.P))
        return lambda _: int(policy[int(raw.s)])
    if hasattr(raw, "instrs") and hasattr(raw, "mission"):  # a BabyAI level
        return _babyai(env, env_id)
    if hasattr(raw, "track") and hasattr(raw, "car") and getattr(raw, "continuous", False):  # CarRacing
        return lambda _: _drive(raw)
    raise EnvError(
        f"{env_id} has no expert: expected an environment with a method expert_action() that returns the action for "
        "its present state, a toy_text one with a table P, a BabyAI level, or CarRacing"
    )


def _check_same_actions(env: gym.Env, expert: gym.Env, env_id: str) -> None:
    """Raises where a wrapper above the expert offers other actions than those that the expert knows."""
    if env.action_space != expert.action_space:
        raise EnvError(
            f"{env_id} has no expert for the actions {env.action_space}: its own knows {expert.action_space}, which a "
            "wrapper has changed; give that wrapper an expert_action() of its own"
        )


def _babyai(env: gym.Env, env_id: str) -> Expert:
    from minigrid.utils.baby_ai_bot import BabyAIBot

    try:
        bot = BabyAIBot(env)
    except Exception as error:
        raise EnvError(f"{env_id} is nothing for BabyAI's bot: {type_and_text(error)}") from error

    def act(before: int | None) -> int:
        return int(bot.replan(before))

    return act


AHEAD, TOP_SPEED, SLOW = 5, 45.0, 40.0  # tiles that CarRacing's driver looks ahead; m/s, and less by so much a radian


def _drive(race: Any) -> np.ndarray:
    """Steering, gas and brake, (3,), that take CarRacing's car towards a place of the road ahead of it."""
    place, road = np.array(race.car.hull.position), np.array(race.track)[:, 2:]  # (2,), (tiles, 2)
    nearest = int(np.linalg.norm(road - place, axis=1).argmin())
    to = road[(nearest + AHEAD) % len(road)] - place
    heading = race.car.hull.angle + np.pi / 2
    off = (np.arctan2(to[1], to[0]) - heading + np.pi) % (2 * np.pi) - np.pi  # rad, to the left
    speed = np.linalg.norm(race.car.hull.linearVelocity)
    fast = speed - max(10.0, TOP_SPEED - SLOW * abs(off))  # m/s above what the bend allows
    return np.array([np.clip(-1.5 * off, -1, 1), np.clip(-0.1 * fast, 0, 1), np.clip(0.05 * fast, 0, 0.8)], np.float32)


Table = tuple[tuple[tuple[tuple[float, int, float, bool], ...], ...], ...]  # [state][action] -> outcomes


def _frozen_table(table: dict[int, dict[int, list[tuple[float, int, float, bool]]]]) -> Table:
    return tuple(
        tuple(
            tuple(
                (float(chance), int(following), float(reward), bool(end)) for chance, following, reward, end in results
            )
            for results in table[state].values()
        )
        for state in sorted(table)
    )


@functools.lru_cache(maxsize=64)
def _solve(table: Table) -> np.ndarray:
    """The best action of each state (S,), by value iteration; of equal ones the first."""
    states, actions = len(table), max(len(row) for row in table)
    values = np.zeros(states)
    outcomes = [
        (state, action, p, following, reward, end)
        for state, row in enumerate(table)
        for action, results in enumerate(row)
        for p, following, reward, end in results
    ]
    at = np.array([state * actions + action for state, action, *_ in outcomes])
    chance, reward = np.array([o[2] for o in outcomes]), np.array([o[4] for o in outcomes])
    following, goes_on = np.array([o[3] for o in outcomes]), np.array([not o[5] for o in outcomes])
    for _ in range(100_000):
        expected = chance * (reward + GAMMA * goes_on * values[following])
        q = np.bincount(at, expected, states * actions).reshape(states, actions)
        change = np.abs(q.max(1) - values).max()
        values = q.max(1)
        if change < TOLERANCE:
            break
    return (q > q.max(1, keepdims=True) - 1e-6).argmax(1)
