"""Listening sockets that a process has from its parent.

The agent makes a worker's listening sockets once and gives them to each process that serves as this
worker, one after another: the kernel goes on accepting connections while no process does, and they
wait. The names and descriptors stand in the environment, not on the command line, because the
command line says what a worker is, and that does not change with a number.
"""

import os
import socket
from collections.abc import Iterable, Mapping

VARIABLE = "BARTIZAN_SOCKETS"
"""`name=descriptor` each, comma separated."""


def described(sockets: Mapping[str, socket.socket]) -> str:
    """Return the value of VARIABLE for these sockets; their descriptors must be passed as well."""
    return ",".join(f"{name}={sock.fileno()}" for name, sock in sockets.items())


def inherited(environment: Mapping[str, str]) -> dict[str, socket.socket]:
    """Return the sockets that the parent left us, by name; they are not passed on to children.

    Raises:
        OSError, ValueError: the variable does not tell the truth.
    """
    found: dict[str, socket.socket] = {}
    for item in filter(None, environment.get(VARIABLE, "").split(",")):
        name, _, descriptor = item.partition("=")
        os.set_inheritable(int(descriptor), False)
        found[name] = socket.socket(fileno=int(descriptor))
    return found


def close_all(sockets: Iterable[socket.socket]) -> None:
    """Close our copies; the sockets live on in every process that has others."""
    for sock in sockets:
        sock.close()
