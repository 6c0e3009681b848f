"""Which environment is played and how it is shown: the settings of `make_vlm_env` and of `EpisodeVectorEnv`."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from manako.envs.observation import ImageSource
from manako.settings import setting


@dataclass(frozen=True)
class EnvSettings:
    """What is played; `make_vlm_env` says more about each."""

    env: str = setting("manako/GoTo-v0", "Gymnasium id, or module:EnvId-v0 for your own")
    num_envs: int = setting(32, "environments side by side", ge=1, le=2**20)
    instruction: str | None = setting(None, "replaces the env's own instruction")
    action_names: tuple[str, ...] | None = setting(None, "replace the env's own action names, one an action")
    env_kwargs: dict[str, Any] | None = setting(None, "arguments of the env's constructor")
    image_source: ImageSource = setting(
        "auto", "where the image comes from; blank: black frames, for a policy that has the text alone"
    )
    success_return: float | None = setting(None, "lowest return of a successful episode")
    max_episode_steps: int | None = setting(
        None, "steps after which an episode is truncated; by default the env's own limit, else 1000", ge=1
    )
    action_masks: bool = setting(True, "obey info['action_mask'] where the env gives one")

    @property
    def made_with(self) -> dict[str, Any] | None:
        """What a recording says of how its environment was made: `env_kwargs`, and the limit where one was given."""
        limit = {} if self.max_episode_steps is None else {"max_episode_steps": self.max_episode_steps}
        return {**(self.env_kwargs or {}), **limit} if limit else self.env_kwargs

    def options(self) -> dict[str, Any]:
        """Returns the keyword arguments of `make_vlm_env`, `check_vlm_env` and `EpisodeVectorEnv`, by their names."""
        fields = (field.name for field in dataclasses.fields(self))
        return {name: getattr(self, name) for name in fields if name not in ("env", "num_envs")}
