"""Waits between hosts: bounded, named, listing who is absent.

They stand on JAX's coordination service, not on a device collective: a host whose devices are stuck can still be told
apart from one that never came.
"""

import itertools
import json
import socket
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import distributed

PATIENCE = 1800.0
"""Seconds: the first host may have to read and hash a whole checkpoint meanwhile."""
_NUMBERS: Iterator[int] = itertools.count()


class HostsMissing(RuntimeError):  # noqa: N818 named as people call it
    """Some hosts did not come to a meeting in time; the message names meeting and hosts."""


def meet(name: str, seconds: float = PATIENCE) -> None:
    """Waits until all processes are here. All call it in the same order; alone it does nothing.

    Args:
        name: for the message.
        seconds: at most.

    Raises:
        HostsMissing: they did not all come.

    """
    agreed(name, None, seconds)


def from_first(name: str, value: str | None, seconds: float = PATIENCE) -> str:
    """What process 0 says, on all processes. All call it in the same order.

    Args:
        name: for the message.
        value: of process 0; what others give is not looked at.
        seconds: at most.

    Raises:
        HostsMissing: process 0 said nothing in time.

    """
    if jax.process_count() == 1:
        return value or ""
    client, key = _client(), f"wavlm_jax/{next(_NUMBERS)}/{name}"
    if jax.process_index() == 0:
        client.key_value_set(key, value or "")
        return value or ""
    try:
        return str(client.blocking_key_value_get(key, int(seconds * 1000)))
    except jax.errors.JaxRuntimeError as error:
        raise HostsMissing(
            f"{name}: process 0 did not say it within {seconds:.0f} s; look at its log, then start all hosts again"
        ) from error


def agreed(name: str, complaint: str | None, seconds: float = PATIENCE, place: str | None = None) -> str | None:
    """What went wrong on any process, told to all of them; None where nothing did.

    Args:
        name: for the message.
        complaint: of this process; None: all is well here.
        seconds: at most, for the slowest.
        place: tells this meeting from all others, where a thread comes to it; None: all processes call in one order.

    Returns:
        Alone `complaint` itself, else the complaints with their processes and hosts, the same text everywhere.

    Raises:
        HostsMissing: they did not all come.

    """
    if jax.process_count() == 1:
        return complaint
    said = told(name, complaint, seconds, place)
    return "; ".join(f"process {index} ({host}): {text}" for index, host, text in said if text is not None) or None


def told(name: str, value: Any, seconds: float = PATIENCE, place: str | None = None) -> list[tuple[int, str, Any]]:
    """What every process says, told to all of them: (process, host, value), by process.

    Args:
        name: for the message.
        value: of this process, as JSON can say it.
        seconds: at most, for the slowest.
        place: tells this meeting from all others, where a thread comes to it; None: all processes call in one order.

    Raises:
        HostsMissing: they did not all come.

    """
    if jax.process_count() == 1:
        return [(0, socket.gethostname(), value)]
    client, place = _client(), f"wavlm_jax/{next(_NUMBERS) if place is None else place}/{name}"
    client.key_value_set(f"{place}/{jax.process_index()}", json.dumps([socket.gethostname(), value]))
    try:
        client.wait_at_barrier(place, int(seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise HostsMissing(_absent(client, place, name, seconds)) from error
    return sorted((int(key.rsplit("/", 1)[1]), *json.loads(text)) for key, text in client.key_value_dir_get(place))


def _absent(client: Any, place: str, name: str, seconds: float) -> str:
    said = {int(key.rsplit("/", 1)[1]): json.loads(text) for key, text in client.key_value_dir_get(place)}
    came = {index: host for index, (host, _) in said.items()}
    missing = [str(index) for index in range(jax.process_count()) if index not in came]
    here = ", ".join(f"{index} ({host})" for index, host in sorted(came.items()))
    return (
        f"{name}: after {seconds:.0f} s {len(came)} of {jax.process_count()} processes are here ({here}); missing: "
        f"process {', '.join(missing) or 'none, but one left again'}; look at their logs, then start all hosts again"
    )


def _client() -> Any:
    """Of the coordination service; JAX has no public name for it."""
    return distributed.global_state.client
