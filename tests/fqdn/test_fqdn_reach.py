"""No name leads inside, whatever DNS answers."""

import pytest

from conntrack.address import parse_address, parse_prefix
from firewall.fqdn.reach import Reach

REACH = Reach(
    map(parse_address, ("203.0.113.7", "fd00::7")),
    map(parse_prefix, ("10.244.0.0/16", "fd00:10::/56")),
)


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("127.0.0.1", "loopback"),
        ("127.255.0.9", "loopback"),
        ("::1", "loopback"),
        ("169.254.169.254", "link-local"),
        ("fe80::1", "link-local"),
        ("0.0.0.0", "unspecified"),
        ("0.1.2.3", "unspecified"),
        ("::", "unspecified"),
        ("224.0.0.1", "multicast"),
        ("ff02::1", "multicast"),
        ("255.255.255.255", "broadcast"),
        ("203.0.113.7", "an endpoint or a node"),
        ("fd00::7", "an endpoint or a node"),
        ("10.244.3.4", "inside the cluster"),
        ("fd00:10::1", "inside the cluster"),
        ("::ffff:192.0.2.1", "an IPv4 address in the clothes of IPv6"),
        ("64:ff9b::7f00:1", "loopback"),
        ("64:ff9b::203.0.113.7", "an endpoint or a node"),
    ],
)
def test_an_address_inside_is_refused_with_a_reason(address, why):
    assert REACH.refusal(parse_address(address)) == why


@pytest.mark.parametrize(
    "address",
    ["192.0.2.1", "10.0.0.1", "192.168.1.1", "2001:db8::1", "fd00:20::1", "64:ff9b::1.1.1.1"],
)  # fmt: skip
def test_private_addresses_that_nobody_here_has_are_the_world(address):
    """A service in the next network is a good reason for a name."""
    assert REACH.refusal(parse_address(address)) == ""
