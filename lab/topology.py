"""What a lab consists of, and the YAML that people write for it.

    name: two
    node: {addresses: [10.0.0.1, "fd00::1"]}     # optional
    resolver: 203.0.113.53                       # optional: whom hosts ask for other names
    hosts:
      client: {}                                 # an address each from 10.0.1.0/24, fd00:0:0:1::/64
      server:
        namespace: default                       # of the endpoint, not of the kernel
        labels: {app: server}
        addresses: [10.0.1.7, "fd00:0:0:1::7"]
        ports: [{name: http, port: 80, protocol: TCP}]
        names: [server.example]                  # besides server.default.svc.cluster.local etc.
        processes: [[python3, -m, http.server, "80"]]
        managed: true                            # false: no endpoint, the world outside
        link: {mtu: 1500}

The reader says every problem that it finds, each with file, line and column.
"""

import re
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from conntrack.address import why_unusable
from firewall.agent.declaration import parse_labels
from firewall.identities.labels import LabelError

V = TypeVar("V")

DEFAULT_MTU_BYTES = 1500
"""Ethernet's, RFC 894."""

NODE = "node"
"""The name of the machine that hosts are linked to; no host can have it."""

_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
"""A DNS label (RFC 1123 section 2.1), as Kubernetes asks of names of pods and namespaces."""

_MAX_HOSTS = 250
_PROTOCOLS = ("TCP", "UDP", "SCTP")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that a person must correct; `str()` is `file:line:column: path: message`."""

    file: str
    line: int
    column: int
    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}: {self.path or '.'}: {self.message}"


class TopologyError(ValueError):
    """The file describes no lab; `problems` says everything that is wrong with it."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("\n".join(map(str, problems)))
        self.problems = problems


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedPort:
    """A port that policies may call by name."""

    name: str
    port: int
    protocol: str = "TCP"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPlan:
    """One host: a namespace with one link to the node. Empty addresses = assigned by the lab."""

    name: str
    namespace: str = "default"
    labels: Mapping[str, str] = field(default_factory=dict)
    addresses: tuple[str, ...] = ()
    ports: tuple[NamedPort, ...] = ()
    names: tuple[str, ...] = ()
    processes: tuple[tuple[str, ...], ...] = ()
    managed: bool = True
    mtu_bytes: int = DEFAULT_MTU_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """A whole lab. Every host has at least one address; no two have the same one."""

    name: str = "lab"
    node_addresses: tuple[str, ...] = ("10.0.0.1", "fd00::1")
    resolver: str = ""
    hosts: tuple[HostPlan, ...] = ()


def hosts(**labels: str) -> Topology:
    """A topology in one line: `hosts(a="app=a", b="app=b,tier=db")`, addresses assigned."""
    plans = []
    for name, text in labels.items():
        pairs = dict(pair.split("=", 1) for pair in text.split(",") if pair)
        plans.append(HostPlan(name=name, labels=pairs))
    return assigned(Topology(hosts=tuple(plans)))


def assigned(topology: Topology) -> Topology:
    """The topology with an address of each family where none is given.

    The Nth host gets 10.0.1.N and fd00:0:0:1::N, or the next ones that nobody has.
    """
    given = (*topology.node_addresses, *(a for plan in topology.hosts for a in plan.addresses))
    taken = {socket.inet_pton(family(address), address) for address in given}
    plans = []
    for number, plan in enumerate(topology.hosts, start=1):
        while not plan.addresses:
            pair = _pair(number)
            packed = {socket.inet_pton(family(address), address) for address in pair}
            if taken.isdisjoint(packed):
                plan = replace(plan, addresses=pair)  # noqa: PLW2901 (the same host)
                taken |= packed
            number += len(topology.hosts)  # noqa: PLW2901 (past every host's own number)
        plans.append(plan)
    return replace(topology, hosts=tuple(plans))


def _pair(number: int) -> tuple[str, str]:
    """The addresses of the host with this number, from 1."""
    third, fourth = divmod(number - 1, _MAX_HOSTS)
    return f"10.0.{1 + third}.{1 + fourth}", f"fd00:0:0:1::{number:x}"


def family(address: str) -> int:
    """AF_INET or AF_INET6 of an address in text; raises ValueError for anything else."""
    for candidate in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(candidate, address)
        except OSError:
            continue
        return candidate
    raise ValueError(f"{address!r} is not an IP address")


def read(path: Path) -> Topology:
    """Read a topology file.

    Raises:
        OSError: the file cannot be read.
        TopologyError: it describes no lab.
    """
    return parse(path.read_text(encoding="utf-8"), str(path))


