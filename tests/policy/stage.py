"""A stage for policy tests: endpoints by name, policies, and one question, `decide`."""

from conntrack.address import Prefix, parse_address, parse_prefix
from firewall.identities.labels import LabelSet
from firewall.identities.reserved import RESERVED_LABELS, Reserved
from firewall.policy.repository import Repository
from firewall.policy.resolve import Resolver
from firewall.policy.snapshot import EndpointRow, NamedPortRow, Settings
from firewall.policy.view import View

PROTOCOLS = {"ICMP": 1, "TCP": 6, "UDP": 17, "ICMPv6": 58, "SCTP": 132}


class Stage:
    """Endpoints with labels get identities by label set; addresses outside get CIDR identities."""

    def __init__(self, *, settings=None, cluster="default", nodes=False):
        self.settings = settings or Settings()
        self.repository = Repository()
        self.resolver = Resolver(cluster=cluster, cidr_matches_nodes=nodes)
        self.identities = {int(n): labels for n, labels in RESERVED_LABELS.items() if n}
        self.numbers = {}
        self.locals = {}
        self.endpoints = {}
        self.addresses = {}
        self.fixed = {}
        self.extra = {}  # prefix -> label texts of a local identity of its own

    def endpoint(self, name, address, labels, *, ports=(), audit=False, namespace="", managed=True):
        packed = parse_address(address)
        number = self.number(LabelSet.parse(labels))
        self.addresses[name] = packed
        self.fixed[Prefix(packed, 8 * len(packed))] = number
        if managed:
            self.endpoints[name] = EndpointRow(
                id=len(self.endpoints) + 1,
                name=name,
                namespace=namespace,
                identity=number,
                addresses=(packed,),
                named_ports=tuple(NamedPortRow(*port) for port in ports),
                audit=audit,
            )

    def relabel(self, name, labels):
        number = self.number(LabelSet.parse(labels))
        row = self.endpoints[name]
        packed = self.addresses[name]
        self.fixed[Prefix(packed, 8 * len(packed))] = number
        self.endpoints[name] = EndpointRow(
            row.id, name, row.namespace, number, row.addresses, named_ports=row.named_ports
        )

    def number(self, labels):
        for reserved, known in RESERVED_LABELS.items():
            if labels == known:
                return int(reserved)
        number = self.numbers.setdefault(labels, 256 + len(self.numbers))
        self.identities[number] = labels
        return number

    def number_of(self, name):
        return self.endpoints[name].identity

    def host(self, address):
        self.addresses["host"] = parse_address(address)
        self.settings = Settings(
            **{name: getattr(self.settings, name) for name in self.settings.__struct_fields__}
            | {"local_addresses": (parse_address(address),)}
        )

    def local(self, texts):
        labels = LabelSet.parse([*texts, "reserved:world"])
        number = self.locals.setdefault(labels, (1 << 24) + 1 + len(self.locals))
        self.identities[number] = labels
        return number

    def ipcache(self):
        known = {}
        for prefix in self.resolver.prefixes():
            known[prefix] = self.local([f"cidr:{str(prefix).replace(':', '-')}"])
        for prefix, texts in self.extra.items():
            known[parse_prefix(prefix)] = self.local(texts)
        return known | self.fixed

    def snapshot(self):
        for number, labels in self.identities.items():
            self.resolver.upsert_identity(number, labels)
        self.resolver.set_endpoints(self.endpoints.values())
        ipcache = self.ipcache()
        for number, labels in self.identities.items():
            self.resolver.upsert_identity(number, labels)
        return self.resolver.snapshot(settings=self.settings, ipcache=ipcache.items())

    def apply(self, *objects):
        self.resolver.apply(self.repository.apply(objects))

    def delete(self, *keys):
        self.resolver.apply(self.repository.delete(keys))

    @property
    def view(self):
        return View(self.snapshot())

    def address(self, name):
        return self.addresses[name] if name in self.addresses else parse_address(name)

    def decide(self, source, destination, protocol, port, view=None):
        return (view or self.view).decide(
            self.address(source), self.address(destination), PROTOCOLS[protocol], port
        )


__all__ = ["Reserved", "Stage"]
