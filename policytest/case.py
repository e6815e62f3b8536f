"""What a policy test says: endpoints, policies, steps and checks, as values.

The reader makes them (`policytest.reader`), `policytest.world` plays the steps, and the two judges,
`policytest.model` and `policytest.packets`, answer the checks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from firewall.identities.labels import LabelSet
from firewall.policy.course import Form
from firewall.policy.model import ObjectKey, PolicyObject
from firewall.policy.objects import Resource
from firewall.policy.snapshot import NamedPortRow

NODE = "node"
"""The name of the node itself in `from` and `to`: the identity `reserved:host`."""

PROTOCOLS: Mapping[str, int] = {"TCP": 6, "UDP": 17, "SCTP": 132}
"""Protocols that have ports, with their IANA numbers."""

ICMP, ICMPV6 = 1, 58
"""IANA numbers of the protocols that have types."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A workload under policy.

    `addresses` are packed; `labels` are its own ones only; `place` is line and column.
    """

    namespace: str
    name: str
    labels: LabelSet
    addresses: tuple[bytes, ...]
    ports: tuple[NamedPortRow, ...] = ()
    audit: bool = False
    place: tuple[int, int] = (1, 1)

    @property
    def title(self) -> str:
        """`namespace/name`, as checks call it."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutsideHost:
    """A host that is no endpoint. `node_labels` not None: it is another node of the cluster.

    `names` lead to its addresses, in lower case with a trailing dot.
    """

    name: str
    addresses: tuple[bytes, ...]
    node_labels: tuple[tuple[str, str], ...] | None = None
    names: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """`host:name`, as checks call it."""
        return f"host:{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Policies as they were written: `text` is what a daemon is given under the name `file`."""

    file: str
    text: str
    objects: tuple[PolicyObject, ...]
    resources: tuple[Resource, ...]


class HttpRequest(NamedTuple):
    """One request.

    `host` is what the Host field says; `headers` in the order written. `hello`: how TLS begins
    inside which it is made, None = in clear text.
    """

    method: str
    path: str
    host: str
    headers: tuple[tuple[str, str], ...] = ()
    hello: "TlsHello | None" = None

    def __str__(self) -> str:
        inside = "" if self.hello is None else f" inside {self.hello}"
        return f"{self.method} {self.path}{inside}"

    def head(self) -> bytes:
        """Return the bytes of the request: a head, no body."""
        lines = [f"{self.method} {self.path} HTTP/1.1", f"Host: {self.host}"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


class TlsHello(NamedTuple):
    """The beginning of TLS; `server_name` "" = a hello that names nobody."""

    server_name: str

    def __str__(self) -> str:
        return f"TLS to {self.server_name}" if self.server_name else "TLS without a name"

    @property
    def form(self) -> Form:
        """What the proxy makes of it."""
        return Form(tls=True, server_name=self.server_name)

    def head(self) -> bytes:
        """Return the bytes of a request to make inside, by whose answer it is known to stand."""
        return HttpRequest("GET", "/", self.server_name or "lab.example").head()


class Traffic(NamedTuple):
    """What a check sends. `icmp` set: `port` is unused; it maps a family to its message type.

    Attributes:
        text: as people write it: `80/TCP`, `icmp EchoRequest`.
        protocol: IANA number, of ICMP the one for IPv4.
        port: destination port.
        icmp: (ICMP type, ICMPv6 type), -1 = the family has none of this name.
        request: the request to make on the connection, or how to begin TLS on it.
    """

    text: str
    protocol: int
    port: int
    icmp: tuple[int, int] | None = None
    request: HttpRequest | TlsHello | None = None


class Expected(NamedTuple):
    """What a check expects; an empty text = it does not say."""

    allowed: bool
    by: str = ""
    reason: str = ""
    direction: str = ""


class Check(NamedTuple):
    """One question with the answer that is right. `matrix`: number of its table, -1 = none."""

    step: int
    source: str
    destination: str
    traffic: Traffic
    expected: Expected
    line: int
    column: int
    matrix: int = -1

    @property
    def title(self) -> str:
        """`x/a -> x/b 80/TCP GET /`, by which people and `--filter` find it."""
        request = self.traffic.request
        said = f" {request}" if request is not None else ""
        return f"{self.source} -> {self.destination} {self.traffic.text}{said}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """The frame of a truth table; its cells are checks."""

    number: int
    traffic: Traffic
    columns: tuple[str, ...]
    rows: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Changes, and what must hold after them; performed in the order of the fields.

    `labels` and `namespaces` give new values by key, None = the label goes.
    """

    name: str
    line: int
    remove: tuple[str, ...] = ()
    add: tuple[Endpoint, ...] = ()
    namespaces: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    labels: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    delete: tuple[ObjectKey, ...] = ()
    apply: tuple[Source, ...] = ()
    checks: tuple[Check, ...] = ()
    matrices: tuple[Matrix, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How the daemon is configured; the names are those of bartizan.yaml.

    `assume`: capabilities that are not enforced (so) and the model is to take for granted.
    """

    enforcement: str = "default"
    allow_localhost: str = "always"
    audit: bool = False
    cluster_name: str = "default"
    host_firewall: bool = False
    assume: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One test file.

    `node` are the packed addresses of the node that everything is on, `node_labels` its labels.
    `resolver` is the end that answers DNS for the hosts' names, "" = nobody does.
    """

    file: str
    settings: Settings
    node: tuple[bytes, ...]
    node_labels: tuple[tuple[str, str], ...]
    namespaces: Mapping[str, Mapping[str, str]]
    endpoints: tuple[Endpoint, ...]
    hosts: tuple[OutsideHost, ...]
    sources: tuple[Source, ...]
    steps: tuple[Step, ...]
    resolver: str = ""

    @property
    def model_only(self) -> str:
        """Why this case cannot be played with packets, "" = it can."""
        if self.settings.assume:
            return f"it assumes {', '.join(self.settings.assume)}, which the firewall does not do"
        return ""
