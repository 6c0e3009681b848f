"""From an environment id to a `VLMObservation`, with one clear sentence for whatever can go wrong on the way.

A plugin is a module that calls `gymnasium.register` when it is imported, named `module:EnvId-v0`. The module may
lie in the current folder. There is no registry beside Gymnasium's.
"""

import contextlib
import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
from gymnasium.envs.registration import load_env_creator

from manako.envs.errors import EnvError
from manako.envs.guard import pass_ours
from manako.envs.limits import limited
from manako.envs.observation import ImageSource, VLMObservation, missing_package
from manako.errors import type_and_text

# id prefix -> (module that registers such ids, extra that installs it)
_BUNDLED = {
    "MiniGrid-": ("minigrid", "minigrid"),
    "BabyAI-": ("minigrid", "minigrid"),
    "ALE/": ("ale_py", "atari"),
}


def make_vlm_env(
    env_id: str,
    *,
    instruction: str | None = None,
    action_names: Sequence[str] | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    image_source: ImageSource = "auto",
    success_return: float | None = None,
    action_masks: bool = True,
    max_episode_steps: int | None = None,
) -> VLMObservation:
    """Makes an environment that shows an image and an instruction.

    Args:
        env_id: A registered id, or `module:EnvId-v0` to import the plugin that registers it.
        instruction: Replaces the environment's own.
        action_names: Replace the environment's own, one an action.
        env_kwargs: Arguments of the environment's constructor, such as `{"size": 4}` or `{"tile_size": 8}`, or of
            `gymnasium.make`, such as `{"max_episode_steps": 50}`.
        image_source: "observation", "render", or "auto" (the observation where it is a picture, else `render()`), or
            "blank", black frames of that size.
        success_return: The lowest return of a successful episode; replaces the environment's own verdict.
        action_masks: Obey `info["action_mask"]` where the environment gives one.
        max_episode_steps: See `make_raw_env`.

    Raises:
        EnvError: It cannot be made, or breaks the contract of `VLMObservation`.
    """
    env = make_raw_env(env_id, env_kwargs, max_episode_steps)
    try:
        return VLMObservation(
            env,
            instruction=instruction,
            action_names=action_names,
            image_source=image_source,
            success_return=success_return,
            action_masks=action_masks,
        )
    except BaseException as error:
        pass_ours(error)
        with contextlib.suppress(Exception):  # an error in close() would hide the one that matters
            env.close()
        if isinstance(error, EnvError):
            raise
        raise EnvError(
            f"{env_id} broke while it was asked for its actions, image and text: {type_and_text(error)}"
        ) from error


def make_raw_env(
    env_id: str, env_kwargs: Mapping[str, Any] | None = None, max_episode_steps: int | None = None
) -> gym.Env:
    """Makes the environment as it is, rendering to arrays where it can, with an end to each of its episodes.

    Args:
        env_id: See `make_vlm_env`.
        env_kwargs: See there.
        max_episode_steps: After so many steps an episode is truncated. None leaves the limit that the environment is
            registered with, or wrapped in; one without is given a limit, see `envs/limits.py`.

    Raises:
        EnvError: Its plugin cannot be imported, it is not registered, or its constructor refuses.
    """
    spec = find_spec(env_id)
    kwargs = dict(env_kwargs or {})
    if "render_mode" in kwargs:
        raise EnvError(f"env_kwargs for {env_id} has a render_mode, which is always rgb_array here: leave it out")
    if max_episode_steps is not None and kwargs.setdefault("max_episode_steps", max_episode_steps) != max_episode_steps:
        raise EnvError(
            f"env_kwargs for {env_id} has max_episode_steps {kwargs['max_episode_steps']}, and max_episode_steps is "
            f"{max_episode_steps}: leave one of them out"
        )
    try:
        if _renders_arrays(spec):
            kwargs["render_mode"] = "rgb_array"
        # The contract is checked by VLMObservation at each step, and in full by envs.check.
        return limited(gym.make(spec, disable_env_checker=True, **kwargs))
    except gym.error.DependencyNotInstalled as error:
        raise EnvError(f"{env_id} needs a package that is not installed: {missing_package(error)}") from error
    except BaseException as error:
        pass_ours(error)
        given = {key: value for key, value in kwargs.items() if key != "render_mode"}
        if isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
            name = str(error).split("unexpected keyword argument ")[1].split("'")[1]
            if name == "render_mode":
                raise EnvError(
                    f"{env_id} declares the render mode 'rgb_array', and its constructor takes no render_mode: add the "
                    "argument and set self.render_mode"
                ) from error
            raise EnvError(f"{env_id} takes no argument {name!r}: got env_kwargs {given}") from error
        message = type_and_text(error).split(" was raised from the environment creator for ")[0]
        raise EnvError(f"{env_id} could not be made with env_kwargs {given}: {message}") from error


def find_spec(env_id: str) -> gym.envs.registration.EnvSpec:
    """Looks an id up in Gymnasium's registry, importing the plugin that it names.

    Raises:
        EnvError: The id is malformed or unknown, or its plugin cannot be imported.
    """
    module_name, _, name = env_id.rpartition(":")
    if module_name:
        module = _import_plugin(module_name)
        origin = f"the module {module_name!r} ({getattr(module, '__file__', None) or 'a folder without __init__.py'})"
    else:
        origin = "Gymnasium's registry"
        for prefix, (package, extra) in _BUNDLED.items():
            if name.startswith(prefix):
                _import_bundled(name, package, extra)
    if name in gym.registry:
        return gym.registry[name]
    close = difflib.get_close_matches(name, list(gym.registry), n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(close)}?" if close else "a plugin's id is written module:EnvId-v0"
    raise EnvError(f"no environment {name!r} in {origin}: {hint}")


def _renders_arrays(spec: gym.envs.registration.EnvSpec) -> bool:
    if spec.entry_point is None:
        raise EnvError(f"{spec.id} is registered without an entry_point, so it cannot be made")
    creator = spec.entry_point if callable(spec.entry_point) else load_env_creator(spec.entry_point)
    metadata = getattr(creator, "metadata", None)
    if isinstance(metadata, Mapping):
        return "rgb_array" in (metadata.get("render_modes") or ())
    # A function that makes the environment: it declares nothing, but it may take the argument.
    parameters = inspect.signature(creator).parameters.values()
    return any(p.name == "render_mode" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _import_plugin(name: str) -> Any:
    folder = os.getcwd()
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise EnvError(
                f"there is no module {name!r} in {folder} or among the installed packages: start in the folder that "
                "holds it, or install it"
            ) from error
        raise EnvError(f"the plugin {name!r} needs the module {error.name!r}, which is not installed") from error
    except BaseException as error:
        pass_ours(error)
        raise EnvError(f"the plugin {name!r} broke while it was imported: {type_and_text(error)}") from error


def _import_bundled(env_id: str, package: str, extra: str) -> None:
    try:
        gym.register_envs(importlib.import_module(package))
    except ImportError as error:
        raise EnvError(
            f'{env_id} needs {package}, which could not be imported ({error}): pip install "manako[{extra}]"'
        ) from error
