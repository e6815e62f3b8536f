"""The snapshot: the one value by which policy crosses a process border.

Immutable and versioned, written once by the agent and read by every worker. Rules are in terms
of selectors, and for each identity the selectors that it matches, so that no
identity x rule x endpoint product exists anywhere. `firewall.policy.view` answers from it.

`firewall.policy.snapshot_file` says how it lies on disk, `firewall.policy.difference` how the next
one follows from it.
"""

import msgspec

ANY_SELECTOR = 0
"""The selector that every peer matches, unknown ones too."""


class SnapshotError(ValueError):
    """The bytes are not a snapshot that this version can use; the text says why."""


class OriginRow(msgspec.Struct, frozen=True, array_like=True):
    """Where a rule was written; the wire form of `model.Origin`."""

    kind: str
    namespace: str
    name: str
    path: str
    file: str = ""
    line: int = 0
    column: int = 0
    labels: tuple[str, ...] = ()


class HeaderMatchRow(msgspec.Struct, frozen=True, array_like=True):
    """Wire form of `model.HeaderMatch`; secrets are read from files by the proxy."""

    name: str
    mismatch: str = ""
    value: str | None = None
    secret_namespace: str | None = None
    secret_name: str | None = None


class HttpRuleRow(msgspec.Struct, frozen=True, array_like=True):
    """Wire form of `model.HttpRule`: None or empty = any."""

    method: str | None = None
    path: str | None = None
    host: str | None = None
    headers: tuple[str, ...] = ()
    header_matches: tuple[HeaderMatchRow, ...] = ()


class DnsRuleRow(msgspec.Struct, frozen=True, array_like=True):
    """Wire form of `model.DnsRule`."""

    match_name: str | None = None
    match_pattern: str | None = None


class TlsContextRow(msgspec.Struct, frozen=True, array_like=True):
    """Wire form of `model.TlsContext`; the proxy reads the secret's files."""

    secret_namespace: str
    secret_name: str
    trusted_ca: str = ""
    certificate: str = ""
    private_key: str = ""


class ListenerRow(msgspec.Struct, frozen=True, array_like=True):
    """Wire form of `model.Listener`."""

    config_kind: str
    config_name: str
    name: str
    priority: int = 0


class L7Row(msgspec.Struct, frozen=True, array_like=True):
    """The L7 part of an entry, `kind` "http", "dns", "tls" or "listener".

    "tls": only server names or TLS contexts. "listener": only a custom listener. `http` and `dns`
    are never both empty in a row of their kind: an empty list in the policy is one item without
    fields, or the pattern "*". `server_names` hold for "http" rows with a terminating context too.
    """

    kind: str
    http: tuple[HttpRuleRow, ...] = ()
    dns: tuple[DnsRuleRow, ...] = ()
    server_names: tuple[str, ...] = ()
    terminating_tls: TlsContextRow | None = None
    originating_tls: TlsContextRow | None = None
    listener: ListenerRow | None = None


class EntryRow(msgspec.Struct, frozen=True, array_like=True):
    """One policy-map entry.

    `action` is `model.Action`; `selector` indexes nothing: it is a selector number, 0 = any peer.
    `protocol` 0 = any; ports inclusive, host order, ICMP types for ICMP. `port_name` set: the
    numbers come from the named ports of the subject (ingress) or the peer (egress). `l7` and
    `origin` index the snapshot's tables, `l7` -1 = none. `observe`: the L7 rules only watch, they
    refuse nothing (Cilium's enableDefaultDeny false).
    """

    action: int
    tier: int
    priority: float
    selector: int
    protocol: int
    port_low: int
    port_high: int
    port_name: str
    l7: int
    origin: int
    authentication: str = ""
    log: str = ""
    observe: bool = False


class DirectionRow(msgspec.Struct, frozen=True, array_like=True):
    """The policy of one identity in one direction.

    `enforced` False: everything is allowed, the map is not consulted. `default_deny`: what happens
    when no entry decides. `isolated_by` indexes the origins that switched default deny on.
    """

    enforced: bool
    default_deny: bool
    entries: tuple[EntryRow, ...] = ()
    isolated_by: tuple[int, ...] = ()


class PolicyRow(msgspec.Struct, frozen=True, array_like=True):
    """Both directions of the policy that every endpoint with this identity shares."""

    identity: int
    ingress: DirectionRow
    egress: DirectionRow


class NamedPortRow(msgspec.Struct, frozen=True, array_like=True):
    """A container port with a name; `protocol` is the IANA number."""

    name: str
    protocol: int
    port: int


class IdentityRow(msgspec.Struct, frozen=True, array_like=True):
    """A known identity: its labels and the numbers of the selectors it matches, ascending.

    `named_ports` is the union over the endpoints that have it (Cilium resolves named ports of an
    egress rule per destination identity).
    """

    number: int
    labels: tuple[str, ...]
    selectors: tuple[int, ...]
    named_ports: tuple[NamedPortRow, ...] = ()


class IpcacheRow(msgspec.Struct, frozen=True, array_like=True):
    """Prefix -> identity. `selectors`: further selectors that match by address alone (ipBlock)."""

    network: bytes
    length: int
    identity: int
    selectors: tuple[int, ...] = ()


class EndpointRow(msgspec.Struct, frozen=True, array_like=True):
    """A managed endpoint. `interface` is the node's side of its link; index 0 = not known."""

    id: int
    name: str
    namespace: str
    identity: int
    addresses: tuple[bytes, ...]
    interface: str = ""
    interface_index: int = 0
    named_ports: tuple[NamedPortRow, ...] = ()
    audit: bool = False


class SightRow(msgspec.Struct, frozen=True, array_like=True):
    """The FQDN selectors that mean an address for one endpoint alone: it was told a name of it.

    There are none where names count for the whole node: identities match by their labels then.
    """

    endpoint: int
    address: bytes
    selectors: tuple[int, ...]


class Settings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a worker must know besides policy.

    `enforcement`: "default", "always" or "never". `allow_localhost`: "always" or "policy".
    `dual_stack`: unknown addresses are world-ipv4 and world-ipv6 instead of world.
    """

    enforcement: str = "default"
    allow_localhost: str = "always"
    policy_audit_mode: bool = False
    allow_icmp_frag_needed: bool = True
    http_proxy_port: int = 0
    node_name: str = ""
    local_addresses: tuple[bytes, ...] = ()
    dual_stack: bool = False


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a worker decides by.

    `revision` rises with every published snapshot; `policy_revision` with every change of the
    repository; `generation` with every change that takes a permission away (ARCHITECTURE, bypass).
    """

    revision: int = 0
    policy_revision: int = 1
    generation: int = 0
    settings: Settings = Settings()
    endpoints: tuple[EndpointRow, ...] = ()
    identities: tuple[IdentityRow, ...] = ()
    ipcache: tuple[IpcacheRow, ...] = ()
    sights: tuple[SightRow, ...] = ()
    policies: tuple[PolicyRow, ...] = ()
    l7: tuple[L7Row, ...] = ()
    origins: tuple[OriginRow, ...] = ()
