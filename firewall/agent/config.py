"""The configuration: every setting with its type, default, unit and meaning, in one place.

The dataclasses below are the schema: `loading` walks them to read a file, `bartizan config view`
to show what was read, `make docs` to write the manual.
"""

import os
import socket
from dataclasses import dataclass, field
from pathlib import Path

from firewall.agent.declaration import Declaration, read_declaration
from firewall.agent.nodes import NodeDeclaration, read_node
from firewall.agent.proxying import ENCODINGS, read_format, read_limits
from firewall.agent.setting import setting
from firewall.datapath.marks import DEFAULT_MASK
from firewall.fqdn.cache import Bounds


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxySettings:
    """`proxy`: the L7 proxy."""

    workers: int = setting(
        1, "L7 proxy processes; 0 = none", unit="processes", minimum=0, maximum=64
    )
    port: int = setting(15006, "where redirected connections arrive", minimum=1, maximum=65535)
    limits: tuple[str, ...] = setting(
        (),
        "settings of docs/l7.md that differ from their defaults, {name: value}",
        shape=read_limits,
        live=True,
    )
    access_log: Path | None = setting(
        None, "file for a line about each request; opened again when it was moved away", live=True
    )
    access_log_encoding: str = setting(
        "text", "text, or one JSON object per line", words=ENCODINGS, live=True
    )
    access_log_format: str = setting(
        "",
        "Envoy's operators (docs/l7.md), as %REQ(USER-AGENT)%; for JSON {name: format};"
        " empty = Envoy's default",
        shape=read_format,
        live=True,
    )
    admin: str = setting(
        "socket",
        "Envoy's admin page for all proxy workers: socket = <run_dir>/proxy-admin.sock (0660),"
        " a loopback address with a port, or off",
    )
    secrets_dir: Path | None = setting(
        None,
        "secrets of headerMatches (files) and TLS (folders): <dir>/<namespace>/<name>",
        live=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ConntrackSettings:
    """`conntrack`: the tracker of each datapath worker."""

    profile: str = setting(
        "strict",
        "strict: a flow begins at its beginning; linux: as lenient as the kernel's conntrack",
        words=("strict", "linux"),
    )
    limit: int = setting(
        262_144,
        "flows that a worker tracks at most; further ones are dropped",
        unit="flows",
        minimum=16,
        maximum=16_777_216,
    )
    source_limit: int = setting(
        0,
        "flows that one source (IPv6: one /64) may have of them; for a further one it loses its"
        " oldest that is not established; auto = a quarter of limit",
        unit="flows",
        minimum=4,
        maximum=16_777_216,
        words={"auto": 0},
    )

    @property
    def share(self) -> int:
        """How many flows one source may have."""
        return self.source_limit or max(4, self.limit // 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySettings:
    """`policy`: how policies are found and enforced."""

    enforcement: str = setting(
        "default",
        "default: an endpoint is isolated once a policy selects it; always; never",
        words=("default", "always", "never"),
        live=True,
    )
    directory: Path | None = setting(
        None, "watched directory of policy files; its objects come and go with the files", live=True
    )
    audit: bool = setting(
        False, "report what policy would drop as AUDIT and let it pass, everywhere", live=True
    )
    allow_localhost: str = setting(
        "always",
        "whether this node may always reach its endpoints, or only as policy says",
        words=("always", "policy"),
        live=True,
    )
    reset_connections: str = setting(
        "l7",
        "which established TCP connections end by RST, not by their time-outs:"
        " l7: those that passed directly before L7 rules applied to them; all: those that lost"
        " their permission too; none",
        words=("l7", "all", "none"),
    )
    extended_protocols: bool = setting(
        False,
        "accept VRRP, IGMP, GRE, IPIP, IPV6, ESP, AH in toPorts"
        " (Cilium: enable-extended-ip-protocols)",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FqdnSettings:
    """`fqdn`: names in policies, and the DNS proxy that learns their addresses."""

    reject_response_code: str = setting(
        "refused",
        "how a name that policy forbids is answered: refused, or nameError (NXDOMAIN), for"
        " resolvers that end their search list at REFUSED"
        " (Cilium: tofqdns-dns-reject-response-code)",
        words=("refused", "nameError"),
    )
    proxy_response_max_delay_s: float = setting(
        0.1,
        "how long an answer waits at most until every worker enforces its addresses"
        " (tofqdns-proxy-response-max-delay)",
        unit="seconds",
        minimum=0.001,
        maximum=10,
    )
    min_ttl_s: float = setting(
        0.0,
        "shortest time that an answer counts (tofqdns-min-ttl)",
        unit="seconds",
        minimum=0,
        maximum=604_800,
    )
    endpoint_max_ip_per_hostname: int = setting(
        50,
        "addresses of one name for one endpoint; those that expire first give way"
        " (tofqdns-endpoint-max-ip-per-hostname)",
        unit="addresses",
        minimum=1,
        maximum=10_000,
    )
    max_deferred_connection_deletes: int = setting(
        10_000,
        "expired addresses that are kept for their connections; the oldest give way"
        " (tofqdns-max-deferred-connection-deletes)",
        unit="addresses",
        minimum=0,
        maximum=1_000_000,
    )
    idle_connection_grace_period_s: float = setting(
        0.0,
        "how long an expired address stays after its last connection"
        " (tofqdns-idle-connection-grace-period)",
        unit="seconds",
        minimum=0,
        maximum=86_400,
    )
    gc_interval_s: float = setting(
        60.0,
        "pause between two looks at what has expired; until the second it counts",
        unit="seconds",
        minimum=0.1,
        maximum=3600,
    )
    visibility: str = setting(
        "node",
        "for whom an answer counts: node, every endpoint whose policy means the name, as in"
        " Cilium; endpoint, only who asked",
        words=("node", "endpoint"),
    )
    pre_cache: Path | None = setting(
        None,
        "names and addresses that are known from the start: a file that fqdn cache list -o json"
        " has printed (tofqdns-pre-cache)",
    )
    cluster_cidrs: tuple[str, ...] = setting(
        (), "the cluster's own prefixes: no name leads into them, whatever DNS answers"
    )

    @property
    def bounds(self) -> Bounds:
        """What the cache of names holds at most, and how long."""
        return Bounds(
            min_ttl_s=self.min_ttl_s,
            per_name=self.endpoint_max_ip_per_hostname,
            zombie_count=self.max_deferred_connection_deletes,
            grace_s=self.idle_connection_grace_period_s,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelSettings:
    """`labels`: which labels make an identity."""

    filter: tuple[str, ...] = setting(
        (), "added to Cilium's default list: source:regex, ! in front excludes"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentitySettings:
    """`identity`: how identity numbers live."""

    grace_period_s: float = setting(
        900.0,
        "how long a number without users stays as it is",
        unit="seconds",
        minimum=0,
        maximum=86_400,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class KvStoreSettings:
    """`kvstore`: where label sets get their numbers."""

    path: Path | None = setting(
        None,
        "SQLite file that several agents of this machine share, each with a node_name and a"
        " state_dir of its own; not set = <state_dir>/identities.db, this agent's alone",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """`api`: the unix socket of the REST API."""

    group: str = setting("", "group that may use <run_dir>/api.sock (mode 0660); empty = ours")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSettings:
    """`flows.export`: flows as JSON lines in a file, rotated."""

    path: Path | None = setting(None, "the file; not set = no export")
    max_bytes: int = setting(
        10 * 1024 * 1024, "size at which the file is rotated", unit="bytes", minimum=4096
    )
    backups: int = setting(5, "rotated files that are kept", unit="files", minimum=0, maximum=1000)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSettings:
    """`flows`: what is remembered of the decisions."""

    ring: int = setting(
        4095, "flows kept in memory for `observe`", unit="flows", minimum=1, maximum=1_048_575
    )
    per_second: int = setting(
        5000,
        "flows recorded per second, twice that in a burst; further ones are counted as lost",
        unit="flows",
        minimum=1,
        maximum=1_000_000,
    )
    export: ExportSettings = field(default_factory=ExportSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """`log`: the daemon's own log, on standard error."""

    format: str = setting("logfmt", "logfmt or one JSON object per line", words=("logfmt", "json"))
    level: str = setting(
        "info",
        "least severity that is written",
        words=("debug", "info", "warning", "error"),
        live=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that an operator can set."""

    run_dir: Path = setting(Path("/run/bartizan"), "sockets and locks; emptied by a reboot")
    state_dir: Path = setting(
        Path("/var/lib/bartizan"), "endpoints, policies, identities and the snapshot"
    )
    node_name: str = setting("", "this node's name in flows; empty = the host name")
    node_labels: tuple[str, ...] = setting(
        (),
        "this node's labels, for nodeSelector; without a source they are k8s;"
        " k8s:kubernetes.io/hostname=<node_name> is one of them",
    )
    host_firewall: bool = setting(
        False, "enforce policies with a nodeSelector on this node's own traffic"
    )
    host_audit: bool = setting(
        False,
        "report what policies with a nodeSelector would drop as AUDIT and let it pass",
        live=True,
    )
    nodes: tuple[NodeDeclaration, ...] = setting(
        (),
        "the other nodes, {name, addresses, labels} each, for fromNodes and toNodes",
        item=read_node,
        live=True,
    )
    cluster_name: str = setting("default", "the cluster label of every endpoint")
    workers: int = setting(
        0,
        "datapath processes, one queue each; auto = one per processor that we may use",
        unit="processes",
        minimum=1,
        maximum=64,
        words={"auto": 0},
    )
    queue_base: int = setting(
        0,
        "number of the first NFQUEUE; 64 above it are the queues of the workers that follow"
        " when the daemon is upgraded",
        minimum=0,
        maximum=65_536 - 128,
    )
    mark_mask: int = setting(
        DEFAULT_MASK, "the bits of the packet mark that are ours", minimum=1, maximum=0xFFFFFFFF
    )
    copy_range: int = setting(
        256,  # firewall.datapath.nfqueue says why
        "how much of each packet the kernel copies to userspace",
        unit="bytes",
        minimum=128,
        maximum=4016,
    )
    queue_length: int = setting(
        8192,
        "packets that may wait in a queue; the kernel drops further ones",
        unit="packets",
        minimum=1,
        maximum=1_048_576,
    )
    gso: bool = setting(True, "take large segments whole; off = the kernel splits them first")
    bypass: bool = setting(
        True,
        "have the kernel carry established flows that need no look; off = every packet is "
        "decided in userspace",
    )
    conntrack: ConntrackSettings = field(default_factory=ConntrackSettings)
    proxy: ProxySettings = field(default_factory=ProxySettings)
    policy: PolicySettings = field(default_factory=PolicySettings)
    fqdn: FqdnSettings = field(default_factory=FqdnSettings)
    labels: LabelSettings = field(default_factory=LabelSettings)
    identity: IdentitySettings = field(default_factory=IdentitySettings)
    kvstore: KvStoreSettings = field(default_factory=KvStoreSettings)
    api: ApiSettings = field(default_factory=ApiSettings)
    flows: FlowSettings = field(default_factory=FlowSettings)
    log: LogSettings = field(default_factory=LogSettings)
    endpoint_directory: Path | None = setting(
        None, "watched directory of endpoint files; endpoints come and go with the files", live=True
    )
    endpoints: tuple[Declaration, ...] = setting(
        (),
        "endpoints declared in this file, as examples/bartizan.yaml shows",
        item=read_declaration,
        live=True,
    )

    @property
    def worker_count(self) -> int:
        """Datapath processes to run, `auto` resolved."""
        return self.workers or min(len(os.sched_getaffinity(0)), 64)

    @property
    def node(self) -> str:
        """The node's name, the host name if none is set."""
        return self.node_name or socket.gethostname()

    @property
    def snapshot_path(self) -> Path:
        """Where the snapshot is published."""
        return self.state_dir / "snapshot"

    @property
    def kvstore_path(self) -> Path:
        """The file of the key-value store."""
        return self.kvstore.path or self.state_dir / "identities.db"

    @property
    def api_path(self) -> Path:
        """The socket of the REST API."""
        return self.run_dir / "api.sock"
