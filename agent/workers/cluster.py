"""The Ray cluster: how to get at one, a client for its jobs, what it has, and what its errors say."""

import contextlib
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import manako
from manako.agent.errors import WorkersError
from manako.agent.workers.head import HeadWatch
from manako.errors import ManakoError, first_line


@contextlib.contextmanager
def cluster(address: str | None = None, paths: Sequence[str] = (), num_cpus: int | None = None) -> Iterator[None]:
    """Connects to the Ray cluster at `address`, else to that of RAY_ADDRESS, else to one of our own.

    One of our own has no dashboard, sends no usage statistics and ends with the block.

    Args:
        address: host:port of a head, `auto` for the cluster that runs on this machine, `local` for one of our own.
        paths: folders from which workers import, after those of PYTHONPATH and before that of `manako`. In a checkout
            the latter holds `envs`, `agent` and so on too, and those of the user go first.
        num_cpus: CPU cores that a cluster of our own counts; by default those of the machine.

    Raises:
        WorkersError: nobody answers.
    """
    prepare_environment()
    import ray

    if ray.is_initialized():  # somebody else's session: used, and left as it is
        yield
        return
    own = address == "local" or (address is None and not os.environ.get("RAY_ADDRESS"))
    if address is not None:
        check_address(address)
    inherited = os.environ.get("PYTHONPATH")
    home = str(Path(manako.__file__).resolve().parents[1])
    path = os.pathsep.join([*([inherited] if inherited else []), *paths, home])
    # A cluster of our own inherits this process' environment; elsewhere the runtime environment brings it.
    runtime = None if own or in_job() else {"env_vars": {"PYTHONPATH": path}}
    if own:
        os.environ["PYTHONPATH"] = path
    try:
        ray.init(
            address="local" if own else address,  # without it Ray joins whatever runs on this machine
            include_dashboard=False if own else None,
            num_cpus=num_cpus if own else None,
            logging_level=logging.ERROR,
            log_to_driver=False,
            runtime_env=runtime,
        )
    except Exception as error:  # Ray raises a bare Exception where its own processes do not start in its 30 s
        reason = reason_of(error)
        with contextlib.suppress(Exception):  # what of it did start
            ray.shutdown()
        if own:
            _restore("PYTHONPATH", inherited)
            raise WorkersError(
                f"Ray did not start on this machine ({reason}): expected room for its processes, so end others or try "
                "again, give --ray_address of a cluster that runs, or --rollout_backend local."
            ) from error
        where = address or os.environ.get("RAY_ADDRESS") or "this machine"
        raise WorkersError(
            f"No Ray cluster at {where!r} ({reason}): start one or give another --ray_address."
        ) from error
    watch = HeadWatch(own)
    try:
        with watch:
            yield
    finally:
        if watch.lost is None:
            ray.shutdown()
        if own:
            _restore("PYTHONPATH", inherited)


def _restore(name: str, value: str | None) -> None:
    """Sets an environment variable back to what it was, or was not."""
    os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value


def prepare_environment() -> None:
    """Sets what Ray reads when it is imported: no usage statistics, and the token of this user where there is one.

    Answers up to 1 MiB (a step's frames) come with the reply and not by shared memory, which is slower for them.
    """
    os.environ.setdefault("RAY_max_direct_call_object_size", str(1 << 20))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    token = os.environ.get("RAY_AUTH_TOKEN_PATH", os.path.expanduser("~/.ray/auth_token"))
    if "RAY_AUTH_TOKEN" in os.environ or os.path.isfile(token):
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def in_job() -> bool:
    """Returns whether this process was started by `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def job_client(address: str | None) -> Any:
    """Returns Ray's JobSubmissionClient for the cluster whose dashboard is at `address`.

    Raises:
        WorkersError: nobody answers.
    """
    prepare_environment()
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        reason = reason_of(error)
        raise WorkersError(
            f"No Ray dashboard at {address or 'http://127.0.0.1:8265'!r} ({reason}): expected the address that "
            "`ray start --head` prints, such as http://127.0.0.1:8265, and RAY_AUTH_MODE=token with its token where "
            "the cluster wants one."
        ) from error


def check_address(address: str) -> None:
    """Knocks at an address before ray.init does, which waits for a minute where nobody answers.

    Raises:
        WorkersError: it is no host:port, or nobody answers.
    """
    if address in ("auto", "local"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        raise WorkersError(f"--ray_address is {address!r}: expected host:port, or auto for a cluster on this machine.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise WorkersError(
            f"Nobody answers at --ray_address {address!r} ({error.strerror or error}): start a cluster there with `ray "
            "start --head`, or give another address."
        ) from error


def resources() -> str:
    """Returns what the cluster has and what of it is free, in words."""
    import ray

    has, free = ray.cluster_resources(), ray.available_resources()
    parts = [f"{has.get(name, 0):g} {name} ({free.get(name, 0):g} free)" for name in ("CPU", "GPU")]
    return " and ".join(parts)


def is_anything_held() -> bool:
    """Returns whether some of the cluster's CPUs have been given to somebody, such as to a worker that starts."""
    import ray

    return float(ray.available_resources().get("CPU", 0)) < float(ray.cluster_resources().get("CPU", 0))


def reason_of(why: BaseException | str) -> str:
    """Returns why something failed, in one line: a text or our sentence as it is, another error with its type."""
    from ray.exceptions import RayError

    if isinstance(why, str):
        return why
    if not isinstance(why, RayError):
        line = first_line(why, longest=None)
        return line if isinstance(why, ManakoError) else f"{type(why).__name__}: {line}"
    # Ray's errors go on for lines, and end with the cause where a constructor failed
    lines = [line.strip() for line in str(why).splitlines() if line.strip()] or [type(why).__name__]
    return lines[-1 if "creation task" in lines[0] else 0].rstrip(".")
