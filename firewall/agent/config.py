"""The configuration: every setting with its type, default, unit and meaning, in one place.

The dataclasses below are the schema: `read` walks them, and so do `describe` (for the manual) and
`bartizan config view`. A value comes from, strongest first, a flag (`--set policy.audit=on`), the
environment (`BARTIZAN_POLICY_AUDIT`), the file, the default; `Loaded.sources` remembers which.
Everything wrong is reported at once, each with its place.
"""

import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from conntrack.address import format_address, parse_prefix
from firewall.agent.declaration import Declaration, read_declaration
from firewall.agent.document import (
    DocumentError,
    Place,
    Reader,
    Value,
    scalar,
    sequence,
    unknown,
)
from firewall.agent.nodes import NodeDeclaration, check_nodes, host_labels, read_node
from firewall.agent.proxying import ENCODINGS, OWN_SHAPE, admin_problem, check_format
from firewall.datapath.marks import DEFAULT_MASK, Marks, MaskError
from firewall.fqdn.cache import Bounds
from firewall.identities.labels import LabelError, LabelFilter

ENVIRONMENT_PREFIX = "BARTIZAN_"


class Meaning(NamedTuple):
    """What the schema says about one setting besides type and default.

    `live`: a reload (SIGHUP) applies it; others need a restart. `words`: values that are not a
    number but stand for one, or, for text, the only values.
    """

    text: str
    unit: str = ""
    minimum: float | None = None
    maximum: float | None = None
    words: Mapping[str, int] | tuple[str, ...] = ()
    live: bool = False


