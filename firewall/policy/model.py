"""Policy as the operator wrote it, in one form for every format.

Each reader turns its objects into `PolicyObject`s; each rule entry of an object (one item of an
`ingress`, `egressDeny`, ... list) becomes one `PolicyEntry`. Everything after the readers
(repository, resolver, explanation, lints) knows only these types. The shape follows Cilium's own
internal form, pkg/policy/types/policyentry.go.

Missing against empty (research: Cilium's mergeL4Filter): `peers is None` = the key was missing =
every peer; `peers == ()` = present and empty, or neither peers nor ports were given = no peer at
all (the subject is isolated, nothing is allowed).
"""

from dataclasses import dataclass, field
from enum import IntEnum

from conntrack.address import Prefix
from firewall.identities.selector import Selector
from firewall.policy.verdict import TrafficDirection


class Action(IntEnum):
    """What an entry says about the traffic it matches. PASS skips to the next tier."""

    ALLOW = 1
    DENY = 2
    PASS = 3


class Tier(IntEnum):
    """Ordered groups of entries, lower first (Cilium pkg/policy/types: Admin, Normal, Baseline)."""

    ADMIN = 100
    NORMAL = 200
    BASELINE = 250


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where an entry was written: what `why`, flow records and errors point to.

    `path` is the place inside the object ("spec.ingress[0]"); `line` and `column` count from 1, 0 =
    not from a file. `labels` are the rule's labels, `io.cilium.k8s.policy.*` included, as
    "source:key=value".
    """

    kind: str
    namespace: str
    name: str
    path: str
    file: str = ""
    line: int = 0
    column: int = 0
    labels: tuple[str, ...] = ()


# --- peers: the other side of the traffic -----------------------------------------------------


@dataclass(frozen=True, slots=True)
class LabelPeer:
    """Endpoints by label; the namespace match that Cilium adds is already inside."""

    selector: Selector


@dataclass(frozen=True, slots=True)
class CidrPeer:
    """Addresses inside `prefix` and outside every `excepts`.

    Cilium: endpoints never match (their identity is no CIDR identity). `match_endpoints`: pod
    addresses match as well, as `networking.k8s.io/v1` ipBlock demands.
    """

    prefix: Prefix
    excepts: tuple[Prefix, ...] = ()
    match_endpoints: bool = False


@dataclass(frozen=True, slots=True)
class CidrGroupPeer:
    """The prefixes of CiliumCIDRGroups, by name or by the groups' labels."""

    name: str | None
    selector: Selector | None
    excepts: tuple[Prefix, ...] = ()


@dataclass(frozen=True, slots=True)
class EntityPeer:
    """One of Cilium's entities: all, world, cluster, host, ... (pkg/policy/api/entity.go)."""

    entity: str


@dataclass(frozen=True, slots=True)
class FqdnPeer:
    """Addresses that DNS answered for a name. Exactly one of the two is set."""

    match_name: str | None
    match_pattern: str | None


@dataclass(frozen=True, slots=True)
class ServicePeer:
    """The backends of Services, by name or by the services' labels."""

    name: str | None
    namespace: str
    selector: Selector | None


@dataclass(frozen=True, slots=True)
class NodePeer:
    """Nodes by label."""

    selector: Selector


Peer = LabelPeer | CidrPeer | CidrGroupPeer | EntityPeer | FqdnPeer | ServicePeer | NodePeer


# --- ports and L7 -----------------------------------------------------------------------------

ANY_PROTOCOL = 0
"""Every protocol, ICMP included (an entry without ports)."""


@dataclass(frozen=True, slots=True)
class PortRange:
    """Ports `low`..`high` inclusive, host order; 0..65535 = the whole protocol.

    `protocol` is the IANA number. For ICMP (1) and ICMPv6 (58) the "port" is the message type, as
    in Cilium's policy maps. `name` set: a named port, `low` and `high` are then 0 and the number
    comes from the subject (ingress) or the peer (egress).
    """

    protocol: int
    low: int = 0
    high: int = 65535
    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HeaderMatch:
    """One `headerMatches` item. `mismatch`: "" (fail), LOG, ADD, DELETE, REPLACE."""

    name: str
    mismatch: str = ""
    value: str | None = None
    secret_namespace: str | None = None
    secret_name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpRule:
    """One http item: all given fields must match; None = any.

    `path`, `method`, `host` are RE2, matched against the whole string, case-sensitive; `path` is
    matched with the query string, `host` with the port if one was sent. `headers` holds Cilium's
    raw strings: "Name: value" = exact value, no space = must be present.
    """

    method: str | None = None
    path: str | None = None
    host: str | None = None
    headers: tuple[str, ...] = ()
    header_matches: tuple[HeaderMatch, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DnsRule:
    """One dns item; exactly one of the two is set."""

    match_name: str | None = None
    match_pattern: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class L7Rules:
    """The `rules` of a port, `kind` "http" or "dns"; empty = all, through the proxy."""

    kind: str
    http: tuple[HttpRule, ...] = ()
    dns: tuple[DnsRule, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsContext:
    """`terminatingTLS` / `originatingTLS`: a secret and the names of its parts."""

    secret_namespace: str
    secret_name: str
    trusted_ca: str = ""
    certificate: str = ""
    private_key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A custom listener to redirect to; lower `priority` wins."""

    config_kind: str
    config_name: str
    name: str
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyEntry:
    """One rule entry for one direction: who is meant, which peers, which ports, what then.

    `subject_is_node`: `subject` selects nodes (host policy), not endpoints. `ports is None` = every
    port and protocol. `default_deny`: whether this entry isolates the subject in its direction.
    `authentication`: "", "disabled", "required", "test-always-fail".
    """

    origin: Origin
    direction: TrafficDirection
    action: Action
    subject: Selector
    subject_is_node: bool = False
    tier: int = Tier.NORMAL
    priority: float = 0.0
    peers: tuple[Peer, ...] | None
    ports: tuple[PortRange, ...] | None
    l7: L7Rules | None = None
    server_names: tuple[str, ...] = ()
    terminating_tls: TlsContext | None = None
    originating_tls: TlsContext | None = None
    listener: Listener | None = None
    authentication: str = ""
    default_deny: bool = True
    log: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectKey:
    """What makes a policy object the same object: applying an equal key replaces it."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        """Render as `Kind/namespace/name`, or `Kind/name` for cluster-wide kinds."""
        return "/".join(part for part in (self.kind, self.namespace, self.name) if part)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyObject:
    """One accepted document. `document` is the mapping as read, for `policy get`."""

    key: ObjectKey
    labels: tuple[str, ...] = ()
    entries: tuple[PolicyEntry, ...] = ()
    document: dict[str, object] = field(default_factory=dict, hash=False, compare=False)
    file: str = ""
