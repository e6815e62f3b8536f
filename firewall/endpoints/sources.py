"""Where endpoints are on this node: the node's side of the link into a network namespace (I/O).

Nothing enters the namespace. Linux gives every namespace that a link of ours leads into a small
number (RTM_GETNSID), and tells for each link with which of them its other side is
(IFLA_LINK_NETNSID). So the question "which interface leads to X" is two netlink dumps in our own
namespace, and the agent never leaves it.

The calls block for milliseconds; an event loop runs them in a thread.
"""

import os
import socket
from pathlib import Path
from typing import NamedTuple

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

NETNS_DIRECTORY = Path("/run/netns")
"""Where `ip netns add` keeps its names (iproute2 NETNS_RUN_DIR)."""

_UNKNOWN_NSID = 0xFFFFFFFF
"""RTM_GETNSID's answer for a namespace that no link of ours leads to (NETNSA_NSID_NOT_ASSIGNED)."""


class SourceError(OSError):
    """The namespace or the interface cannot be found; the message says what was looked for."""


class Interface(NamedTuple):
    """A link of the node: its name, and its index among the node's links."""

    name: str
    number: int


def netns_path(namespace: str | int) -> Path:
    """Return the file that stands for a namespace.

    Args:
        namespace: a name (`ip netns`), a path, or a pid (a number, as int or text).

    Raises:
        SourceError: a name that is no file name.
    """
    text = str(namespace)
    if text.isdecimal():
        return Path("/proc", text, "ns/net")
    if "/" in text:
        return Path(text)
    if text in ("", ".", ".."):
        raise SourceError(f"{text!r} is no name of a network namespace")
    return NETNS_DIRECTORY / text


def find_interfaces(namespace: str | int) -> tuple[Interface, ...]:
    """Return every link of this node whose other side is in the namespace, by index.

    Args:
        namespace: as in `netns_path`.

    Raises:
        SourceError: there is no such namespace, it is our own, or the kernel refuses.
    """
    path = netns_path(namespace)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(f"network namespace {namespace}: {path}: {error.strerror}") from error
    try:
        if os.path.samestat(os.fstat(descriptor), Path("/proc/thread-self/ns/net").stat()):
            raise SourceError(f"network namespace {namespace} is the node's own")
        with IPRoute() as netlink:
            # Asking for the links first makes the kernel number the namespaces behind them.
            links = list(netlink.get_links())
            number = netlink.get_netnsid(fd=descriptor)["nsid"]
    except NetlinkError as error:
        raise SourceError(f"network namespace {namespace}: {path}: {error}") from error
    finally:
        os.close(descriptor)
    if number in (None, _UNKNOWN_NSID):
        return ()
    return tuple(
        Interface(str(link.get_attr("IFLA_IFNAME")), int(link["index"]))
        for link in sorted(links, key=lambda link: int(link["index"]))
        if link.get_attr("IFLA_LINK_NETNSID") == number
    )


def find_interface(namespace: str | int) -> Interface:
    """Return the one link of this node that leads into a namespace.

    Args:
        namespace: as in `netns_path`.

    Raises:
        SourceError: as `find_interfaces`; or none or several lead there.
    """
    found = find_interfaces(namespace)
    if not found:
        raise SourceError(f"no interface of this node leads to network namespace {namespace}")
    if len(found) > 1:
        names = ", ".join(interface.name for interface in found)
        raise SourceError(
            f"several interfaces lead to network namespace {namespace}: {names}; name one"
        )
    return found[0]


def bridges() -> dict[str, str]:
    """Return the name of the bridge that each interface of this node is a port of, if it is of one.

    Raises:
        SourceError: the kernel refuses.
    """
    try:
        with IPRoute() as netlink:
            # Of this family the kernel lists ports only, and there are few beside all links.
            ports = list(netlink.get_links(family=socket.AF_BRIDGE))
            masters = {port.get_attr("IFLA_MASTER") for port in ports} - {None}
            found = [link for master in masters for link in netlink.get_links(master)]
    except NetlinkError as error:
        raise SourceError(f"bridges of this node: {error}") from error
    names = {int(link["index"]): str(link.get_attr("IFLA_IFNAME")) for link in found}
    return {
        str(port.get_attr("IFLA_IFNAME")): names[port.get_attr("IFLA_MASTER")]
        for port in ports
        if port.get_attr("IFLA_MASTER") in names
    }


def interface_named(name: str) -> Interface:
    """Return a link of this node by its name.

    Raises:
        SourceError: there is none, or the kernel refuses.
    """
    try:
        with IPRoute() as netlink:
            found = list(netlink.link_lookup(ifname=name))
    except NetlinkError as error:
        raise SourceError(f"interface {name!r}: {error}") from error
    if not found:
        raise SourceError(f"this node has no interface {name!r}")
    return Interface(name, int(found[0]))