def _meaning(text: str, **more: Any) -> dict[str, Meaning]:
    """Make the metadata of a setting's field."""
    return {"meaning": Meaning(text, **more)}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxySettings:
    """`proxy`: the L7 proxy."""

    workers: int = field(
        default=1,
        metadata=_meaning("L7 proxy processes; 0 = none", unit="processes", minimum=0, maximum=64),
    )
    port: int = field(
        default=15006,
        metadata=_meaning("where redirected connections arrive", minimum=1, maximum=65535),
    )
    limits: tuple[str, ...] = field(
        default=(),
        metadata=_meaning(
            "settings of docs/l7.md that differ from their defaults, {name: value}", live=True
        ),
    )
    access_log: Path | None = field(
        default=None,
        metadata=_meaning(
            "file for a line about each request; opened again when it was moved away",
            live=True,
        ),
    )
    access_log_encoding: str = field(
        default="text",
        metadata=_meaning("text, or one JSON object per line", words=ENCODINGS, live=True),
    )
    access_log_format: str = field(
        default="",
        metadata=_meaning(
            "Envoy's operators (docs/l7.md), as %REQ(USER-AGENT)%; for JSON {name: format};"
            " empty = Envoy's default",
            live=True,
        ),
    )
    admin: str = field(
        default="socket",
        metadata=_meaning(
            "Envoy's admin page for all proxy workers: socket = <run_dir>/proxy-admin.sock (0660),"
            " a loopback address with a port, or off"
        ),
    )
    secrets_dir: Path | None = field(
        default=None,
        metadata=_meaning(
            "secrets of headerMatches (files) and TLS (folders): <dir>/<namespace>/<name>",
            live=True,
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ConntrackSettings:
    """`conntrack`: the tracker of each datapath worker."""

    profile: str = field(
        default="strict",
        metadata=_meaning(
            "strict: a flow begins at its beginning; linux: as lenient as the kernel's conntrack",
            words=("strict", "linux"),
        ),
    )
    limit: int = field(
        default=262_144,
        metadata=_meaning(
            "flows that a worker tracks at most; further ones are dropped",
            unit="flows",
            minimum=16,
            maximum=16_777_216,
        ),
    )
    source_limit: int = field(
        default=0,
        metadata=_meaning(
            "flows that one source (IPv6: one /64) may have of them; for a further one it loses its"
            " oldest that is not established; auto = a quarter of limit",
            unit="flows",
            minimum=4,
            maximum=16_777_216,
            words={"auto": 0},
        ),
    )

    @property
    def share(self) -> int:
        """How many flows one source may have."""
        return self.source_limit or max(4, self.limit // 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicySettings:
    """`policy`: how policies are found and enforced."""

    enforcement: str = field(
        default="default",
        metadata=_meaning(
            "default: an endpoint is isolated once a policy selects it; always; never",
            words=("default", "always", "never"),
            live=True,
        ),
    )
    directory: Path | None = field(
        default=None,
        metadata=_meaning(
            "watched directory of policy files; its objects come and go with the files", live=True
        ),
    )
    audit: bool = field(
        default=False,
        metadata=_meaning(
            "report what policy would drop as AUDIT and let it pass, everywhere", live=True
        ),
    )
    allow_localhost: str = field(
        default="always",
        metadata=_meaning(
            "whether this node may always reach its endpoints, or only as policy says",
            words=("always", "policy"),
            live=True,
        ),
    )
    reset_connections: str = field(
        default="l7",
        metadata=_meaning(
            "which established TCP connections end by RST, not by their time-outs:"
            " l7: those that passed directly before L7 rules applied to them; all: those that lost"
            " their permission too; none",
            words=("l7", "all", "none"),
        ),
    )
    extended_protocols: bool = field(
        default=False,
        metadata=_meaning(
            "accept VRRP, IGMP, GRE, IPIP, IPV6, ESP, AH in toPorts"
            " (Cilium: enable-extended-ip-protocols)"
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FqdnSettings:
    """`fqdn`: names in policies, and the DNS proxy that learns their addresses."""

    reject_response_code: str = field(
        default="refused",
        metadata=_meaning(
            "how a name that policy forbids is answered: refused, or nameError (NXDOMAIN), for"
            " resolvers that end their search list at REFUSED"
            " (Cilium: tofqdns-dns-reject-response-code)",
            words=("refused", "nameError"),
        ),
    )
    proxy_response_max_delay_s: float = field(
        default=0.1,
        metadata=_meaning(
            "how long an answer waits at most until every worker enforces its addresses"
            " (tofqdns-proxy-response-max-delay)",
            unit="seconds",
            minimum=0.001,
            maximum=10,
        ),
    )
    min_ttl_s: float = field(
        default=0.0,
        metadata=_meaning(
            "shortest time that an answer counts (tofqdns-min-ttl)",
            unit="seconds",
            minimum=0,
            maximum=604_800,
        ),
    )
    endpoint_max_ip_per_hostname: int = field(
        default=50,
        metadata=_meaning(
            "addresses of one name for one endpoint; those that expire first give way"
            " (tofqdns-endpoint-max-ip-per-hostname)",
            unit="addresses",
            minimum=1,
            maximum=10_000,
        ),
    )
    max_deferred_connection_deletes: int = field(
        default=10_000,
        metadata=_meaning(
            "expired addresses that are kept for their connections; the oldest give way"
            " (tofqdns-max-deferred-connection-deletes)",
            unit="addresses",
            minimum=0,
            maximum=1_000_000,
        ),
    )
    idle_connection_grace_period_s: float = field(
        default=0.0,
        metadata=_meaning(
            "how long an expired address stays after its last connection"
            " (tofqdns-idle-connection-grace-period)",
            unit="seconds",
            minimum=0,
            maximum=86_400,
        ),
    )
    gc_interval_s: float = field(
        default=60.0,
        metadata=_meaning(
            "pause between two looks at what has expired; until then it counts",
            unit="seconds",
            minimum=0.1,
            maximum=3600,
        ),
    )
    visibility: str = field(
        default="node",
        metadata=_meaning(
            "for whom an answer counts: node, every endpoint whose policy means the name, as in"
            " Cilium; endpoint, only who asked",
            words=("node", "endpoint"),
        ),
    )
    cluster_cidrs: tuple[str, ...] = field(
        default=(),
        metadata=_meaning(
            "the cluster's own prefixes: no name leads into them, whatever DNS answers"
        ),
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

    filter: tuple[str, ...] = field(
        default=(),
        metadata=_meaning(
            "added to Cilium's default list: source:regex, ! in front excludes", live=False
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentitySettings:
    """`identity`: how identity numbers live."""

    grace_period_s: float = field(
        default=900.0,
        metadata=_meaning(
            "how long a number without users stays as it is",
            unit="seconds",
            minimum=0,
            maximum=86_400,
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiSettings:
    """`api`: the unix socket of the REST API."""

    group: str = field(
        default="",
        metadata=_meaning("group that may use <run_dir>/api.sock (mode 0660); empty = ours"),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSettings:
    """`flows.export`: flows as JSON lines in a file, rotated."""

    path: Path | None = field(default=None, metadata=_meaning("the file; not set = no export"))
    max_bytes: int = field(
        default=10 * 1024 * 1024,
        metadata=_meaning("size at which the file is rotated", unit="bytes", minimum=4096),
    )
    backups: int = field(
        default=5,
        metadata=_meaning("rotated files that are kept", unit="files", minimum=0, maximum=1000),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSettings:
    """`flows`: what is remembered of the decisions."""

    ring: int = field(
        default=4095,
        metadata=_meaning(
            "flows kept in memory for `observe`", unit="flows", minimum=1, maximum=1_048_575
        ),
    )
    per_second: int = field(
        default=5000,
        metadata=_meaning(
            "flows recorded per second, twice that in a burst; further ones are counted as lost",
            unit="flows",
            minimum=1,
            maximum=1_000_000,
        ),
    )
    export: ExportSettings = field(default_factory=ExportSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """`log`: the daemon's own log, on standard error."""

    format: str = field(
        default="logfmt",
        metadata=_meaning("logfmt or one JSON object per line", words=("logfmt", "json")),
    )
    level: str = field(
        default="info",
        metadata=_meaning(
            "least severity that is written", words=("debug", "info", "warning", "error"), live=True
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that an operator can set."""

    run_dir: Path = field(
        default=Path("/run/bartizan"), metadata=_meaning("sockets and locks; emptied by a reboot")
    )
    state_dir: Path = field(
        default=Path("/var/lib/bartizan"),
        metadata=_meaning("endpoints, policies, identities and the snapshot"),
    )
    node_name: str = field(
        default="", metadata=_meaning("this node's name in flows; empty = the host name")
    )
    node_labels: tuple[str, ...] = field(
        default=(),
        metadata=_meaning(
            "this node's labels, for nodeSelector; without a source they are k8s;"
            " k8s:kubernetes.io/hostname=<node_name> is one of them"
        ),
    )
    host_firewall: bool = field(
        default=False,
        metadata=_meaning("enforce policies with a nodeSelector on this node's own traffic"),
    )
    host_audit: bool = field(
        default=False,
        metadata=_meaning(
            "report what policies with a nodeSelector would drop as AUDIT and let it pass",
            live=True,
        ),
    )
    nodes: tuple[NodeDeclaration, ...] = field(
        default=(),
        metadata=_meaning(
            "the other nodes, {name, addresses, labels} each, for fromNodes and toNodes", live=True
        ),
    )
    cluster_name: str = field(
        default="default", metadata=_meaning("the cluster label of every endpoint")
    )
    workers: int = field(
        default=0,
        metadata=_meaning(
            "datapath processes, one queue each; auto = one per processor that we may use",
            unit="processes",
            minimum=1,
            maximum=64,
            words={"auto": 0},
        ),
    )
    queue_base: int = field(
        default=0,
        metadata=_meaning(
            "number of the first NFQUEUE; 64 above it are the queues of the workers that follow"
            " when the daemon is upgraded",
            minimum=0,
            maximum=65_536 - 128,
        ),
    )
    mark_mask: int = field(
        default=DEFAULT_MASK,
        metadata=_meaning(
            "the bits of the packet mark that are ours", minimum=1, maximum=0xFFFFFFFF
        ),
    )
    copy_range: int = field(
        default=256,  # firewall.datapath.nfqueue says why
        metadata=_meaning(
            "how much of each packet the kernel copies to userspace",
            unit="bytes",
            minimum=128,
            maximum=4016,
        ),
    )
    queue_length: int = field(
        default=8192,
        metadata=_meaning(
            "packets that may wait in a queue; the kernel drops further ones",
            unit="packets",
            minimum=1,
            maximum=1_048_576,
        ),
    )
    gso: bool = field(
        default=True,
        metadata=_meaning("take large segments whole; off = the kernel splits them first"),
    )
    bypass: bool = field(
        default=True,
        metadata=_meaning(
            "have the kernel carry established flows that need no look; off = every packet is "
            "decided in userspace"
        ),
    )
    conntrack: ConntrackSettings = field(default_factory=ConntrackSettings)
    proxy: ProxySettings = field(default_factory=ProxySettings)
    policy: PolicySettings = field(default_factory=PolicySettings)
    fqdn: FqdnSettings = field(default_factory=FqdnSettings)
    labels: LabelSettings = field(default_factory=LabelSettings)
    identity: IdentitySettings = field(default_factory=IdentitySettings)
    api: ApiSettings = field(default_factory=ApiSettings)
    flows: FlowSettings = field(default_factory=FlowSettings)
    log: LogSettings = field(default_factory=LogSettings)
    endpoint_directory: Path | None = field(
        default=None,
        metadata=_meaning(
            "watched directory of endpoint files; endpoints come and go with the files", live=True
        ),
    )
    endpoints: tuple[Declaration, ...] = field(
        default=(),
        metadata=_meaning(
            "endpoints declared in this file, as examples/bartizan.yaml shows", live=True
        ),
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
    def api_path(self) -> Path:
        """The socket of the REST API."""
        return self.run_dir / "api.sock"


class Loaded(NamedTuple):
    """A configuration and where each value came from, by dotted path of the setting."""

    config: Config
    sources: dict[str, str]


class SettingRow(NamedTuple):
    """One setting of the schema: dotted path, field, meaning."""

    path: str
    field: "Field[Any]"
    meaning: Meaning

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return ENVIRONMENT_PREFIX + self.path.replace(".", "_").upper()


def settings(section: type = Config, prefix: str = "") -> Iterator[SettingRow]:
    """Yield every setting of the schema, in the order of the file."""
    hints = get_type_hints(section)
    for item in fields(section):
        path = f"{prefix}{item.name}"
        if is_dataclass(hints[item.name]):
            yield from settings(hints[item.name], f"{path}.")
        else:
            yield SettingRow(path, item, item.metadata["meaning"])


def load(path: Path | None, overrides: Mapping[str, str], environment: Mapping[str, str]) -> Loaded:
    """Read the file, if one is given, and lay environment and flags over it.

    Raises:
        DocumentError: with everything that is wrong.
    """
    text = ""
    if path is not None:
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise DocumentError(_unreadable(path, error)) from error
    return read(text, str(path or ""), overrides, environment)


def read(
    text: str,
    file: str = "",
    overrides: Mapping[str, str] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Loaded:
    """Read a configuration from text.

    Args:
        text: YAML, one document; empty = all defaults.
        file: its name in messages.
        overrides: flags, by dotted path of the setting.
        environment: variables; others than BARTIZAN_<SETTING> are ignored.

    Raises:
        DocumentError: with everything that is wrong.
    """
    reader = Reader()
    documents = reader.compose(text, file)
    for extra in documents[1:]:
        reader.note(extra.place, "a second document; a configuration is one")
    given: dict[str, Value] = {}
    if documents:
        _flatten(reader, documents[0], Config, "", given)
    sources = {path: f"{v.place.file}:{v.place.line}" for path, v in given.items()}
    known = {row.path: row for row in settings()}
    for row in known.values():
        if row.variable in (environment or {}):
            given[row.path] = _outside(environment or {}, row.variable, row, row.variable)
            sources[row.path] = f"environment {row.variable}"
    for key in overrides or {}:
        place = Place(f"--set {key}")
        if key in known:
            given[key] = _outside(overrides or {}, key, known[key], place.file)
            sources[key] = "flag"
        else:
            reader.note(place, unknown("setting", key, known))
    config = _build(reader, Config, "", given)
    _check(reader, config, given)
    reader.finish()
    return Loaded(config, {path: sources.get(path, "default") for path in known})


def needs_restart(old: Config, new: Config) -> tuple[str, ...]:
    """Return the settings that differ and that a reload cannot apply."""
    return tuple(
        row.path
        for row in settings()
        if not row.meaning.live and value(old, row.path) != value(new, row.path)
    )


def value(config: Config, path: str) -> Any:
    """Return the value of a setting by its dotted path."""
    found: Any = config
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _flatten(
    reader: Reader, section: Value, schema: type, prefix: str, given: dict[str, Value]
) -> None:
    """Gather the values of a section and its subsections by dotted path."""
    hints = get_type_hints(schema)
    for name, entry in reader.mapping(section, [item.name for item in fields(schema)]).items():
        if is_dataclass(hints[name]):
            _flatten(reader, entry, hints[name], f"{prefix}{name}.", given)
        else:
            given[f"{prefix}{name}"] = entry


def _outside(texts: Mapping[str, str], key: str, row: SettingRow, file: str) -> Value:
    """Make a value of a flag's or variable's text; lists are YAML lists or split at commas."""
    text, place = texts[key], Place(file)
    structured = row.path in ("endpoints", "nodes")
    if row.field.default != () or structured:
        documents = Reader().compose(text, file) if structured else []
        return documents[0] if documents else scalar(text, place)
    documents = Reader().compose(text, file) if text.lstrip().startswith("[") else []
    return documents[0] if documents else sequence(re.split(r"\s*,\s*", text.strip()), place)


def _build(reader: Reader, schema: Any, prefix: str, given: Mapping[str, Value]) -> Any:
    """Make a section's dataclass of what was given, with defaults for the rest."""
    hints = get_type_hints(schema)
    found: dict[str, Any] = {}
    for item in fields(schema):
        path = f"{prefix}{item.name}"
        if is_dataclass(hints[item.name]):
            found[item.name] = _build(reader, hints[item.name], f"{path}.", given)
        elif path in given:
            found[item.name] = _convert(reader, given[path], hints[item.name], item)
    return schema(**found)


def _convert(reader: Reader, given: Value, kind: Any, item: "Field[Any]") -> Any:
    """Read one value by the type of its field; the default stands in for what is wrong."""
    meaning: Meaning = item.metadata["meaning"]
    if kind == tuple[Declaration, ...]:
        declarations = [read_declaration(reader, entry) for entry in reader.items(given)]
        return tuple(entry for entry in declarations if entry is not None)
    if kind == tuple[NodeDeclaration, ...]:
        nodes = [read_node(reader, entry) for entry in reader.items(given)]
        return tuple(entry for entry in nodes if entry is not None)
    if item.name in OWN_SHAPE:
        return OWN_SHAPE[item.name](reader, given)
    if kind == tuple[str, ...]:
        return reader.texts(given)
    if kind is bool:
        return reader.boolean(given)
    text = reader.text(given)
    if kind in (int, float):
        return _number(reader, given.place, text, kind, item)
    if kind in (Path, Path | None):
        if not text:
            return None if item.default is None else item.default
        if not Path(text).is_absolute():
            reader.note(given.place, f"{text!r} is no absolute path")
        return Path(text)
    if meaning.words and text not in meaning.words:
        reader.note(given.place, unknown("value", text, meaning.words))
    return text


def _number(reader: Reader, place: Place, text: str, kind: Any, item: "Field[Any]") -> Any:
    """Read a number in the unit of its setting; integers may be hexadecimal."""
    meaning: Meaning = item.metadata["meaning"]
    default = item.default if item.default is not MISSING else 0
    if isinstance(meaning.words, Mapping) and text in meaning.words:
        return meaning.words[text]
    try:
        number = int(text, 0) if kind is int else float(text)
    except ValueError:
        words = "".join(f" or {word}" for word in meaning.words)
        noun = "a whole number" if kind is int else "a number"
        unit = f" of {meaning.unit}" if meaning.unit else ""
        reader.note(place, f"expected {noun}{unit}{words}, got {text!r}")
        return default
    low, high = meaning.minimum, meaning.maximum
    if not (low is None or number >= low) or not (high is None or number <= high):
        bounds = f"{low:g}" if high is None else f"{low or 0:g}-{high:g}"
        reader.note(place, f"{text} is outside {bounds}{' or more' if high is None else ''}")
        return default
    return number


def _check(reader: Reader, config: Config, given: Mapping[str, Value]) -> None:
    """Check what one setting alone does not show."""
    if problem := admin_problem(config.proxy.admin):
        reader.note(_of(given, "proxy.admin"), problem)
    check_format(
        reader,
        _of(given, "proxy.access_log_format"),
        config.proxy.access_log_format,
        config.proxy.access_log_encoding,
    )
    for number, expression in enumerate(config.labels.filter):
        try:
            LabelFilter((expression,))
        except LabelError as error:
            reader.note(given["labels.filter"].place, f"item {number}: {error}")
    try:
        host_labels(config.node, config.node_labels)
    except LabelError as error:
        reader.note(_of(given, "node_labels"), str(error))
    check_nodes(reader, config.nodes)
    for number, text in enumerate(config.fqdn.cluster_cidrs):
        try:
            parse_prefix(text)
        except ValueError as error:
            reader.note(_of(given, "fqdn.cluster_cidrs"), f"item {number}: {error}")
    try:
        Marks(config.mark_mask)
    except MaskError as error:
        reader.note(_of(given, "mark_mask"), str(error))
    names: dict[str, Declaration] = {}
    owners: dict[bytes, Declaration] = {}
    for declaration in config.endpoints:
        other = names.setdefault(declaration.name, declaration)
        if other is not declaration:
            first = f"first at line {other.place.line}"
            reader.note(declaration.place, f"endpoint {declaration.name} is given twice; {first}")
            continue
        for address in declaration.addresses:
            owner = owners.setdefault(address, declaration)
            if owner is not declaration:
                text = f"{format_address(address)} belongs to endpoint {owner.name} already"
                reader.note(declaration.place, f"{text} (line {owner.place.line})")


def _of(given: Mapping[str, Value], path: str) -> Place:
    """Return the place of a setting, wherever it came from."""
    return given[path].place if path in given else Place("", path=path)


def _unreadable(path: Path, error: Exception) -> list[Any]:
    """Say that the file cannot be read."""
    reader = Reader()
    reason = error.strerror if isinstance(error, OSError) else f"not UTF-8: {error}"
    reader.note(Place(str(path)), f"cannot be read: {reason}")
    return reader.problems