def parse(text: str, file: str = "<text>") -> Topology:
    """Read a topology from YAML text; `file` is the name that problems carry.

    Raises:
        TopologyError: it describes no lab.
    """
    reader = _Reader(file)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        message = error.problem or str(error)
        problem = Problem(file=file, line=line, column=column, path="", message=message)
        raise TopologyError([problem]) from error
    except yaml.YAMLError as error:
        problem = Problem(file=file, line=1, column=1, path="", message=str(error))
        raise TopologyError([problem]) from error
    except RecursionError:
        problem = Problem(file=file, line=1, column=1, path="", message="nested too deep")
        raise TopologyError([problem]) from None
    topology = reader.topology(root) if root else None
    if root is None:
        reader.problems.append(Problem(file=file, line=1, column=1, path="", message="empty file"))
    if reader.problems or topology is None:
        raise TopologyError(reader.problems)
    return assigned(topology)


class _Reader:
    """Turns YAML nodes into values; notes what is wrong, and goes on."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self._addresses: dict[bytes, str] = {}

    def wrong(self, node: yaml.Node, path: str, message: str) -> None:
        mark = node.start_mark
        self.problems.append(
            Problem(
                file=self.file,
                line=mark.line + 1,
                column=mark.column + 1,
                path=path,
                message=message,
            )
        )

    # --- shapes -------------------------------------------------------------------------------

    def fields(
        self, node: yaml.Node, path: str, known: tuple[str, ...] | None
    ) -> dict[str, yaml.Node]:
        """The members of a mapping; `known` None = any key."""
        if not isinstance(node, yaml.MappingNode):
            if not _is_null(node):
                self.wrong(node, path, f"expected a mapping, found {_shape(node)}")
            return {}
        members: dict[str, yaml.Node] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is None:
                self.wrong(key, path, "a key must be a plain word")
            elif name in members:
                self.wrong(key, _join(path, name), "is given twice")
            elif known is not None and name not in known:
                self.wrong(key, _join(path, name), f"unknown field (known: {', '.join(known)})")
            else:
                members[name] = value
        return members

    def items(self, node: yaml.Node, path: str) -> Iterator[tuple[yaml.Node, str]]:
        if not isinstance(node, yaml.SequenceNode):
            self.wrong(node, path, f"expected a list, found {_shape(node)}")
            return
        for number, item in enumerate(node.value):
            yield item, f"{path}[{number}]"

    def text(self, node: yaml.Node, path: str) -> str:
        if not isinstance(node, yaml.ScalarNode):
            self.wrong(node, path, f"expected a word, found {_shape(node)}")
            return ""
        return str(node.value)

    def checked(self, node: yaml.Node, path: str, accept: Callable[[str], V], default: V) -> V:
        """The scalar as `accept` reads it; its ValueError becomes a problem."""
        before = len(self.problems)
        value = self.text(node, path)
        if len(self.problems) > before:
            return default
        try:
            return accept(value)
        except ValueError as error:
            self.wrong(node, path, str(error))
            return default

    # --- meanings -----------------------------------------------------------------------------

    def topology(self, node: yaml.Node) -> Topology:
        members = self.fields(node, "", ("name", "node", "resolver", "hosts"))
        values: dict[str, Any] = {}
        if "name" in members:
            values["name"] = self.checked(members["name"], "name", _name, "lab")
        if "node" in members:
            inner = self.fields(members["node"], "node", ("addresses",))
            if "addresses" in inner:
                values["node_addresses"] = self.addresses(inner["addresses"], "node.addresses")
        if "resolver" in members:
            values["resolver"] = self.checked(members["resolver"], "resolver", _address, "")
        plans = []
        if "hosts" not in members:
            self.wrong(node, "hosts", "is missing")
        else:
            for name, inner_node in self.fields(members["hosts"], "hosts", None).items():
                plans.append(self.host(inner_node, name))
            if len(plans) > _MAX_HOSTS:
                self.wrong(members["hosts"], "hosts", f"more than {_MAX_HOSTS} hosts")
        return Topology(hosts=tuple(plans), **values)

    def host(self, node: yaml.Node, name: str) -> HostPlan:
        path = _join("hosts", name)
        try:
            _name(name)
        except ValueError as error:
            self.wrong(node, path, str(error))
        if name == NODE:
            self.wrong(node, path, "is the name of the lab's own node; choose another")
        known = (
            "namespace", "labels", "addresses", "ports", "names", "processes", "managed", "link",
        )  # fmt: skip
        members = self.fields(node, path, known)
        values: dict[str, Any] = {}
        for field_name, inner in members.items():
            inner_path = _join(path, field_name)
            match field_name:
                case "namespace":
                    values["namespace"] = self.checked(inner, inner_path, _name, "default")
                case "labels":
                    values["labels"] = self.labels(inner, inner_path)
                case "addresses":
                    values["addresses"] = self.addresses(inner, inner_path)
                case "ports":
                    values["ports"] = tuple(
                        self.port(item, at) for item, at in self.items(inner, inner_path)
                    )
                case "names":
                    values["names"] = tuple(
                        self.checked(item, at, _host_name, "")
                        for item, at in self.items(inner, inner_path)
                    )
                case "processes":
                    values["processes"] = tuple(
                        self.process(item, at) for item, at in self.items(inner, inner_path)
                    )
                case "managed":
                    values["managed"] = self.checked(inner, inner_path, _truth, True)
                case _:
                    link = self.fields(inner, inner_path, ("mtu",))
                    if "mtu" in link:
                        values["mtu_bytes"] = self.checked(
                            link["mtu"], _join(inner_path, "mtu"), _mtu, DEFAULT_MTU_BYTES
                        )
        return HostPlan(name=name, **values)

    def process(self, node: yaml.Node, path: str) -> tuple[str, ...]:
        words = tuple(self.checked(item, at, _word, "") for item, at in self.items(node, path))
        if not words and isinstance(node, yaml.SequenceNode):
            self.wrong(node, path, "is empty; a process is a program and its arguments")
        return words

    def labels(self, node: yaml.Node, path: str) -> dict[str, str]:
        """Labels as a mapping, or as a list of `key=value`."""
        texts: list[tuple[yaml.Node, str, str]] = []
        if isinstance(node, yaml.SequenceNode):
            texts = [(item, at, self.text(item, at)) for item, at in self.items(node, path)]
        else:
            for key, value in self.fields(node, path, None).items():
                at = _join(path, key)
                # A label without a value has the empty one, as Kubernetes reads null.
                texts.append(
                    (value, at, f"{key}={'' if _is_null(value) else self.text(value, at)}")
                )
        pairs: dict[str, str] = {}
        for item, at, text in texts:
            try:
                parse_labels([text])
            except LabelError as error:
                self.wrong(item, at, str(error))
            name, _, wanted = text.partition("=")
            pairs[name] = wanted
        return pairs

    def addresses(self, node: yaml.Node, path: str) -> tuple[str, ...]:
        found = []
        for item, at in self.items(node, path):
            text = self.checked(item, at, _address, "")
            if not text:
                continue
            packed = socket.inet_pton(family(text), text)
            if packed in self._addresses:
                self.wrong(item, at, f"{text} is also {self._addresses[packed]}")
            else:
                self._addresses[packed] = at
                found.append(text)
        return tuple(found)

    def port(self, node: yaml.Node, path: str) -> NamedPort:
        members = self.fields(node, path, ("name", "port", "protocol"))
        for needed in ("name", "port"):
            if needed not in members:
                self.wrong(node, _join(path, needed), "is missing")
                return NamedPort(name="", port=0)
        protocol = "TCP"
        if "protocol" in members:
            protocol = self.checked(
                members["protocol"], _join(path, "protocol"), _protocol, protocol
            )
        return NamedPort(
            name=self.text(members["name"], _join(path, "name")),
            port=self.checked(members["port"], _join(path, "port"), _port, 0),
            protocol=protocol,
        )


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _shape(node: yaml.Node) -> str:
    match node:
        case yaml.MappingNode():
            return "a mapping"
        case yaml.SequenceNode():
            return "a list"
        case _:
            return f"{node.value!r}"


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError(f"{text!r} is not a name: lower case letters, digits and '-', at most 63")
    return text


def _host_name(text: str) -> str:
    if not all(_NAME.fullmatch(part) for part in text.lower().split(".")):
        raise ValueError(f"{text!r} is not a host name")
    return text


def _address(text: str) -> str:
    reason = why_unusable(socket.inet_pton(family(text), text))
    if reason:
        raise ValueError(f"{text} {reason}: no host can have it")
    return text


def _number(text: str, lowest: int, highest: int) -> int:
    if not text.isdecimal() or not lowest <= int(text) <= highest:
        raise ValueError(f"{text!r} is not a number from {lowest} to {highest}")
    return int(text)


def _port(text: str) -> int:
    return _number(text, 1, 65535)


def _mtu(text: str) -> int:
    # 1280: the least that IPv6 works with (RFC 8200 section 5); 65535: veth's most.
    return _number(text, 1280, 65535)


def _protocol(text: str) -> str:
    if text.upper() not in _PROTOCOLS:
        raise ValueError(f"{text!r} is not one of {', '.join(_PROTOCOLS)}")
    return text.upper()


def _word(text: str) -> str:
    if "\0" in text:
        raise ValueError("holds a NUL, which no argument can")
    return text


def _truth(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{text!r} is not true or false")
    return text == "true"
