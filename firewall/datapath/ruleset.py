"""The kernel's part of the datapath, as text: which packets are queued, and where verdicts lead.

Theory of operation. Everything of ours hangs on two jumps at the front of `mangle` PREROUTING and
OUTPUT, into chains named BARTIZAN-...; each family is one `iptables-restore --noflush` transaction,
which replaces the content of our chains and leaves every other rule alone. The base chains are
never deleted: unregistering one makes the kernel drop all packets that wait in any queue of the
network namespace (nf_queue flushes on hook removal).

PREROUTING sees forwarded packets and those for the node, once each; OUTPUT the node's own.
A packet is queued when it touches a managed address or crosses an endpoint's interface; both are
ipsets (`sets`), so that adding an endpoint changes no rule.

    a packet in PREROUTING, the node's or forwarded     rule
    loopback, unless on its way to the proxy            RETURN
    unmarked, established, connmark of a generation     the bypass, see below
    marked TO_PROXY by a worker                         TPROXY to the proxy's port (or dropped)
    UDP reply to what the proxy asked                   mark LOCAL; a worker looks at the source
        if no rule can: another interface than its own, or a bridge
    marked PASS_ON by a worker                          the named worker's queue
    marked DEFERRED by a worker                         ACCEPT: see Translation
    marked OFFLOAD by a worker                          connmark OFFLOAD and generation; ACCEPT
    established, connmark of a generation               the bypass, see below
    INVALID to the kernel's conntrack                   mark SUSPECT, then as any other
    of an established socket of the proxy               as before
    of a flow whose destination is translated; reply    mark DEFERRED; RETURN: see Translation
        to a translated source
    opens a flow of an endpoint to no endpoint          RETURN: see Translation
    managed source or destination, endpoint interface   NFQUEUE, balanced by address pair

    a packet in OUTPUT
    sent by the proxy over loopback, or a UDP question  connmark FROM_PROXY
    loopback; sent by the proxy; on its way to it       RETURN
    reply, connmark FROM_PROXY                          mark LOCAL: a server of this node answers
    marked PASS_ON by a worker                          the named worker's queue
    OFFLOAD, established, INVALID                       as above
    to a translated destination                         mark DEFERRED; RETURN: see Translation
    managed source or destination, endpoint interface   NFQUEUE

    a packet in FORWARD or INPUT
    unmarked, opens no flow, not translated             RETURN
    marked TO_PROXY                                     DROP: nobody has taken it
    marked LOCAL, in FORWARD                            NFQUEUE, to be dropped: see Bridges
    marked LOCAL or FROM_PROXY, in INPUT                RETURN
    decided behind nat                                  RETURN, the mark ends
    marked PASS_ON, OFFLOAD                             as above
    marked DEFERRED by a worker                         NFQUEUE
    of a translated flow, see PREROUTING                the bypass, or NFQUEUE if managed as above
    opens a flow of an endpoint to no endpoint          NFQUEUE

    a packet in POSTROUTING
    unmarked, not to a translated destination           RETURN
    from this node to a translated destination          as in FORWARD

Translation (NAT). The nat table comes after mangle in PREROUTING and OUTPUT, and translates sources
only in POSTROUTING. Behind it, both directions of a flow bear the addresses of its real ends, and
policy is about those; so that is where translated flows are decided, by a table of nftables
(`translated`). Of a first packet nobody knows in mangle whether its destination will be translated.
If that is no endpoint it waits for its decision until it is behind nat. If it is one, policy is
asked at once, and once more if it has been translated all the same. So it is for this node, where
it is an endpoint, too: what policy would drop there is DEFERRED, since its ports stand for others.
What is not decided behind nat, because there is no such table (then mangle, which does not rely on
it, decides all that it can; `settles`) or it is not whole, is decided in FORWARD, INPUT and
POSTROUTING; what needs the proxy is dropped there. But for what a worker has DEFERRED, none of this
relies on marks: a user's rule on the way may set all of their bits.

UDP (DNS). Every datagram of a redirected flow is queued and marked anew: the proxy has no socket of
its own for each client. What servers reply to the proxy is recognised by its flow, not by a socket,
which may be closed when a late answer comes: the proxy's flows have the connmark FROM_PROXY.

Bridges. A bridge shows its packets to iptables if bridge-nf-call-iptables says so; they arrive at
the bridge, and only the worker is told at which port. So everything that comes through the bridge
of an endpoint is queued, the worker believes an address at its port only, and no port's address is
in the set of those that need no such look. TPROXY has no effect there: what is to be switched is
switched, and what is to be routed loses the socket on its way up (ip_rcv_core orphans it). So the
worker redirects nothing that came through a bridge, and what is marked for local delivery is never
forwarded. What answers the proxy keeps its mark on that way, and the kernel finds the socket by its
addresses: a server behind a bridge is reached through the proxy from anywhere else.

The bypass. A worker marks one packet of an established flow that needs no more looking at OFFLOAD
and repeats it; if the mark bears the present generation, it is saved to the flow's connmark (bits
outside our mask stay the user's), and from then on the kernel accepts the flow's packets. Not so
TCP segments with SYN, FIN or RST: they clear the connmark and are queued, and so is all that
follows until a worker marks the flow again. Nor packets whose source belongs to an endpoint on
another interface: an endpoint that is bound to an interface is believed there only.
The two chains that know the generation are replaced as a whole when it changes. Then no connmark
fits any more, and every flow comes back once. A mark of any other generation is never saved.

NFQUEUE has no --queue-bypass: with no worker listening, managed endpoints are cut off. The balance
hashes the unordered address pair (nfqueue_hash in xt_NFQUEUE.c), so both directions of a flow meet
the same tracker; only ICMP errors sent by a router on the way do not, hence PASS_ON.

`-m socket` and TPROXY switch on the kernel's defragmentation for the whole namespace: a worker sees
whole datagrams. They are therefore rendered even when there is no proxy. `-m conntrack` switches on
the kernel's own tracking, whose verdicts are not asked but whose table outlives a worker.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from firewall.datapath.marks import Kind, Marks, Stage
from firewall.datapath.sets import (
    INTERFACES,
    Family,
    RulesetError,
    bound_set,
    homed_set,
    managed_set,
)

CHAIN_PREFIX = "BARTIZAN-"
HOOKS = ("PREROUTING", "OUTPUT", "FORWARD", "INPUT", "POSTROUTING")
_SOCKET = f"{CHAIN_PREFIX}SOCKET"
_LOCAL = f"{CHAIN_PREFIX}LOCAL"
_ASKED = f"{CHAIN_PREFIX}ASKED"
_OFFLOAD = f"{CHAIN_PREFIX}OFFLOAD"
_BYPASS = f"{CHAIN_PREFIX}BYPASS"
_RECALLED = f"{CHAIN_PREFIX}RECALLED"
_TRANSLATED = f"{CHAIN_PREFIX}TRANSLATED"
_DEFERRED = f"{CHAIN_PREFIX}DEFERRED"
_UNSETTLED = f"{CHAIN_PREFIX}UNSETTLED"
_SETTLED = f"{CHAIN_PREFIX}SETTLED"
_CHAINS = (
    *(CHAIN_PREFIX + hook for hook in HOOKS),
    *(
        _SOCKET,
        _LOCAL,
        _ASKED,
        _OFFLOAD,
        _BYPASS,
        _RECALLED,
        _TRANSLATED,
        _DEFERRED,
        _UNSETTLED,
        _SETTLED,
    ),
)
_DNAT = "-m conntrack --ctstate DNAT"
_SNAT_REPLY = "-m conntrack --ctstate SNAT --ctdir REPLY"


@dataclass(frozen=True, slots=True, kw_only=True)
class RulesetConfig:
    """What the rules depend on besides the endpoints.

    Attributes:
        marks: our mark bits.
        first_queue: number of the first worker's queue; worker N reads `first_queue + N`.
        queue_count: number of workers, at least 1.
        http_proxy_port: TCP and UDP port that the transparent listeners have on 127.0.0.1 and ::1,
            or on every address; 0 = no proxy.
        route_table: routing table that delivers the proxy's packets locally.
        rule_priority: priority of the first of our two `ip rule`s; before `main` (32766).
        generation: flows that were marked in it bypass userspace; None = every packet is queued.

    Raises:
        RulesetError: a number is out of its range.
    """

    marks: Marks = field(default_factory=Marks)
    first_queue: int = 0
    queue_count: int = 1
    http_proxy_port: int = 0
    route_table: int = 17953
    rule_priority: int = 17953
    generation: int | None = None

    def __post_init__(self) -> None:
        if self.queue_count < 1 or not 0 <= self.first_queue <= 65536 - self.queue_count:
            raise RulesetError("queues must be numbered within 0..65535, and at least one")
        if not 0 <= self.http_proxy_port <= 65535:
            raise RulesetError(f"proxy port {self.http_proxy_port} is not a port")


class RoutingRule(NamedTuple):
    """An `ip rule`: packets with the mark (text `value/mask`) look into the table."""

    priority: int
    mark: str
    table: int

    def arguments(self, verb: str) -> list[str]:
        """Return the arguments of `ip` after the family, for `verb` add or del."""
        return [
            *("rule", verb, "priority", str(self.priority)),
            *("fwmark", self.mark, "lookup", str(self.table)),
        ]


# --- iptables ---------------------------------------------------------------------------------


def install_text(
    config: RulesetConfig,
    family: Family,
    saved: str,
    *,
    keep_generation: bool = False,
    settles: bool = False,
) -> str:
    """Return the input of `iptables-restore --noflush` that installs or updates our rules.

    Args:
        config: what to render.
        family: IPv4 or IPv6.
        saved: what `iptables-save -t mangle` (or ip6tables-save) printed, to see which jumps exist.
        keep_generation: the generation that is installed stays, whatever it is.
        settles: the family has its table behind the nat table (`translated`).
    """
    kept = (_OFFLOAD, _BYPASS)
    keep_generation = keep_generation and all(f":{chain} " in saved for chain in kept)
    chains = [chain for chain in _CHAINS if not keep_generation or chain not in kept]
    lines = ["*mangle", *(f":{chain} - [0:0]" for chain in chains)]
    lines += _prerouting(config, family, settles=settles)
    lines += _output(config, family, settles=settles)
    lines += _translated(config, family, settles=settles)
    lines += _settling(config, family)
    lines.append(f"-A {_RECALLED} -j CONNMARK --set-xmark {config.marks.of(Kind.NONE)}")
    lines += _socket_chains(config, family)
    if not keep_generation:
        lines += _generation_chains(config, family)
    for hook in HOOKS:
        lines += _jump(hook, saved)
    return "\n".join([*lines, "COMMIT", ""])


def generation_text(config: RulesetConfig, family: Family) -> str:
    """Return the input of `iptables-restore --noflush` that brings another generation.

    The rules must be installed. Naming a chain empties it, in the same transaction.
    """
    lines = ["*mangle", *(f":{chain} - [0:0]" for chain in (_OFFLOAD, _BYPASS))]
    lines += _generation_chains(config, family)
    return "\n".join([*lines, "COMMIT", ""])


def remove_text(saved: str) -> str:
    """Return the input of `iptables-restore --noflush` that takes our rules away; "" if none."""
    chains = [chain for chain in _CHAINS if f":{chain} " in saved]
    if not chains:
        return ""
    lines = ["*mangle"]
    for hook in HOOKS:
        lines += [f"-D {hook} -j {CHAIN_PREFIX}{hook}"] * _jump_count(hook, saved)
    lines += [f"-F {chain}" for chain in chains]
    lines += [f"-X {chain}" for chain in chains]
    return "\n".join([*lines, "COMMIT", ""])


def first_queue(saved: str) -> int | None:
    """Return the number of the first queue that the installed rules feed; None = none."""
    for line in saved.splitlines():
        words = line.split()
        if "NFQUEUE" in words and words[1].startswith(CHAIN_PREFIX) and "--match-set" in words:
            return int(words[-1].partition(":")[0])
    return None


def settles(saved: str) -> bool:
    """Say whether the installed rules rely on a table behind the nat table (`translated`)."""
    return f"-g {_UNSETTLED}\n" in saved


def jumps_installed(saved: str) -> bool:
    """Say whether both jumps are there, once each and at the front."""
    return not any(_jump(hook, saved) for hook in HOOKS)


def _jump(hook: str, saved: str) -> list[str]:
    """Return what puts our jump at the front of a hook, once; nothing if it is there."""
    jump = f"{hook} -j {CHAIN_PREFIX}{hook}"
    rules = [line for line in saved.splitlines() if line.startswith(f"-A {hook} ")]
    count = _jump_count(hook, saved)
    if count == 1 and rules[0] == f"-A {jump}":
        return []
    return [f"-D {jump}"] * count + [f"-I {jump}"]


def _jump_count(hook: str, saved: str) -> int:
    return saved.splitlines().count(f"-A {hook} -j {CHAIN_PREFIX}{hook}")


def _prerouting(config: RulesetConfig, family: Family, *, settles: bool) -> Iterator[str]:
    """Yield the rules for packets that arrive."""
    rule = f"-A {CHAIN_PREFIX}PREROUTING"
    to_proxy = config.marks.of(Kind.TO_PROXY)
    yield f"{rule} -i lo -m mark ! --mark {to_proxy} -j RETURN"
    # Of the carried packets nearly all: whatever stands before this they pay for.
    yield f"{_carried(config, rule)} {_unmarked(config)} -j {_BYPASS}"
    if config.http_proxy_port:
        # A listener on loopback cannot be reached around the rules; without --on-ip the kernel
        # would look for one on the address of the interface.
        for protocol in ("tcp", "udp"):
            yield (
                f"{rule} -p {protocol} -m mark --mark {to_proxy} -j TPROXY "
                f"--on-port {config.http_proxy_port} --on-ip {family.loopback} "
                f"--tproxy-mark {config.marks.of(Kind.LOCAL)}"
            )
    yield f"{rule} -m mark --mark {to_proxy} -j DROP"
    # A user's rules behind ours may set all bits of a mark.
    yield f"{rule} -m mark --mark {config.marks.of(Kind.DEFERRED)} -j ACCEPT"
    yield from _passed_on(config, rule)
    yield from _offloaded(config, rule)
    yield f"{rule} -p tcp -m tcp ! --syn -m socket --transparent -j {_SOCKET}"
    ours = config.marks.of(Kind.FROM_PROXY)
    yield f"{rule} -p udp -m conntrack --ctdir REPLY -m connmark --mark {ours} -j {_SOCKET}"
    for message in _path_messages(family):
        yield f"{rule} {message} -m socket --transparent -j {_SOCKET}"
    target = f"-g {_UNSETTLED}" if settles else "-j RETURN"
    yield f"{rule} {_DNAT} {target}"
    yield f"{rule} {_SNAT_REPLY} {target}"
    if settles:
        yield f"{rule} {_outward(family)} -j RETURN"
    yield from _queued(config, family, rule)


def _queued(config: RulesetConfig, family: Family, rule: str) -> Iterator[str]:
    """Yield what queues a packet that arrived, if it concerns an endpoint."""
    queue = _queue(config)
    yield f"{rule} -m set --match-set {managed_set(family)} src -j {queue}"
    yield f"{rule} -m set --match-set {managed_set(family)} dst -j {queue}"
    yield f"{rule} -m set --match-set {INTERFACES} src,src -j {queue}"


def _outward(family: Family) -> str:
    """Return what matches packets that open a flow of an endpoint to where no endpoint is."""
    managed = managed_set(family)
    new = "-m conntrack --ctstate NEW"
    return f"{new} -m set --match-set {managed} src -m set ! --match-set {managed} dst"


def _translated(config: RulesetConfig, family: Family, *, settles: bool) -> Iterator[str]:
    """Yield the rules behind the routing decision: for what has not been decided before it."""
    unmarked = _unmarked(config)
    for hook in ("FORWARD", "INPUT"):
        rule = f"-A {CHAIN_PREFIX}{hook}"
        # None of the rules below could match; carried packets pay for each.
        opening_or_nat = "NEW,SNAT,DNAT" if settles else "SNAT,DNAT"
        yield f"{rule} -m conntrack ! --ctstate {opening_or_nat} {unmarked} -j RETURN"
        local = f"{rule} -m mark --mark {config.marks.of(Kind.LOCAL)}"
        # What TPROXY has not taken would reach a server, or one of this node's own.
        yield f"{rule} -m mark --mark {config.marks.any_of(Kind.TO_PROXY)} -j DROP"
        if hook == "FORWARD":
            yield f"{local} -j {_queue(config)}"
        else:
            yield f"{local} -j RETURN"
            yield f"{rule} -m mark --mark {config.marks.of(Kind.FROM_PROXY)} -j RETURN"
        yield f"{rule} -m mark --mark {config.marks.of(Kind.DEFERRED, Stage.SETTLED)} -g {_SETTLED}"
        yield from _passed_on(config, rule)
        yield f"{rule} -m mark --mark {config.marks.any_of(Kind.OFFLOAD)} -j {_OFFLOAD}"
        yield f"{rule} -m mark --mark {config.marks.of(Kind.DEFERRED)} -j {_DEFERRED}"
        yield f"{rule} {_DNAT} -j {_TRANSLATED}"
        yield f"{rule} {_SNAT_REPLY} -j {_TRANSLATED}"
        if settles:
            yield f"{rule} {_outward(family)} -j {_queue(config)}"
    rule = f"-A {CHAIN_PREFIX}POSTROUTING"
    yield f"{rule} -m conntrack ! --ctstate DNAT {unmarked} -j RETURN"
    yield f"{rule} -o lo -j RETURN"
    yield f"{rule} -m mark --mark {config.marks.of(Kind.FROM_PROXY)} -j RETURN"
    yield f"{rule} -m mark --mark {config.marks.of(Kind.DEFERRED, Stage.SETTLED)} -g {_SETTLED}"
    yield from _passed_on(config, rule)
    yield f"{rule} -m mark --mark {config.marks.any_of(Kind.OFFLOAD)} -j {_OFFLOAD}"
    # Of what is forwarded, FORWARD has decided already.
    yield f"{rule} {_DNAT} --ctdir ORIGINAL -m addrtype --src-type LOCAL -j {_TRANSLATED}"
    yield f"{_carried(config, f'-A {_TRANSLATED}')} -j {_BYPASS}"
    yield from _queued(config, family, f"-A {_TRANSLATED}")
    yield f"-A {_DEFERRED} -j MARK --set-xmark {config.marks.of(Kind.NONE)}"
    yield f"-A {_DEFERRED} -j {_queue(config)}"


def _settling(config: RulesetConfig, family: Family) -> Iterator[str]:
    """Yield what marks translated packets for the table behind nat, and what ends its marks.

    Who the sender is can be told here; of the destination only that it is not final.
    """
    unproven, proven, nothing = (
        config.marks.of(Kind.DEFERRED, Stage.UNPROVEN),
        config.marks.of(Kind.DEFERRED, Stage.PROVEN),
        config.marks.of(Kind.NONE),
    )
    yield f"-A {_UNSETTLED} -j MARK --set-xmark {proven}"
    yield f"-A {_UNSETTLED} -m set --match-set {bound_set(family)} src,src -j RETURN"
    for match in (f"{INTERFACES} src,src", f"{managed_set(family)} src"):
        yield f"-A {_UNSETTLED} -m set --match-set {match} -j MARK --set-xmark {unproven}"
    yield f"-A {_SETTLED} -j MARK --set-xmark {nothing}"


def _output(config: RulesetConfig, family: Family, *, settles: bool) -> Iterator[str]:
    """Yield the rules for packets of the node itself."""
    rule = f"-A {CHAIN_PREFIX}OUTPUT"
    # A server of this very node answers the proxy at its client's address, which is elsewhere.
    ours = config.marks.of(Kind.FROM_PROXY)
    save = f"-j CONNMARK --save-mark --nfmask {ours.mask:#x} --ctmask {ours.mask:#x}"
    yield f"{rule} -o lo -m mark --mark {ours} {save}"
    yield f"{rule} -p udp -m mark --mark {ours} -m conntrack --ctdir ORIGINAL {save}"
    yield f"{rule} -o lo -j RETURN"
    yield f"{rule} -m mark --mark {ours} -j RETURN"
    yield f"{rule} -m conntrack --ctdir REPLY -m connmark --mark {ours} -g {_LOCAL}"
    # The kernel routes again after the verdict, and the mark leads to loopback and PREROUTING.
    yield f"{rule} -m mark --mark {config.marks.of(Kind.TO_PROXY)} -j RETURN"
    yield from _passed_on(config, rule)
    yield from _offloaded(config, rule)
    if settles:
        proven = config.marks.of(Kind.DEFERRED, Stage.PROVEN)
        yield f"{rule} {_DNAT} --ctdir ORIGINAL -j MARK --set-xmark {proven}"
    yield f"{rule} {_DNAT} --ctdir ORIGINAL -j RETURN"
    queue = _queue(config)
    yield f"{rule} -m set --match-set {managed_set(family)} dst -j {queue}"
    yield f"{rule} -m set --match-set {managed_set(family)} src -j {queue}"
    yield f"{rule} -m set --match-set {INTERFACES} dst,dst -j {queue}"


def _socket_chains(config: RulesetConfig, family: Family) -> Iterator[str]:
    """Yield what happens to packets of the proxy's own connections.

    A managed source counts only on its own interface. Where no rule can tell (a port of a bridge,
    an interface that is not known), or it is another one, a worker looks at the source: what it
    accepts is the socket's, by the mark that it bears already.
    """
    yield f"-A {_SOCKET} -m set --match-set {bound_set(family)} src,src -g {_LOCAL}"
    yield f"-A {_SOCKET} -m set --match-set {INTERFACES} src,src -g {_ASKED}"
    yield f"-A {_SOCKET} -m set --match-set {managed_set(family)} src -g {_ASKED}"
    yield f"-A {_SOCKET} -g {_LOCAL}"
    yield f"-A {_LOCAL} -j MARK --set-xmark {config.marks.of(Kind.LOCAL)}"
    yield f"-A {_LOCAL} -j ACCEPT"
    yield f"-A {_ASKED} -j MARK --set-xmark {config.marks.of(Kind.LOCAL)}"
    yield f"-A {_ASKED} -j {_queue(config)}"


def _offloaded(config: RulesetConfig, rule: str) -> Iterator[str]:
    """Yield the way of packets of flows that the kernel carries, or shall carry."""
    offload = config.marks.any_of(Kind.OFFLOAD)
    yield f"{rule} -m mark --mark {offload} -j {_OFFLOAD}"
    yield f"{_carried(config, rule)} -j {_BYPASS}"
    # For flows of which it has not seen every packet, a worker relies on the kernel's opinion.
    suspect = config.marks.of(Kind.SUSPECT)
    yield f"{rule} -m conntrack --ctstate INVALID -j MARK --set-xmark {suspect}"


def _carried(config: RulesetConfig, rule: str) -> str:
    """Return a rule without its target, for packets of flows that the kernel may carry."""
    offload = config.marks.any_of(Kind.OFFLOAD)
    return f"{rule} -m conntrack --ctstate ESTABLISHED -m connmark --mark {offload}"


def _unmarked(config: RulesetConfig) -> str:
    """Return what matches packets that bear no mark of ours."""
    return f"-m mark --mark {config.marks.any_of(Kind.NONE)}"


def _generation_chains(config: RulesetConfig, family: Family) -> Iterator[str]:
    """Yield the content of the two chains that know the generation.

    A worker of an older snapshot may still mark by an older generation: its packet was accepted,
    its mark is forgotten.
    """
    nothing = config.marks.of(Kind.NONE)
    if config.generation is not None:
        present = config.marks.of(Kind.OFFLOAD, config.generation)
        yield (
            f"-A {_OFFLOAD} -m mark --mark {present} -j CONNMARK --save-mark "
            f"--nfmask {present.mask:#x} --ctmask {present.mask:#x}"
        )
        yield f"-A {_BYPASS} -m connmark ! --mark {present} -j RETURN"
        yield f"-A {_BYPASS} -p tcp -m tcp ! --tcp-flags SYN,FIN,RST NONE -g {_RECALLED}"
        yield f"-A {_BYPASS} -m set --match-set {bound_set(family)} src,src -j ACCEPT"
        yield f"-A {_BYPASS} -m set --match-set {INTERFACES} src,src -j RETURN"
        yield f"-A {_BYPASS} -m set --match-set {homed_set(family)} src -j RETURN"
        yield f"-A {_BYPASS} -j ACCEPT"
    yield f"-A {_OFFLOAD} -j MARK --set-xmark {nothing}"
    yield f"-A {_OFFLOAD} -j ACCEPT"


def _passed_on(config: RulesetConfig, rule: str) -> Iterator[str]:
    """Yield the way to each worker that another one may send a packet to."""
    for number in range(passing_count(config.marks, config.queue_count)):
        mark = config.marks.of(Kind.PASS_ON, number)
        yield (f"{rule} -m mark --mark {mark} -j NFQUEUE --queue-num {config.first_queue + number}")


def passing_count(marks: Marks, queue_count: int) -> int:
    """Return how many workers, from number 0 on, can be sent a packet by PASS_ON."""
    return min(queue_count, marks.number_count) if queue_count > 1 else 0


def _path_messages(family: Family) -> tuple[str, ...]:
    """Return the ICMP errors that the proxy's own TCP needs (RFC 1191, RFC 8201).

    The state is asked for first: xt_icmp silently drops what is too short to have a type, but a
    truncated packet is for the worker to drop, with a reason, and is never RELATED.
    """
    related = "-m conntrack --ctstate RELATED"
    if family is Family.IPV4:
        return (f"-p icmp {related} -m icmp --icmp-type destination-unreachable",)
    return (
        f"-p ipv6-icmp {related} -m icmp6 --icmpv6-type destination-unreachable",
        f"-p ipv6-icmp {related} -m icmp6 --icmpv6-type packet-too-big",
    )


def _queue(config: RulesetConfig) -> str:
    """Return the target that queues a packet."""
    if config.queue_count == 1:
        return f"NFQUEUE --queue-num {config.first_queue}"
    last = config.first_queue + config.queue_count - 1
    return f"NFQUEUE --queue-balance {config.first_queue}:{last}"


# --- routing ----------------------------------------------------------------------------------


def routing_rules(config: RulesetConfig) -> tuple[RoutingRule, ...]:
    """Return the `ip rule`s of each family: what the proxy owns, and what goes to it from here."""
    return tuple(
        RoutingRule(config.rule_priority + index, str(config.marks.of(kind)), config.route_table)
        for index, kind in enumerate((Kind.LOCAL, Kind.TO_PROXY))
    )


def local_route(config: RulesetConfig) -> list[str]:
    """Return the arguments of `ip`, after the family, that deliver every address on this host."""
    return ["route", "replace", "local", "default", "dev", "lo", "table", str(config.route_table)]
