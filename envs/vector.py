"""N environments side by side, with every episode's seed ours, no dummy transitions and faults that name their place.

Built on Gymnasium's `SyncVectorEnv` with `AutoresetMode.DISABLED`: the observation that ends an episode is returned
by `step`, and the caller starts the next episode with `reset_done`. A fault that is raised ends the use of the object:
some slots have moved and others have not, so close it, build it again and load the last `state_dict`.

What an environment's own code raises need not be raised here (`on_fault`): that slot alone is made anew and its episode
played again. An episode that cannot be brought back is given up: its step says `failed`, with no reward and nothing
shown, and `reset_done` starts the slot's next one. Values outside the contract are raised always: they are no chance.

Left out: `AsyncVectorEnv`. In Gymnasium 1.4.0 it returns blank `Text` with shared memory, and a killed worker
leaves it stuck.

Seeds: slot k of a run's split s plays episode e with `episode_seed(seed, s, k // group_size, e)`, and k counts over
all workers. So workers in any number play the same episodes, and no training episode has a held-out seed. Where
the episodes are fixed beforehand (recorded play, a data set), `seed_lists` names each slot's seeds instead. What is
chosen while a run trains is chosen on seeds of a third split, `validation_seeds`: those of tests stay unseen.

A slot comes back by its episode's actions, played again from its seed. What an episode has shown and paid so far is
kept as one digest, each step's made of the one before, so a replay that differs in any step is known. Such an episode
is given up, and its slot starts another one from the same seed.
"""

import contextlib
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from manako.envs.errors import EnvBrokeError, EnvError
from manako.envs.faults import IN_A_ROW, REPLAYS, Fault, HangError, Watchdog, fault_of, forget_frames
from manako.envs.making import make_vlm_env
from manako.envs.masks import random_actions
from manako.envs.observation import ImageSource, VLMObservation
from manako.memory import Memory
from manako.spaces import action_dtype, action_shape, is_skip, is_vector, random_vectors

log = logging.getLogger("manako.envs")

TRAINING, HELD_OUT, VALIDATION = 0, 1, 2  # splits

STATE_FORMAT = 1
TEST_SEEDS = 10_000  # of a run that no validation episode has, however many are asked for
EPISODES_A_ROUND = 100_000  # more than one slot plays in a round
OnFault = Literal["raise", "replay", "give up"]
_MAX_REMEMBERED = 256  # instructions kept for replaced_instructions
_SEED_RESETS, _SEED_SECONDS = 5, 1.0  # resets to one seed, and after how long two of them are enough


class Observations(NamedTuple):
    """What N slots see. The arrays are never written to again; treat them as read-only."""

    images: np.ndarray  # (N, H, W, 3) uint8
    instructions: tuple[str, ...]  # N


class StepResult(NamedTuple):
    """What N slots return from one step."""

    observations: Observations
    rewards: np.ndarray  # (N,) float64
    terminated: np.ndarray  # (N,) bool
    truncated: np.ndarray  # (N,) bool
    success: np.ndarray  # (N,) int8: 1 success, 0 none or no episode ended, -1 ended and nobody says what a success is
    failed: np.ndarray  # (N,) bool: the environment broke instead, its episode is lost, and this was no step


def episode_seed(seed: int, split: int, slot: int, episode: int) -> int:
    """Returns the seed of one episode, below 2^31 (some environments take no larger one).

    The lowest bit is 1 for the two held-out splits, test and validation, and 0 for any other, so they never meet.

    Args:
        seed: The run's seed.
        split: `TRAINING`, `HELD_OUT` (the test), `VALIDATION` or a further number.
        slot: The slot, counted over all workers.
        episode: How many episodes the slot has started before.
    """
    sequence = np.random.SeedSequence(entropy=seed, spawn_key=(split, slot, episode))
    return (int(sequence.generate_state(1)[0]) >> 2 << 1) | (split in (HELD_OUT, VALIDATION))


