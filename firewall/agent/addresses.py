"""Whose every address is: an endpoint's, this node's, another node's, a rule's prefix, a name's.

Each of these numbers its own (`roster`, `nodes`, `numbers`, `names`); here they are put together
into what a snapshot says of addresses.
"""

from collections.abc import Iterable

from conntrack.address import Prefix, parse_prefix
from firewall.agent.config import Config
from firewall.agent.names import NameBook
from firewall.agent.neighbours import Neighbours
from firewall.agent.nodes import NodeNumbers, host_row
from firewall.agent.numbers import PrefixNumbers
from firewall.agent.roster import Roster
from firewall.fqdn.reach import Reach
from firewall.identities.registry import IdentityRegistry
from firewall.identities.reserved import Reserved
from firewall.policy.snapshot import EndpointRow


class AddressBook:
    """The owners of addresses, by the present configuration.

    Args:
        config: the configuration in force; set it when it changes.
        registry: gives prefixes, nodes and names their numbers.
        roster: the endpoints.
        neighbours: those of other nodes.

    Attributes:
        local: this node's own addresses, packed.
        names: what DNS answered.
        neighbours: the endpoints of other nodes.
    """

    def __init__(
        self, config: Config, registry: IdentityRegistry, roster: Roster, neighbours: Neighbours
    ) -> None:
        self.config = config
        self.local: tuple[bytes, ...] = ()
        self.names = NameBook(config.state_dir, registry.local, config.fqdn.bounds)
        self.neighbours = neighbours
        self._roster = roster
        self._prefixes = PrefixNumbers(config.state_dir, registry.local)
        self._nodes = NodeNumbers(config.state_dir, registry.nodes)
        self._inside: frozenset[bytes] | None = None
        self._reach = Reach()

    def restore(self) -> None:
        """Bring back the numbers of before the restart."""
        self._prefixes.restore()
        self._nodes.restore()
        self.names.restore()
        if self.config.fqdn.pre_cache is not None:
            self.names.preload(self.config.fqdn.pre_cache)

    def follow(self, prefixes: set[Prefix], selectors: Iterable[str]) -> None:
        """Number what the rules speak of now: these prefixes, and names by these FQDN selectors.

        Raises:
            IdentityError: every local number is taken.
            OSError: the numbers could not be persisted.
        """
        self._prefixes.follow(prefixes)
        self._nodes.follow(self.config.nodes)
        self.names.follow(selectors, self._outside())

    def host_rows(self) -> list[EndpointRow]:
        """Return this node as an endpoint, if it is subject to policy."""
        if not self.config.host_firewall:
            return []
        return [host_row(self.config.node, self.local, audit=self.config.host_audit)]

    def owners(self) -> dict[bytes, int]:
        """Return the id of the endpoint that owns each managed address."""
        rows = [member.endpoint.row() for member in self._roster]
        return {address: row.id for row in (*rows, *self.host_rows()) for address in row.addresses}

    def is_endpoint(self, number: int) -> bool:
        """Say whether an endpoint, or this node as one, has this id."""
        if self._roster.by_id(number) is not None:
            return True
        return any(row.id == number for row in self.host_rows())

    def ipcache(self) -> dict[Prefix, int]:
        """Return the identity of every prefix that is known.

        Of several that speak about one prefix the later here counts, in Cilium's order of sources
        (pkg/source): generated, custom-resource, kvstore, local. An address that a selected name
        leads to is generated too; its labels say more than those of a prefix.
        """
        known = dict(self._prefixes.items())
        known.update(self.names.items())
        known.update(self._nodes.addresses())
        known.update(self.neighbours.addresses())
        for address in self.local:
            known[_host(address)] = int(Reserved.HOST)
        for member in self._roster:
            row = member.endpoint.row()
            for address in row.addresses:
                known[_host(address)] = row.identity
        return known

    def _outside(self) -> Reach:
        """Return what names may lead to, the same object as long as it is the same."""
        inside = frozenset(
            [
                *self.owners(),
                *self.local,
                *(address for node in self.config.nodes for address in node.addresses),
                *(prefix.network for prefix, _ in self.neighbours.addresses()),
            ]
        )
        if inside != self._inside:
            self._inside = inside
            self._reach = Reach(inside, map(parse_prefix, self.config.fqdn.cluster_cidrs))
        return self._reach


def _host(address: bytes) -> Prefix:
    """Return the prefix of exactly one address."""
    return Prefix(address, 8 * len(address))
