"""The kernel's part behind the nat table, as text: where translated flows are decided. Pure.

Theory of operation. Policy is about the real ends of a flow, and the proxy gets packets only in
PREROUTING. The tables of iptables leave no place that has both: mangle comes before the translation
of destinations (nat, priority -100), FORWARD and INPUT after the last TPROXY. nftables has: base
chains of ours at priority -90, in PREROUTING and OUTPUT, in a table `bartizan` of each family.
There both directions of every flow bear their real ends, because sources are translated only in
POSTROUTING, and replies to them back again in PREROUTING. So that is where a worker decides, and
has TPROXY take what it redirects: translated flows, and flows that may have been, since mangle
cannot tell.

    a packet in PREROUTING or OUTPUT, behind nat        rule
    established, not marked                             accepted
    loopback (PREROUTING)                               accepted
    TO_PROXY (PREROUTING)                               TPROXY, mark LOCAL; else dropped
    DEFERRED, of an established socket of the proxy     mark LOCAL; stage UNPROVEN: after a look of
        (not SYN), or an ICMP error about one               a worker at its source
    DEFERRED, stage BEFORE or UNPROVEN                  stage SETTLED; NFQUEUE
    DEFERRED, stage PROVEN, managed source or           as SETTLED
        destination
    DEFERRED, other                                     the mark ends
    not marked, opens a flow, translated, managed       as SETTLED
        source or destination
    not marked, opens a flow of an endpoint to no       as SETTLED
        endpoint (PREROUTING)
    any other                                           accepted

What a worker accepts here keeps the stage SETTLED to FORWARD, INPUT or POSTROUTING, where it ends.
What is not judged here for whatever reason (a table that somebody deleted, an address that is not
in the set yet) is judged there, as on a machine without nftables; there L7 rules mean a drop.
OFFLOAD and PASS_ON are carried out there, too.

A socket of the proxy is looked for again: mangle has looked for one at the address that the client
dialed, and the proxy's has the server's.

The balance over the queues must be that of mangle, or the directions of a flow would meet two
trackers. Each module hashes with a key of its own, so the rule that queues has the target NFQUEUE
of x_tables, which `nft` cannot write. It stands alone in the chain `asking`, which `nftables` makes
by netlink; without it, what needs it is dropped.

Sources: nft(8), "Address families" and "tproxy"; linux/netfilter/nf_tables.h; xt_NFQUEUE.c.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from firewall.datapath.marks import Kind, MaskedMark, Stage
from firewall.datapath.ruleset import RulesetConfig
from firewall.datapath.sets import Family

TABLE: Final = "bartizan"
ASKING: Final = "asking"
"""The chain that queues."""
BASE_CHAIN: Final = "arriving"
"""The base chain of PREROUTING."""

_HOOKS = {BASE_CHAIN: "prerouting", "sending": "output"}
_PRIORITY = -90  # behind dstnat, -100 (NF_IP_PRI_NAT_DST)
_SET = "managed"
_FAMILY = {Family.IPV4: "ip", Family.IPV6: "ip6"}
_ADDRESS = {Family.IPV4: "ipv4_addr", Family.IPV6: "ipv6_addr"}
_DNAT = "ct status & dnat"


def table_text(config: RulesetConfig, family: Family, managed: Iterable[str]) -> str:
    """Return the input of `nft -f` that makes a family's table what it shall be.

    The chain that queues must be there, and is left alone.

    Args:
        config: what to render.
        family: IPv4 or IPv6.
        managed: the addresses of the endpoints, as text.
    """
    name = _FAMILY[family]
    bodies = {
        BASE_CHAIN: _arriving(config),
        "sending": _sending(config),
        "redirected": _redirected(config, family),
        "deferred": _deferred(family),
        "rest": _rest(config, family),
        "entering": _entering(family),
        "opening": _opening(family),
        "owned": _owned(config),
        "settled": _settled(config),
    }
    lines = [f"table {name} {TABLE} {{", f"set {_SET} {{ type {_ADDRESS[family]}; }}"]
    lines += [f"chain {chain} {{ }}" for chain in bodies if chain not in _HOOKS]
    lines += [
        f"chain {chain} {{ type filter hook {hook} priority {_PRIORITY}; }}"
        for chain, hook in _HOOKS.items()
    ]
    lines += ["}", *(f"flush chain {name} {TABLE} {chain}" for chain in bodies)]
    for chain, body in bodies.items():
        lines += [f"add rule {name} {TABLE} {chain} {rule}" for rule in body]
    return "\n".join([*lines, set_text(family, managed)])


def set_text(family: Family, managed: Iterable[str]) -> str:
    """Return the input of `nft -f` that makes the set hold exactly these addresses.

    The table must be there.
    """
    where = f"{_FAMILY[family]} {TABLE} {_SET}"
    elements = ", ".join(sorted(managed))
    added = f"add element {where} {{ {elements} }}\n" if elements else ""
    return f"flush set {where}\n{added}"


def _arriving(config: RulesetConfig) -> Iterator[str]:
    yield _decided(config)
    yield "iifname lo accept"
    ways = {Kind.NONE: "entering", Kind.TO_PROXY: "redirected", Kind.DEFERRED: "deferred"}
    yield _by_kind(config, ways)


def _sending(config: RulesetConfig) -> Iterator[str]:
    yield _decided(config)
    yield _by_kind(config, {Kind.NONE: "opening", Kind.DEFERRED: "rest"})


def _decided(config: RulesetConfig) -> str:
    """Return the rule that nearly every packet needs, those of carried flows above all."""
    return f"ct state established {_is(config.marks.any_of(Kind.NONE))} accept"


def _by_kind(config: RulesetConfig, ways: dict[Kind, str]) -> str:
    kinds = {kind: config.marks.any_of(kind) for kind in ways}
    mask = kinds[Kind.NONE].mask
    cases = ", ".join(f"{kinds[kind].value:#x} : goto {chain}" for kind, chain in ways.items())
    return f"meta mark & {mask:#x} vmap {{ {cases} }}"


def _redirected(config: RulesetConfig, family: Family) -> Iterator[str]:
    """Yield the way of what a worker has redirected."""
    if config.http_proxy_port:
        loopback = family.loopback if family is Family.IPV4 else f"[{family.loopback}]"
        address = f"{loopback}:{config.http_proxy_port}"
        local = _put(config.marks.of(Kind.LOCAL))
        yield f"meta l4proto {{ tcp, udp }} tproxy to {address} {local} accept"
    yield "drop"


def _deferred(family: Family) -> Iterator[str]:
    """Yield the way of what arrives and was deferred."""
    socket = "socket wildcard 0 socket transparent 1"
    yield f"tcp flags & (fin | syn | rst | ack) != syn {socket} goto owned"
    for message in _path_messages(family):
        yield f"ct state related {message} {socket} goto owned"
    yield "goto rest"


def _path_messages(family: Family) -> tuple[str, ...]:
    """Return the ICMP errors that the proxy's own TCP needs (RFC 1191, RFC 8201)."""
    if family is Family.IPV4:
        return ("icmp type destination-unreachable",)
    return ("icmpv6 type { destination-unreachable, packet-too-big }",)


