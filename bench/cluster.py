"""A cluster of any size, the same for the same seed: identities, endpoints, policies, addresses.

Namespaces of twenty applications in several versions and tiers; some identities have endpoints on
this node, the others live elsewhere and are known by address. Policies are written as people write
them (documents, read by the real reader): application to application, across namespaces by
expressions, CIDRs with exceptions, L7, named ports, entities, denies, and default denies.
"""

import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from conntrack.address import Prefix
from firewall.identities.labels import LabelSet
from firewall.identities.local import prefix_labels
from firewall.identities.reserved import LOCAL_MIN
from firewall.policy.repository import Repository
from firewall.policy.resolve import Resolver
from firewall.policy.snapshot import EndpointRow, NamedPortRow, Settings, Snapshot

SEED = 3
FIRST_IDENTITY = 256
APPS = 20
VERSIONS = 5
TIERS = ("web", "logic", "data", "batch")
TEAMS = ("red", "green", "blue", "grey", "teal")
NAMED = (NamedPortRow("http", 6, 8080), NamedPortRow("metrics", 6, 9090))

Document = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """How many of each; `cidrs`: blocks, each with one exception, in each rule about blocks.

    One policy in seven is about blocks, and each block and each exception is an identity more.
    """

    policies: int = 1_000
    identities: int = 5_000
    endpoints: int = 500
    cidrs: int = 1

    def times(self, factor: float) -> "Size":
        """Return the same mixture, `factor` times as large."""
        return Size(
            policies=round(factor * self.policies),
            identities=round(factor * self.identities),
            endpoints=round(factor * self.endpoints),
            cidrs=self.cidrs,
        )

    @property
    def namespaces(self) -> int:
        """Namespaces needed for so many identities."""
        return max(1, self.identities // (APPS * VERSIONS))


def namespace(number: int) -> str:
    """Return the name of a namespace."""
    return f"ns{number}"


def labels_of(number: int) -> tuple[str, ...]:
    """Return the labels of the identity with this index, from 0."""
    space, rest = divmod(number, APPS * VERSIONS)
    app, version = divmod(rest, VERSIONS)
    name = namespace(space)
    return (
        f"k8s:io.kubernetes.pod.namespace={name}",
        f"k8s:io.cilium.k8s.namespace.labels.team={TEAMS[space % len(TEAMS)]}",
        "k8s:io.cilium.k8s.policy.cluster=default",
        f"k8s:io.cilium.k8s.policy.serviceaccount={name}-{TIERS[app % len(TIERS)]}",
        f"k8s:app=app{app}",
        f"k8s:tier={TIERS[app % len(TIERS)]}",
        f"k8s:version=v{version}",
    )


def address_of(number: int) -> bytes:
    """Return the address of the workload with this index: 10.0.0.1 and so on, 4 bytes."""
    return (0x0A000001 + number).to_bytes(4, "big")


def documents(size: Size, seed: int = SEED) -> Iterator[Document]:
    """Yield the policies."""
    dice = random.Random(seed)
    for number in range(size.policies):
        yield document(number, dice, size)


def document(number: int, dice: random.Random, size: Size) -> Document:
    """Return one policy; its namespace and kind follow from its number, the rest from the dice."""
    name = namespace(number % size.namespaces)
    app = f"app{dice.randrange(APPS)}"
    spec: Document = {"endpointSelector": {"matchLabels": {"app": app}}}
    spec |= _rules(number // size.namespaces, dice, size)
    return {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": f"policy{number}", "namespace": name},
        "spec": spec,
    }


def _rules(kind: int, dice: random.Random, size: Size) -> Document:
    """Return the rules of one policy: twenty kinds, one after the other."""
    other = {"matchLabels": {"app": f"app{dice.randrange(APPS)}"}}
    port = {"port": str(dice.choice((80, 443, 5432, 6379, 8080, 9092))), "protocol": "TCP"}
    ports = [{"ports": [port]}]
    match kind % 20:
        case 0:
            return {"endpointSelector": {}, "ingress": [{"fromEndpoints": [{}]}]}
        case 1 | 2 | 3:
            return {"egress": [_cidrs(dice, size.cidrs)]}
        case 4 | 5:
            path = f"/v{dice.randrange(3)}/{dice.choice(('items', 'orders', 'users'))}(/[0-9]+)?"
            rules = {"http": [{"method": "GET", "path": path}, {"method": "POST", "path": path}]}
            with_rules = [{"ports": [port], "rules": rules}]
            return {"ingress": [{"fromEndpoints": [other], "toPorts": with_rules}]}
        case 6:
            named = [{"ports": [{"port": "http", "protocol": "TCP"}]}]
            return {"ingress": [{"fromEndpoints": [other], "toPorts": named}]}
        case 7:
            return {"ingress": [{"fromEntities": [dice.choice(("world", "host", "cluster"))]}]}
        case 8:
            return {"ingressDeny": [{"fromEndpoints": [_elsewhere(dice, size.namespaces)]}]}
        case 9 | 10 | 11:
            return {
                "ingress": [
                    {"fromEndpoints": [_elsewhere(dice, size.namespaces)], "toPorts": ports}
                ]
            }
        case 12 | 13:
            return {"egress": [{"toEndpoints": [other], "toPorts": ports}]}
        case _:
            first = {"fromEndpoints": [other], "toPorts": ports}
            second = {"fromEndpoints": [{"matchLabels": {"tier": dice.choice(TIERS)}}]}
            return {"ingress": [first, second | {"toPorts": [{"ports": [{"port": "9090"}]}]}]}


def _cidrs(dice: random.Random, count: int) -> Document:
    blocks = []
    for _ in range(count):
        network = f"{dice.randrange(11, 200)}.{dice.randrange(256)}"
        hole = f"{network}.{dice.randrange(256)}.0/24"
        blocks.append({"cidr": f"{network}.0.0/16", "except": [hole]})
    return {"toCIDRSet": blocks}


def _elsewhere(dice: random.Random, namespaces: int) -> Document:
    spaces = sorted({namespace(dice.randrange(namespaces)) for _ in range(3)})
    key = "k8s:io.kubernetes.pod.namespace"
    return {
        "matchLabels": {"tier": dice.choice(TIERS)},
        "matchExpressions": [{"key": key, "operator": "In", "values": spaces}],
    }


def text_of(listed: Iterable[Document]) -> str:
    """Return documents as a file holds them."""
    return "\n---\n".join(json.dumps(one) for one in listed)


def declarations(size: Size) -> list[Document]:
    """Return the endpoints as an endpoint file has them; each has labels of its own."""
    found = []
    for number in range(size.endpoints):
        keys = dict(text.removeprefix("k8s:").split("=", 1) for text in labels_of(number))
        found.append(
            {
                "name": f"pod{number}",
                "namespace": keys["io.kubernetes.pod.namespace"],
                "addresses": [".".join(map(str, address_of(number)))],
                "labels": [f"{key}={keys[key]}" for key in ("app", "tier", "version")],
                "ports": ["http:8080/tcp", "metrics:9090/tcp"] if number % 3 == 0 else [],
            }
        )
    return found


class Cluster:
    """What the agent of one node knows, and the resolver that it feeds."""

    def __init__(self, size: Size, seed: int = SEED) -> None:
        self.size = size
        self.dice = random.Random(seed)
        self.repository = Repository()
        self.resolver = Resolver()
        self.settings = Settings(node_name="node")
        self.prefixes: dict[Prefix, int] = {}
        self.identities = {
            FIRST_IDENTITY + at: LabelSet.parse(labels_of(at)) for at in range(size.identities)
        }
        local = sorted(self.dice.sample(range(size.identities), size.endpoints))
        self.endpoints = {
            at + 1: EndpointRow(
                id=at + 1,
                name=f"pod{at}",
                namespace=namespace(index // (APPS * VERSIONS)),
                identity=FIRST_IDENTITY + index,
                addresses=(address_of(index),),
                interface_index=at + 10,
                named_ports=NAMED if index % 3 == 0 else (),
            )
            for at, index in enumerate(local)
        }
        self.ipcache = {
            Prefix(address_of(at), 32): FIRST_IDENTITY + at for at in range(size.identities)
        }

    def identify(self) -> None:
        """Tell the resolver every identity."""
        for number, labels in self.identities.items():
            self.resolver.upsert_identity(number, labels)

    def relabel(self, endpoint: int) -> None:
        """Give an endpoint labels that nobody had: a new identity, as the agent would."""
        row = self.endpoints[endpoint]
        number = FIRST_IDENTITY + len(self.identities)
        at = row.identity - FIRST_IDENTITY
        labels = [text for text in labels_of(at % self.size.identities) if "version" not in text]
        self.identities[number] = LabelSet.parse([*labels, f"k8s:version=new{number}"])
        self.resolver.upsert_identity(number, self.identities[number])
        self.endpoints[endpoint] = EndpointRow(
            row.id, row.name, row.namespace, number, row.addresses, row.interface,
            row.interface_index, row.named_ports,
        )  # fmt: skip
        self.ipcache[Prefix(row.addresses[0], 32)] = number

    def snapshot(self) -> Snapshot:
        """Do what the agent does for a publication, but for telling anybody."""
        wanted = self.resolver.prefixes()
        for prefix in sorted(wanted - self.prefixes.keys()):
            number = self.prefixes[prefix] = LOCAL_MIN + 1 + len(self.prefixes)
            self.resolver.upsert_identity(number, prefix_labels(prefix))
        self.resolver.set_endpoints(self.endpoints.values())
        listed = self.ipcache | {prefix: self.prefixes[prefix] for prefix in wanted}
        return self.resolver.snapshot(settings=self.settings, ipcache=listed.items())
