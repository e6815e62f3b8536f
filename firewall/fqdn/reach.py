"""Addresses that no name may lead to, whatever DNS answers. Pure.

A name server is believed about the world only. If it could say that a name is this node, another
endpoint or the loopback address, its owner could open doors inside that policy keeps shut (DNS
rebinding). Cilium: toFQDNs selects addresses outside the cluster (Documentation/security/policy/
layer3.rst). What lies inside is known from the endpoints, the nodes and `fqdn.cluster_cidrs`.

Ranges: RFC 6890 (special purpose), RFC 4291 (IPv6), RFC 6052 (the prefix of NAT64, whose addresses
carry one of IPv4).
"""

from collections.abc import Iterable

from conntrack.address import Prefix, parse_prefix, prefix_contains

SPECIAL = {
    "0.0.0.0/8": "unspecified",
    "127.0.0.0/8": "loopback",
    "169.254.0.0/16": "link-local",
    "224.0.0.0/4": "multicast",
    "255.255.255.255/32": "broadcast",
    "::/128": "unspecified",
    "::1/128": "loopback",
    "fe80::/10": "link-local",
    "ff00::/8": "multicast",
}
"""Range -> what it is."""

_SPECIAL = {parse_prefix(text): word for text, word in SPECIAL.items()}
_MAPPED = parse_prefix("::ffff:0:0/96")
_NAT64 = parse_prefix("64:ff9b::/96")


class Reach:
    """Says which addresses names may lead to.

    Args:
        inside: packed addresses of endpoints and nodes.
        cluster: the cluster's prefixes.
    """

    def __init__(self, inside: Iterable[bytes] = (), cluster: Iterable[Prefix] = ()) -> None:
        self._inside = frozenset(inside)
        self._cluster = tuple(cluster)

    def refusal(self, address: bytes) -> str:
        """Return why no name may lead to an address, "" if one may."""
        host = Prefix(address, 8 * len(address))
        for prefix, word in _SPECIAL.items():
            if prefix_contains(prefix, host):
                return word
        if address in self._inside:
            return "an endpoint or a node"
        if any(prefix_contains(prefix, host) for prefix in self._cluster):
            return "inside the cluster"
        if prefix_contains(_MAPPED, host):
            return "an IPv4 address in the clothes of IPv6"
        if prefix_contains(_NAT64, host):
            return self.refusal(address[12:])
        return ""
