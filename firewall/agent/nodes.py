"""The nodes: this one as an endpoint of its own, and the others by address and labels.

With `host_firewall` on, the node itself is an endpoint: its addresses, the identity `host`, and the
labels that `nodeSelector` asks about; its packets are queued as any endpoint's, because its
addresses join the set of managed ones (`firewall.datapath.sets`). It is no member of the roster,
because nobody declares it and nobody can take it away. Without a policy that selects it, it is not
isolated, whatever the enforcement mode, and `allow_localhost` never concerns it (Cilium: host
firewall).

Other nodes come from the configuration. Each label set gets a number of its own in Cilium's
remote-node scope, so that `fromNodes` and `toNodes` can tell nodes apart; all of them are the
entity `remote-node`. Numbers are persisted, as those of prefixes are: workers that outlived the
agent, and flow records, know them.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from conntrack.address import Prefix, is_loopback
from firewall.agent import statefile
from firewall.agent.declaration import read_addresses
from firewall.agent.document import NOWHERE, Place, Reader, Value
from firewall.control.journal import fields
from firewall.identities.labels import K8S, RESERVED, Label, LabelError, LabelSet, parse_label
from firewall.identities.registry import LocalNumbers
from firewall.identities.reserved import RESERVED_LABELS, Reserved
from firewall.policy.snapshot import EndpointRow

HOST_ENDPOINT_ID = 65_536
"""The id of this node's endpoint: one above those that the roster gives out."""

HOSTNAME = "kubernetes.io/hostname"
"""Key of the label that every node has: its name."""

NODE = "node"
"""The source of other nodes' labels (Cilium labels.LabelSourceNode)."""

_KEYS = ("name", "addresses", "labels")
_FILE = "nodes"
_API_SERVER = Label(RESERVED, Reserved.KUBE_APISERVER.label)

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeDeclaration:
    """Another node.

    Attributes:
        name: unique.
        addresses: packed, at least one.
        labels: all of them, `reserved:remote-node` and the host name's included.
        place: where it was written.
    """

    name: str
    addresses: tuple[bytes, ...]
    labels: LabelSet
    place: Place = NOWHERE


def read_node(reader: Reader, value: Value) -> NodeDeclaration | None:
    """Read an item of the setting `nodes`; problems go to `reader`, None if there is one."""
    before = len(reader.problems)
    entries = reader.mapping(value, _KEYS)
    name = reader.text(entries["name"]) if "name" in entries else ""
    if not name:
        reader.note(value.place, "name is missing")
    items = reader.items(entries["addresses"]) if "addresses" in entries else ()
    addresses = [address for address, _ in read_addresses(reader, items, "node")]
    if not addresses and len(reader.problems) == before:
        reader.note(value.place, "addresses is missing: a node has at least one")
    labels = [Label(NODE, HOSTNAME, name)]
    for item in reader.items(entries["labels"]) if "labels" in entries else ():
        try:
            labels.append(_node_label(reader.text(item)))
        except LabelError as error:
            reader.note(item.place, str(error))
    if len(reader.problems) > before:
        return None
    remote = RESERVED_LABELS[Reserved.REMOTE_NODE].with_labels(labels)
    unique = tuple(dict.fromkeys(addresses))
    return NodeDeclaration(name=name, addresses=unique, labels=remote, place=value.place)


def _node_label(text: str) -> Label:
    """Read a label of another node; of the reserved ones it may run the API server."""
    label = parse_label(text, NODE)
    if label.source == RESERVED and label != _API_SERVER:
        raise LabelError(f"label {label} is reserved: a node can be {_API_SERVER} only")
    return label


def host_labels(name: str, texts: Iterable[str]) -> tuple[Label, ...]:
    """Return this node's own labels besides `reserved:host`.

    Args:
        name: the node's.
        texts: the setting `node_labels`; without a source they are Kubernetes' (k8s).

    Raises:
        LabelError: one is no label, or is reserved.
    """
    labels = {HOSTNAME: Label(K8S, HOSTNAME, name)}
    for text in texts:
        label = parse_label(text, K8S)
        if label.source == RESERVED:
            raise LabelError(f"label {label} is reserved")
        labels[label.key] = label
    return tuple(labels.values())


def host_row(name: str, addresses: Iterable[bytes], *, audit: bool) -> EndpointRow:
    """Return this node as an endpoint; loopback is never a matter of policy."""
    return EndpointRow(
        id=HOST_ENDPOINT_ID,
        name=name,
        namespace="",
        identity=int(Reserved.HOST),
        addresses=tuple(address for address in addresses if not is_loopback(address)),
        audit=audit,
    )


class NodeNumbers:
    """The other nodes' numbers; nodes with equal labels would share one."""

    def __init__(self, state_dir: Path, numbers: LocalNumbers) -> None:
        self._path = state_dir / _FILE
        self._numbers = numbers
        self._used: dict[LabelSet, int] = {}
        self._before: dict[str, int] = {}
        self._nodes: tuple[NodeDeclaration, ...] = ()

    def restore(self) -> None:
        """Read which number each label set had; a file that cannot be read costs only those."""
        try:
            stored = statefile.read(self._path, "nodes", dict[str, int])
            self._before = stored or {}
        except statefile.StateError as error:
            aside = self._path.with_name(f"{_FILE}.unusable")
            self._path.rename(aside)
            log.warning("nodes are numbered anew", extra=fields(error=error, kept=aside))

    def follow(self, nodes: tuple[NodeDeclaration, ...]) -> None:
        """Number exactly these.

        Raises:
            IdentityError: every number is taken.
            OSError: the numbers could not be persisted.
        """
        self._nodes = nodes
        wanted = {node.labels for node in nodes}
        gone = self._used.keys() - wanted
        fresh = wanted - self._used.keys()
        for labels in gone:
            self._numbers.release(self._used.pop(labels))
        for labels in sorted(fresh, key=lambda labels: labels.text):
            preferred = self._before.get(labels.text)
            self._used[labels] = self._numbers.allocate(labels, preferred=preferred)
        if gone or fresh:
            self._before = {labels.text: number for labels, number in self._used.items()}
            statefile.write(self._path, "nodes", self._before)

    def addresses(self) -> Iterator[tuple[Prefix, int]]:
        """Yield every address of another node with its number."""
        for node in self._nodes:
            for address in node.addresses:
                yield Prefix(address, 8 * len(address)), self._used[node.labels]
