"""A port for the ranks of a run on this machine to meet at.

The batch script does the same in bash, see ``rendezvous.j2``.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
from collections.abc import Iterator
from pathlib import Path

_NAMESPACE = Path("/proc/self/ns/net")
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


class PortTakenError(Exception):
    """The port that the user asked for is in use."""


@contextlib.contextmanager
def rendezvous_port(wanted: int, *, keep: bool, seed: int) -> Iterator[int]:
    """A port that is free now, while the caller is in the context.

    Args:
        wanted: taken when it is free.
        keep: whether `wanted` is the user's own and no other will do.
        seed: where to look for another; runs that differ in it look in different places.

    Raises:
        PortTakenError: `keep`, and `wanted` is taken.
    """
    if keep:
        if not is_free(wanted):
            raise PortTakenError(f"HL_MASTER_PORT={wanted} is taken on {socket.gethostname()}")
        yield wanted
        return
    with _first_here() as first:
        if first and is_free(wanted):
            yield wanted
        else:
            yield next(port for port in _others(seed) if port != wanted and is_free(port))


@contextlib.contextmanager
def _first_here() -> Iterator[bool]:
    """Whether no other run of ours claims this machine's default port.

    Between the probe and the first rank's bind lie seconds of imports, in which a second run
    would find the port free too; a lock on the network namespace, held until the run ends, tells
    them apart, whoever's they are.
    """
    with contextlib.ExitStack() as stack:
        try:
            namespace = stack.enter_context(_NAMESPACE.open())
            fcntl.flock(namespace, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def is_free(port: int) -> bool:
    """Whether this machine lets a server listen on `port`."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except OSError:
        return False
    return True


def _others(seed: int) -> Iterator[int]:
    """Ports from 10000 on that the kernel does not hand out by itself, from one on by `seed`."""
    try:
        low, high = (int(word) for word in _EPHEMERAL.read_text(encoding="ascii").split())
    except OSError:
        low, high = 32768, 60999
    ports = [*range(10000, low), *range(high + 1, 65536)] or list(range(10000, 65536))
    for offset in range(len(ports)):
        yield ports[(seed * 7 + offset) % len(ports)]
