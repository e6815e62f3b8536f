"""Policy's decision about a flow, turned into what happens to the flow's packets.

A `Ruling` is kept in the tracker's entry together with the revision of the snapshot that it was
made by. `Ground` is everything that changes with a snapshot, so that a worker goes from one to the
next with a single store.
"""

from typing import Final, NamedTuple, assert_never

from conntrack.flow import ICMP, ICMPV6, TCP, UDP, FlowTuple
from conntrack.tracker import Entry
from firewall.datapath.admission import Admission
from firewall.datapath.verdict import ACCEPT, Accept, Drop, Redirect
from firewall.identities.reserved import Reserved
from firewall.policy.verdict import DropReason, Verdict
from firewall.policy.view import Decision, View

_PROXIED: Final = {
    "http": frozenset({TCP}),
    "tls": frozenset({TCP}),
    "dns": frozenset({TCP, UDP}),
}
"""Kinds of L7 rules that the proxy carries out, and over which protocols."""
_NO_PROXY: Final = DropReason.PROXY_REDIRECTION_NOT_SUPPORTED_FOR_PROTOCOL
_RULINGS_MAX_COUNT: Final = 16384  # about 0.3 kB each; a full memo is forgotten whole


class Ruling(NamedTuple):
    """What happens to the packets of a flow.

    Attributes:
        verdict: for packets of the ORIGINAL direction.
        decision: what policy said.
        source: packed address that policy was asked with (see `admission`).
        bypass: accepted, and nobody needs to see the packets: no L7 rules, no audit.
        severed: its packets passed directly, and may no longer; both ends are told by RST.
    """

    verdict: Accept | Drop | Redirect
    decision: Decision
    source: bytes
    bypass: bool = False
    severed: bool = False


class Ground:
    """One snapshot, ready to decide packets by.

    Attributes:
        view: answers of policy.
        revision: the snapshot's.
        admission: where addresses belong.
        homes: `admission.homes`, one step nearer for the hot path.
        proxy_port: where the L7 proxy listens, 0 = there is none.
        generation: the snapshot's; flows that were offloaded in another one are the worker's again.
        bypass: whether flows may be offloaded at all.
        path_mtu_allowed: ICMP "fragmentation needed" passes even if its flow is not known.
    """

    __slots__ = (
        "_rulings",
        "admission",
        "bypass",
        "generation",
        "homes",
        "path_mtu_allowed",
        "proxy_port",
        "revision",
        "view",
    )

    def __init__(self, view: View, *, bypass: bool = False) -> None:
        settings = view.snapshot.settings
        self.view = view
        self.revision = view.revision
        self.generation = view.generation
        self.bypass = bypass
        self.admission = Admission(view.snapshot.endpoints)
        self.homes = self.admission.homes
        self.proxy_port = settings.http_proxy_port
        self.path_mtu_allowed = settings.allow_icmp_frag_needed
        self._rulings: dict[tuple[bytes, bytes, int, int], Ruling] = {}

    def rule(self, source: bytes, destination: bytes, protocol: int, port: int) -> Ruling:
        """Rule on a flow by the addresses, protocol and policy port of its first packet."""
        key = source, destination, protocol, port
        ruling = self._rulings.get(key)
        if ruling is None:
            if len(self._rulings) >= _RULINGS_MAX_COUNT:
                self._rulings.clear()
            ruling = self._rulings[key] = self._rule(source, destination, protocol, port)
        return ruling

    def _rule(self, source: bytes, destination: bytes, protocol: int, port: int) -> Ruling:
        decision = self.view.decide(source, destination, protocol, port)
        verdict: Accept | Drop | Redirect
        match decision.verdict:
            case Verdict.ACCEPT:
                verdict = ACCEPT
            case Verdict.DROP:
                verdict = Drop(decision.reason or DropReason.POLICY_DENIED)
            case Verdict.REDIRECT:
                verdict = self._to_proxy(decision, protocol)
            case _:
                assert_never(decision.verdict)
        bypass = self.bypass and verdict is ACCEPT and _needs_no_look(decision)
        return Ruling(verdict, decision, source, bypass)

    def ruling_of(self, entry: Entry) -> tuple[Ruling, bool]:
        """Return a known flow's ruling, and whether it was made anew for this snapshot."""
        known = entry.decision
        if isinstance(known, Ruling) and entry.revision == self.revision:
            return known, False
        original = entry.original
        source = known.source if isinstance(known, Ruling) else original.source
        port = _policy_port(entry, original)
        ruling = self.rule(source, original.destination, original.protocol, port)
        entry.decision = ruling
        entry.revision = self.revision
        return ruling, True

    def proxies(self, source: bytes, destination: bytes, port: int) -> bool:
        """Say whether a TCP flow between these ends goes to the proxy."""
        if not self.proxy_port:
            return False
        return isinstance(self.rule(source, destination, TCP, port).verdict, Redirect)

    def is_node_alone(self, source: bytes, destination: bytes) -> bool:
        """Say whether this node is an endpoint, at one of these ends, and the other end is none."""
        ends = self.view.endpoint_at(source), self.view.endpoint_at(destination)
        there = [end for end in ends if end is not None]
        return len(there) == 1 and there[0].identity == Reserved.HOST

    def _to_proxy(self, decision: Decision, protocol: int) -> Redirect | Drop:
        """Redirect what the proxy can judge; anything else must not pass unjudged."""
        if not self.proxy_port:
            return Drop(_NO_PROXY, "no proxy is running")
        kinds = {
            row.kind
            for side in (decision.egress, decision.ingress)
            if side is not None
            for row in side.l7 or ()
        }
        if not kinds <= _PROXIED.keys():
            foreign = sorted(kinds - _PROXIED.keys())
            return Drop(_NO_PROXY, f"L7 rules of kind {', '.join(foreign)}")
        if "dns" in kinds and len(kinds) > 1:
            return Drop(_NO_PROXY, f"L7 rules of several kinds: {', '.join(sorted(kinds))}")
        if any(protocol not in _PROXIED[kind] for kind in kinds):
            return Drop(_NO_PROXY, f"{', '.join(kinds)} rules hold for TCP only")
        return Redirect(self.proxy_port)


def _needs_no_look(decision: Decision) -> bool:
    """Say whether an accepted flow has neither L7 rules nor an audit."""
    sides = (decision.egress, decision.ingress)
    return not decision.audited and all(side is None or side.l7 is None for side in sides)


def _policy_port(entry: Entry, original: FlowTuple) -> int:
    """Return what policy compares its port with, from the flow's first packet.

    The key of an ICMP query ends with identifier, type, code, protocol (`conntrack.packet`).
    """
    if original.protocol in (ICMP, ICMPV6):
        return entry.key[-3]
    return original.destination_port