def _rest(config: RulesetConfig, family: Family) -> Iterator[str]:
    """Yield the way of what was deferred and is no socket's."""
    for stage in (Stage.BEFORE, Stage.UNPROVEN):
        yield f"{_is(config.marks.of(Kind.DEFERRED, stage))} goto settled"
    yield from _managed(family)
    yield f"{_put(config.marks.of(Kind.NONE))} accept"


def _entering(family: Family) -> Iterator[str]:
    """Yield the way of what arrives and has passed mangle, decided or not."""
    name = _FAMILY[family]
    yield f"ct state new {name} saddr @{_SET} {name} daddr != @{_SET} goto settled"
    yield "goto opening"


def _opening(family: Family) -> Iterator[str]:
    """Yield the way of what passed by the destination that it had, if it has another now."""
    yield "ct state != { new, related } accept"
    yield f"{_DNAT} == 0 accept"
    yield from _managed(family)


def _managed(family: Family) -> Iterator[str]:
    for end in ("daddr", "saddr"):
        yield f"{_FAMILY[family]} {end} @{_SET} goto settled"


def _owned(config: RulesetConfig) -> Iterator[str]:
    """Yield the way of what a socket of the proxy owns; a worker looks at an unproven source."""
    unproven = _is(config.marks.of(Kind.DEFERRED, Stage.UNPROVEN))
    local = _put(config.marks.of(Kind.LOCAL))
    yield f"{unproven} {local} jump {ASKING}"
    yield f"{_is(config.marks.of(Kind.LOCAL))} drop"
    yield f"{local} accept"


def _settled(config: RulesetConfig) -> Iterator[str]:
    yield f"{_put(config.marks.of(Kind.DEFERRED, Stage.SETTLED))} jump {ASKING}"
    yield "drop"


def _is(mark: MaskedMark) -> str:
    return f"meta mark & {mark.mask:#x} == {mark.value:#x}"


def _put(mark: MaskedMark) -> str:
    """Return the statement that gives a packet a mark of ours, and leaves the user's bits."""
    return f"meta mark set meta mark & {mark.mask ^ 0xFFFFFFFF:#x} | {mark.value:#x}"