class EpisodeVectorEnv:
    """N slots, each walking through its own sequence of seeded episodes.

    Attributes:
        num_envs: N.
        action_space: `Discrete(A)`, or of vectors: `MultiDiscrete` from 0 on or `Box` of float32, both (d,).
        action_names: One name an action, (A,), or an entry of a vector, (d,).
        frame_shape: (H, W, 3).
        success_rule: How an episode's success is judged, in words.
        limit: After how many steps an episode is truncated; `limit_from` says it in words.
        gives_masks: Whether the environment says which actions are allowed, and is obeyed.
        episode_returns: (N,) float64, the current episodes' rewards so far.
        episode_lengths: (N,) int64, their steps so far. Both may be read between `step` and `reset_done`.
        episode_seeds: The seeds of the current episodes, N.
        observations: What every slot shows now; None before the first reset.
        digests: One a slot, of all that its episode has shown and paid so far.
        given_up: Episodes that did not replay in `load_state_dict`, so far.
        faults: What was survived since `take_faults`.
        memory: What the current episodes have shown and paid before now, as far as `remember` asked for it.
    """

    def __init__(
        self,
        env_id: str,
        num_envs: int,
        *,
        seed: int = 0,
        split: int = TRAINING,
        first_slot: int = 0,
        group_size: int = 1,
        seed_lists: Sequence[Sequence[int]] | None = None,
        instruction: str | None = None,
        action_names: Sequence[str] | None = None,
        env_kwargs: Mapping[str, Any] | None = None,
        image_source: ImageSource = "auto",
        success_return: float | None = None,
        action_masks: bool = True,
        max_episode_steps: int | None = None,
        on_fault: OnFault = "raise",
        step_timeout: float | None = None,
    ) -> None:
        """Makes the environments; nothing is started before `reset`.

        Args:
            env_id: See `make_vlm_env`, as for those from `instruction` to `max_episode_steps`.
            num_envs: N.
            seed: The run's seed, from 0 on.
            split: `TRAINING`, `HELD_OUT` or `VALIDATION`.
            first_slot: The number of the first slot among those of all workers.
            group_size: How many neighbouring slots play episodes of the same seeds.
            seed_lists: The seeds of each slot's episodes, N lists, in place of drawn ones; after its last a slot begins
                again with its first.
            instruction: Replaces the environment's own.
            action_names: Replace the environment's own.
            env_kwargs: For the environment's constructor.
            image_source: "auto", "observation", "render" or "blank".
            success_return: The lowest return of a successful episode.
            action_masks: Obey `info["action_mask"]` where the environment gives one.
            max_episode_steps: After so many steps an episode is truncated.
            on_fault: What an environment's exception does: it is raised, or the episode is played again, and where that
                does not bring it back, it is raised then, or the episode is given up.
            step_timeout: Seconds after which a step is broken off, with the whole process where it must be, so in a
                worker alone; None warns of a long one.

        Raises:
            EnvError: The environment cannot be made, or a number is out of range.
        """
        for name, value, least in (
            ("num_envs", num_envs, 1),
            ("seed", seed, 0),
            ("split", split, 0),
            ("first_slot", first_slot, 0),
            ("group_size", group_size, 1),
        ):
            if value < least:
                raise EnvError(f"{name} is {value}, expected a whole number from {least} on")
        if seed_lists is not None and (len(seed_lists) != num_envs or not all(seed_lists)):
            sizes = [len(seeds) for seeds in seed_lists]
            raise EnvError(f"seed_lists has the lengths {sizes}, expected {num_envs} lists of one seed or more")
        self.env_id, self.num_envs = env_id, num_envs
        self.seed, self.split, self.first_slot, self.group_size = seed, split, first_slot, group_size
        self._envs: list[VLMObservation] = []

        def make(index: int) -> _SuccessInInfo:
            env = make_vlm_env(
                env_id,
                instruction=instruction,
                action_names=action_names,
                env_kwargs=env_kwargs,
                image_source=image_source,
                success_return=success_return,
                action_masks=action_masks,
                max_episode_steps=max_episode_steps,
            )
            env.slot = first_slot + index
            self._envs[index:index] = [env]
            return _SuccessInInfo(env, on_fault != "raise")

        self._make, self.on_fault = make, on_fault

        try:
            self._vector: SyncVectorEnv = SyncVectorEnv(
                [functools.partial(make, index) for index in range(num_envs)],
                copy=False,
                autoreset_mode=AutoresetMode.DISABLED,
            )
        except RuntimeError as error:
            kinds = sorted({f"frames of {env.frame_shape}, {len(env.action_names)} actions" for env in self._envs})
            raise EnvError(
                f"{env_id} makes environments that differ ({'; '.join(kinds)}): all frames must have one size, and all "
                "slots the same actions"
            ) from error

        first = self._envs[0]
        self.action_names, self.action_space = first.action_names, first.action_space
        self.frame_shape = first.frame_shape
        self.success_rule = first.success.sentence
        self.gives_masks = any(env.gives_masks for env in self._envs)
        self.image_from = first.image_from
        self.limit, self.limit_from = first.limit, first.limit_from
        self.render_fps = first.metadata.get("render_fps")
        self.episode_returns = np.zeros(num_envs, np.float64)
        self.episode_lengths = np.zeros(num_envs, np.int64)
        self.episode_seeds: list[int] = [0] * num_envs
        self._seed_lists = seed_lists
        self._episodes = [0] * num_envs  # episodes started
        self._actions: list[list[Any]] = [[] for _ in range(num_envs)]  # of the current episodes, as JSON holds them
        self._ended = np.zeros(num_envs, bool)
        self.digests: list[str] = [""] * num_envs
        self.given_up = 0
        self.faults: list[Fault] = []
        self._in_a_row = [0] * num_envs  # faults since the last step
        self._watchdog = Watchdog(env_id, step_timeout)
        for env in self._guarded:
            env.watchdog = self._watchdog
        self.observations: Observations | None = None
        self.memory = Memory(num_envs)
        self._known: dict[str, None] = {}  # instructions seen, oldest first
        self._replacements: list[str | None] = [None] * num_envs
        self._experts: list[Callable[[Any], Any] | None] = [None] * num_envs

    def remember(self, frames: int = 0, turns: int = 0) -> None:
        """Keeps so much of each episode's past in `memory`, or more where it was asked for before.

        Running episodes end with it, since their past is not known: reset before the next step.

        Args:
            frames: How many before the present one.
            turns: How many actions and rewards before the present step.
        """
        larger = max(frames, self.memory.size[0]), max(turns, self.memory.size[1])
        if larger != self.memory.size:
            self.memory = Memory(self.num_envs, *larger)
            self.observations = None

    def reset(self, seeds: Sequence[int] | None = None) -> Observations:
        """Starts an episode in every slot.

        Args:
            seeds: The N episodes' seeds; None takes each slot's next.
        """
        return self._start(np.ones(self.num_envs, bool), seeds)

    def start_round(self, number: int) -> Observations:
        """Starts a new episode in every slot, the same one in all slots of a group, whatever they played before.

        Args:
            number: Which round; it selects the episodes.
        """
        self._episodes = [number * EPISODES_A_ROUND] * self.num_envs
        return self.reset()

    def reset_done(self, mask: np.ndarray, seeds: Sequence[int] | None = None) -> Observations:
        """Starts the next episode where `mask` (N,) is True; the other rows come back as they were.

        Args:
            mask: Usually `terminated | truncated`.
            seeds: One seed for each True in the mask, in slot order; None takes each slot's next.
        """
        mask = np.asarray(mask)
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_:
            raise EnvError(
                f"got a mask of shape {mask.shape} and dtype {mask.dtype}, expected ({self.num_envs},) and bool"
            )
        if self.observations is None and not mask.all():
            raise EnvError("reset_done came before any episode was started: call reset first")
        return self._start(mask, seeds)

    def step(self, actions: np.ndarray) -> StepResult:
        """Takes one action in every slot: (N,) of 0 to A - 1, or none where it is `SKIP`; or vectors (N, d).

        Raises:
            EnvError: An action is out of range, an episode has ended and was not restarted, or an environment broke.
        """
        actions = np.asarray(actions)
        shape = (self.num_envs, *action_shape(self.action_space))
        floats = isinstance(self.action_space, gym.spaces.Box)
        if actions.shape != shape or not np.issubdtype(actions.dtype, np.floating if floats else np.integer):
            raise EnvError(
                f"got actions of shape {actions.shape} and dtype {actions.dtype}, expected {shape} "
                f"{'floats' if floats else 'integers'}"
            )
        actions = actions.astype(action_dtype(self.action_space))
        if self.observations is None:
            raise EnvError("step came before any episode was started: call reset first")
        if self._ended.any():
            slots = (np.flatnonzero(self._ended) + self.first_slot).tolist()
            raise EnvError(f"the episodes of the slots {slots} have ended: call reset_done before the next step")
        seen, rewards, terminated, truncated, infos = self._vector.step(actions)
        self.episode_lengths = self.episode_lengths + 1
        for past, action in zip(self._actions, actions.tolist(), strict=True):
            past.append(action)
        success = np.asarray(infos.get("success", np.zeros(self.num_envs)), np.int8)
        shown, failed = Observations(seen["image"].copy(), seen["instruction"]), np.zeros(self.num_envs, bool)
        if any(env.broke is not None for env in self._guarded):
            shown, failed = self._recovered(actions, shown, rewards, terminated, truncated, success)
        self.episode_returns = self.episode_returns + rewards
        self._ended = terminated | truncated | failed
        for slot, action in enumerate(actions.tolist()):
            self._in_a_row[slot] = self._in_a_row[slot] if failed[slot] else 0
            self.memory.step(slot, self.observations.images[slot], action, float(rewards[slot]))
        self.observations = shown
        for slot in range(self.num_envs):
            paid = (rewards[slot], terminated[slot], truncated[slot])
            self._digest(slot, self.observations.images[slot], self.observations.instructions[slot], *paid)
        return StepResult(self.observations, rewards, terminated, truncated, success, failed)

    @property
    def _guarded(self) -> "list[_SuccessInInfo]":
        return list(self._vector.envs)  # type: ignore[arg-type]

    @property
    def started(self) -> list[int]:
        """How many episodes each slot has started."""
        return list(self._episodes)

    def take_faults(self) -> list[Fault]:
        """Returns the faults that were survived since the last call."""
        taken, self.faults = self.faults, []
        return taken

    def _recovered(
        self,
        actions: np.ndarray,
        shown: Observations,
        rewards: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
        success: np.ndarray,
    ) -> tuple[Observations, np.ndarray]:
        """Brings slots back whose environment broke in this step, and writes what the step then gives.

        Returns:
            What all slots show, and (N,) bool, those that could not be brought back.

        Raises:
            EnvError: one could not, and it is not to be given up, or broke too often in a row.
        """
        assert self.observations is not None
        images, texts, failed = shown.images, list(shown.instructions), np.zeros(self.num_envs, bool)
        for slot, env in enumerate(self._guarded):
            if env.broke is None:
                continue
            error = env.broke
            again = self._play_again(slot, error)
            self._note(slot, error, again is None, int(self.episode_lengths[slot]))
            if again is None:
                failed[slot] = True
                images[slot], texts[slot] = self.observations.images[slot], self.observations.instructions[slot]
                continue
            seen, rewards[slot], terminated[slot], truncated[slot], info = again
            images[slot], texts[slot] = seen["image"], seen["instruction"]
            success[slot] = info.get("success", 0)
        return Observations(images, tuple(texts)), failed

    def _note(self, slot: int, error: EnvError, given_up: bool, step: int) -> None:
        """Keeps a fault.

        Raises:
            EnvError: it is one that ends the run.
        """
        self.faults.append(fault_of(self.first_slot + slot, self.episode_seeds[slot], step, given_up, error))
        if given_up and self.on_fault != "give up":
            raise error
        forget_frames(error)
        if not given_up:
            return
        self._in_a_row[slot] += 1
        if self._in_a_row[slot] >= IN_A_ROW:
            raise EnvError(f"{error}, as it has {IN_A_ROW} times in a row without a step between: repair it") from error

    def _play_again(self, slot: int, error: EnvError) -> tuple[Any, float, bool, bool, dict[str, Any]] | None:
        """Plays an episode again in a new object, with the action that broke; None where that goes otherwise."""
        digest, (*before, last) = self.digests[slot], self._actions[slot]
        for _ in range(REPLAYS):
            self._renew(slot)
            env, reached = self._guarded[slot], 0
            try:
                seen, _ = env.firm_reset(self.episode_seeds[slot])
                self.digests[slot] = str(self.episode_seeds[slot])
                self._digest(slot, seen["image"], seen["instruction"])
                for action in before:
                    seen, reward, terminated, truncated, _ = env.firm_step(action)
                    self._digest(slot, seen["image"], seen["instruction"], reward, terminated, truncated)
                    reached += 1
                if self.digests[slot] != digest:
                    return None  # seed and actions do not fix it
                return env.firm_step(last)
            except EnvBrokeError as another:
                if reached == len(before) and str(another) == str(error):
                    return None  # no chance: it breaks there
            finally:
                self.digests[slot] = digest
        return None

    def _renew(self, slot: int) -> None:
        """Makes a slot's environment anew."""
        with contextlib.suppress(Exception):  # it is broken
            self._vector.envs[slot].close()
        self._guarded[slot].broke = None
        del self._envs[slot]
        env = self._make(slot)
        env.watchdog = self._watchdog
        self._vector.envs = [env if index == slot else old for index, old in enumerate(self._vector.envs)]
        self._experts[slot] = None

    @property
    def action_masks(self) -> np.ndarray | None:
        """Which actions are allowed now, (N, A) bool; all in a slot whose episode has ended. None: nobody says."""
        if not self.gives_masks or self.observations is None:
            return None
        return np.stack([env.action_mask for env in self._envs])

    def random_actions(self, draw: Callable[[], np.ndarray]) -> np.ndarray:
        """Returns an action for each slot, of those allowed each alike; of a vector each entry, over its whole range.

        Args:
            draw: gives (N,) numbers in [0, 1), as often as there are entries.
        """
        if is_vector(self.action_space):
            return random_vectors(self.action_space, draw)
        return random_actions(draw(), len(self.action_names), self.action_masks)

    def expert_actions(self) -> np.ndarray:
        """Returns for each slot the scripted expert's action now, (N,) int64 or vectors (N, d).

        Raises:
            EnvError: The environment has no expert, or one that wants what the action mask does not allow.
        """
        if self.observations is None:
            raise EnvError("there is no action to take before reset")
        actions = []
        for slot, env in enumerate(self._envs):
            expert, before = self._experts[slot], self._actions[slot][-1] if self._actions[slot] else None
            if expert is None or (
                before is not None and is_skip(self.action_space, before)
            ):  # a new one plans from the current state
                expert, before = env.expert(), None
                self._experts[slot] = expert
            actions.append(expert(before))
        return np.array(actions, action_dtype(self.action_space))

    def expert_thoughts(self) -> tuple[str, ...] | None:
        """Returns for each slot what the expert thinks before it acts now; None where the environment does not say."""
        thoughts = [env.expert_thought() for env in self._envs]
        return None if None in thoughts else tuple(str(thought) for thought in thoughts)

    def captions(self) -> tuple[str, ...]:
        """Returns for each slot what it shows, in words.

        Raises:
            EnvError: The environment does not say.
        """
        return tuple(env.caption() for env in self._envs)

    def replaced_instructions(self) -> tuple[str, ...]:
        """Returns for each slot an instruction that is valid and not its own, to test whether a policy reads.

        It is the environment's `alternative_instruction()` where it offers one (another object on the same board),
        else an instruction that this object has seen in another episode, the same throughout an episode as long as the
        slot's own does not become it. Where all episodes read the same, it is the empty string.
        """
        if self.observations is None:
            raise EnvError("there is no instruction to replace before reset")
        return tuple(self._replacement(slot) for slot in range(self.num_envs))

    def follows_seeds(self) -> bool:
        """Says whether a seed fixes how an episode begins: one seed always gives the same first frame and instruction.

        The first slot is reset a few times to one held-out seed, twice where that takes long, so ask between episodes.
        """
        before, known = list(self._episodes), dict(self._known)
        seeds = [episode_seed(self.seed, self.split or HELD_OUT, 0, 0)]
        start = time.perf_counter()
        mask = np.full(self.num_envs, self.observations is None)  # all have to begin before one can begin again
        mask[0] = True
        shown: set[tuple[bytes, str]] = set()
        for number in range(_SEED_RESETS):
            if len(shown) > 1 or (number > 1 and time.perf_counter() - start > _SEED_SECONDS):
                break
            seen = self.reset_done(mask, seeds=seeds * int(mask.sum()))
            shown.add((seen.images[0].tobytes(), seen.instructions[0]))
            mask[1:] = False
        self._episodes, self._known = before, known
        return len(shown) == 1

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of every slot, as JSON: its episode's seed, actions, and digest."""
        if self.observations is None:
            return {**self._identity(), "episodes": list(self._episodes), "slots": None}
        slots = [
            {"seed": self.episode_seeds[slot], "actions": list(self._actions[slot]), "digest": self.digests[slot]}
            for slot in range(self.num_envs)
        ]
        return {
            **self._identity(),
            "episodes": list(self._episodes),
            "slots": slots,
            "instructions": list(self._known),
            "replacements": list(self._replacements),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> Observations | None:
        """Brings every slot back to where it was, by playing its actions again from its episode's seed.

        Where that shows or pays anything else than it did, the episode is given up, and the slot starts it anew, from
        the same seed; `given_up` counts these.

        Returns:
            What the slots see; None where the saved object had not been reset.

        Raises:
            EnvError: The state is of another environment or number of slots, or the environment broke.
        """
        for key, expected in self._identity().items():
            if state.get(key) != expected:
                raise EnvError(
                    f"the saved environment state has the {key} {state.get(key)!r}, expected {expected!r}: resume with "
                    "the settings that the run was started with"
                )
        if len(state["episodes"]) != self.num_envs:
            raise EnvError(
                f"the saved environment state has {len(state['episodes'])} slots, and there are {self.num_envs}: "
                "resume with the number of environments and workers that the run was started with"
            )
        self._episodes = [int(episode) for episode in state["episodes"]]
        if state["slots"] is None:
            self.observations = None
            return None
        self._start(np.ones(self.num_envs, bool), [slot["seed"] for slot in state["slots"]], counted=False)
        assert self.observations is not None
        images, instructions = self.observations.images.copy(), list(self.observations.instructions)
        for index, slot in enumerate(state["slots"]):
            images[index], instructions[index] = self._replay(index, slot["actions"])
        self.observations = Observations(images, tuple(instructions))
        self._known = dict.fromkeys(state["instructions"])
        self._replacements = list(state["replacements"])
        others = np.array([self.digests[index] != slot["digest"] for index, slot in enumerate(state["slots"])])
        if others.any():
            self.given_up += int(others.sum())
            self._start(
                others,
                [slot["seed"] for slot, is_other in zip(state["slots"], others, strict=True) if is_other],
                counted=False,
            )
        return self.observations

    def _replay(self, slot: int, actions: list[Any]) -> tuple[np.ndarray, str]:
        """Plays the actions of an episode that has just begun, as far as they go; returns what the slot shows then."""
        assert self.observations is not None
        image, instruction = self.observations.images[slot], self.observations.instructions[slot]
        for action in actions:
            if self._ended[slot]:
                self.digests[slot] = ""  # the saved episode went on: another one
                break
            try:
                seen, reward, terminated, truncated, _ = self._guarded[slot].firm_step(action)
            except EnvError:  # what could be done there cannot be done here
                self.digests[slot] = ""
                break
            self._actions[slot].append(action)
            self.memory.step(slot, image, action, float(reward))
            self.episode_returns[slot] += reward
            self.episode_lengths[slot] += 1
            self._ended[slot] = terminated or truncated
            image, instruction = seen["image"].copy(), seen["instruction"]
            self._digest(slot, image, instruction, reward, terminated, truncated)
        return image, instruction

    def uncounted(self) -> np.ndarray:
        """Returns (N,) bool: slots that have played all of their `seed_lists` and begun again; none without lists."""
        if self._seed_lists is None:
            return np.zeros(self.num_envs, bool)
        pairs = zip(self._episodes, self._seed_lists, strict=True)
        return np.array([started > len(seeds) for started, seeds in pairs])

    def close(self) -> None:
        """Closes the environments; a second call does nothing.

        What their own close() raises is warned of, once: all that they had to give has been read by then.
        """
        self._watchdog.close()
        faults = []
        for env in [] if self._vector.closed else self._envs:
            try:
                env.close()
            except EnvError as error:
                faults.append(str(error))
        self._vector.closed = True
        if faults:
            log.warning(
                "warning: %s; %d of %d environments did so when they were closed", faults[0], len(faults), self.num_envs
            )

    def _identity(self) -> dict[str, Any]:
        """Returns what must be the same where a state is saved and where it is loaded."""
        return {
            "format": STATE_FORMAT,
            "env_id": self.env_id,
            "seed": self.seed,
            "split": self.split,
            "first_slot": self.first_slot,
        }

    def _start(self, mask: np.ndarray, seeds: Sequence[int] | None, counted: bool = True) -> Observations:
        slots = np.flatnonzero(mask).tolist()
        if seeds is not None and len(seeds) != len(slots):
            raise EnvError(f"got {len(seeds)} seeds for {len(slots)} episodes, expected one each")
        if not slots:
            assert self.observations is not None
            return self.observations
        reset_seeds: list[int | None] = [None] * self.num_envs
        for index, slot in enumerate(slots):
            own = self._next_seed(slot) if seeds is None else int(seeds[index])
            reset_seeds[slot] = self.episode_seeds[slot] = own
            self._episodes[slot] += counted
            self._actions[slot] = []
            self._replacements[slot] = None
            self._experts[slot] = None
        before = self.observations
        seen, _ = self._vector.reset(seed=reset_seeds, options={"reset_mask": mask})
        begun = {
            slot: self._begin(slot, env.broke, seeds is None) for slot, env in enumerate(self._guarded) if env.broke
        }
        self.episode_returns = np.where(mask, 0.0, self.episode_returns)
        self.episode_lengths = np.where(mask, 0, self.episode_lengths)
        self._ended = self._ended & ~mask
        images: np.ndarray = seen["image"].copy()
        instructions = list(seen["instruction"])
        for slot, first in begun.items():
            images[slot], instructions[slot] = first["image"], first["instruction"]
        if before is not None:
            # After load_state_dict the vector env's own rows are older than ours.
            images[~mask] = before.images[~mask]
            instructions = [
                new if row else old for row, new, old in zip(mask, instructions, before.instructions, strict=True)
            ]
        for slot in slots:
            if len(self._known) < _MAX_REMEMBERED:
                self._known[instructions[slot]] = None
        self.observations = Observations(images, tuple(instructions))
        for slot in slots:
            self.memory.start(slot, images[slot])
            self.digests[slot] = str(self.episode_seeds[slot])
            self._digest(slot, images[slot], instructions[slot])
        return self.observations

    def _begin(self, slot: int, error: EnvError, may_choose: bool) -> Any:
        """Starts an episode whose reset broke in a new object, or the next one; returns what it shows."""
        while True:
            self._note(slot, error, True, 0)
            self._renew(slot)
            try:
                return self._guarded[slot].firm_reset(self.episode_seeds[slot])[0]
            except EnvBrokeError as another:
                error = another
            if may_choose and self._seed_lists is None and self.group_size == 1:
                self.episode_seeds[slot] = self._next_seed(slot)
                self._episodes[slot] += 1

    def _next_seed(self, slot: int) -> int:
        if self._seed_lists is not None:
            return int(self._seed_lists[slot][self._episodes[slot] % len(self._seed_lists[slot])])
        group = (self.first_slot + slot) // self.group_size
        return episode_seed(self.seed, self.split, group, self._episodes[slot])

    def _replacement(self, slot: int) -> str:
        assert self.observations is not None
        own = self.observations.instructions[slot]
        offered = self._envs[slot].alternative_instruction()
        if offered is not None and offered != own:
            return offered
        if self._replacements[slot] is None or self._replacements[slot] == own:
            others = [text for text in self._known if text != own]
            if not others:
                return ""
            self._replacements[slot] = others[self.episode_seeds[slot] % len(others)]
        return self._replacements[slot] or ""

    def _digest(self, slot: int, image: np.ndarray, instruction: str, *paid: Any) -> None:
        """Takes what a slot shows, and after a step (reward, terminated, truncated), into its episode's digest."""
        digest = hashlib.sha256(np.ascontiguousarray(image).data)
        said = [self.digests[slot], str(instruction), *map(float, paid)]
        said += [self._envs[slot].action_mask.tolist()] if self.gives_masks else []
        digest.update(json.dumps(said).encode())
        self.digests[slot] = digest.hexdigest()


class _SuccessInInfo(gym.Wrapper):
    """Reduces `info` to `{"success": 1, 0 or -1}` at the end of an episode, as `StepResult` has it.

    `SyncVectorEnv` merges every key of every `info` into arrays: that fails where an array changes its shape, and
    takes time for keys that nobody reads. It also loses the others' step where one raises: so with `keeps`, what the
    environment raises is kept in `broke`, and the caller is shown the last observation.
    """

    watchdog: Watchdog | None = None

    def __init__(self, env: VLMObservation, keeps: bool) -> None:
        super().__init__(env)
        self._success, self._keeps = env.success, keeps
        self._return = 0.0
        self.broke: EnvBrokeError | None = None
        self._place = [env.slot or 0, 0, 0]  # slot, seed, step
        self._last: dict[str, Any] = {"image": np.zeros(env.frame_shape, np.uint8), "instruction": ""}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        self.broke = None
        try:
            return self.firm_reset(seed)
        except EnvBrokeError as error:
            if not self._keeps:
                raise
            self.broke = error
            return self._last, {}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        try:
            return self.firm_step(action)
        except EnvBrokeError as error:
            if not self._keeps:
                raise
            self.broke = error
            return self._last, 0.0, False, False, {}

    def firm_reset(self, seed: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts an episode, and raises what the environment raises."""
        self._return, self._place[1:] = 0.0, [seed or 0, 0]
        self._last, _ = self._watched(self.env.reset, seed=seed)
        return self._last, {}

    def firm_step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Takes a step, and raises what the environment raises."""
        self._place[2] += 1
        observation, reward, terminated, truncated, info = self._watched(self.env.step, action)
        self._last = observation
        self._return += float(reward)
        if not (terminated or truncated):
            return observation, float(reward), terminated, truncated, {}
        success = self._success(self._return, terminated, info)
        return observation, float(reward), terminated, truncated, {"success": -1 if success is None else int(success)}

    def _watched(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Calls the environment while the watchdog looks."""
        dog = self.watchdog
        if dog is None:
            return call(*arguments, **named)
        try:
            dog.enter(*self._place)
            try:
                return call(*arguments, **named)
            finally:
                dog.leave()
        except HangError as error:  # it came back at that very moment
            slot, seed, step = self._place
            raise EnvBrokeError(f"an environment was late (slot {slot}, episode seed {seed}, step {step})") from error


def held_out_seeds(count: int, seed: int = 0) -> list[int]:
    """Returns the episode seeds of an evaluation, none of which a training episode has.

    Args:
        count: How many.
        seed: The run's.
    """
    return [episode_seed(seed, HELD_OUT, 0, episode) for episode in range(count)]


def validation_seeds(count: int, seed: int = 0) -> list[int]:
    """Returns the episode seeds by which a policy is selected: none is a training episode's, and none a test's.

    No training episode of any run has one of them. Of tests, the first `TEST_SEEDS` of the same run are left out; those
    of another run's seed are drawn apart, from 2^30 numbers.

    Args:
        count: How many, all different.
        seed: The run's.
    """
    tests, seeds, episode = set(held_out_seeds(TEST_SEEDS, seed)), dict[int, None](), 0
    while len(seeds) < count:
        drawn = episode_seed(seed, VALIDATION, 0, episode)
        if drawn not in tests:
            seeds[drawn] = None
        episode += 1
    return list(seeds)


def training_seeds(count: int, seed: int = 0, group_size: int = 1, part: int = 0) -> list[int]:
    """Returns the episode seeds of a data set, none of which a held-out episode has, however it is played.

    Args:
        count: How many.
        seed: The run's.
        group_size: How many episodes in a row have the same seed.
        part: Which of several data sets; each has its own seeds.
    """
    first = part * EPISODES_A_ROUND
    return [episode_seed(seed, TRAINING, number // group_size, first) for number in range(count)]


def make_env(
    env_id: str,
    num_envs: int = 1,
    *,
    seed: int = 0,
    held_out: bool = False,
    instruction: str | None = None,
    action_names: Sequence[str] | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    image_source: ImageSource = "auto",
    success_return: float | None = None,
    action_masks: bool = True,
    max_episode_steps: int | None = None,
) -> EpisodeVectorEnv:
    """Makes environments to train on, or to evaluate on.

    Args:
        env_id: A registered id, or `module:EnvId-v0` to import the plugin that registers it.
        num_envs: How many are played side by side.
        seed: The run's seed, from which each episode's follows.
        held_out: Whether the episodes are those that training never plays.
        instruction: See `make_vlm_env`, as for the others.
        action_names: See there.
        env_kwargs: See there.
        image_source: See there.
        success_return: See there.
        action_masks: See there.
        max_episode_steps: See there.

    Raises:
        EnvError: It cannot be made, or breaks the contract of `VLMObservation`.
    """
    return EpisodeVectorEnv(
        env_id,
        num_envs,
        seed=seed,
        split=HELD_OUT if held_out else TRAINING,
        instruction=instruction,
        action_names=action_names,
        env_kwargs=env_kwargs,
        image_source=image_source,
        success_return=success_return,
        action_masks=action_masks,
        max_episode_steps=max_episode_steps,
    )
