"""Which server is asked, how, and what it may cost. Light to import."""

from dataclasses import dataclass
from typing import Literal

from manako.settings import setting

REMOTE = "remote"  # what --policy, --player and --pairs call it


@dataclass(frozen=True)
class RemoteSettings:
    """A model behind an OpenAI-compatible chat API."""

    remote_url: str = setting("https://api.openai.com/v1", "address of the API; it has /chat/completions below it")
    remote_model: str | None = setting(None, "the server's name of the model")
    remote_key: str = setting("OPENAI_API_KEY", "environment variable that holds the key, which is never a flag itself")
    remote_answers: Literal["auto", "letters", "text"] = setting(
        "auto", "letters by their top_logprobs, the answer's text, or letters where the server gives logprobs"
    )
    remote_temperature: float = setting(1.0, "of sampled answers; greedy ones are asked for at 0", ge=0, le=2)
    remote_max_tokens: int = setting(64, "tokens of an answer in text; one that is cut off there counts as cut", ge=1)
    remote_image_side: int = setting(336, "frames are scaled up by whole factors to at least so many pixels", ge=1)
    remote_image_tokens: int | None = setting(
        None, "most tokens that the server counts for a frame; by default the highest count that is published", ge=0
    )
    remote_requests: int | None = setting(1000, "most requests of this run, retries among them; none: no limit", ge=0)
    remote_cost: float | None = setting(None, "most US dollars that this run may spend", ge=0)
    remote_input_price: float | None = setting(None, "US dollars for a million tokens of prompts", ge=0)
    remote_output_price: float | None = setting(None, "US dollars for a million tokens of answers", ge=0)
    remote_concurrency: int = setting(8, "requests at a time", ge=1)
    remote_timeout: float = setting(60.0, "seconds after which a request counts as lost", gt=0)
    remote_retries: int = setting(4, "how often a request is sent again after a fault that may pass", ge=0)
    remote_cache: str = setting(
        "runs/remote-cache", "folder of answers, one file each: what is there costs nothing", is_path=True
    )
