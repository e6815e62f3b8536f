"""Packets of flows whose numbers only the kernel knows: what they may do, what is asked after."""

import pytest
from datapath_world import A4, ALLOWED, B4, Carrier
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet import TCP as SEGMENT

from conntrack.address import parse_address
from conntrack.flow import TCP, FlowTuple
from conntrack.profile import LINUX, STRICT, Profile
from conntrack.tcp_states import TcpState
from firewall.datapath.doubts import Cause
from firewall.datapath.offload import AFTER_COUNT
from firewall.datapath.pipeline import OUTPUT
from firewall.datapath.verdict import ACCEPT, OFFLOAD, Drop
from firewall.policy.verdict import DropReason

ENDS = FlowTuple(parse_address(A4), parse_address(B4), TCP, 4000, 80)
FAR = 90_101  # what a says next, when the kernel has carried much
FAR_BACK = 70_501  # and b
CLOSE_S = 5  # TcpState.CLOSE in STRICT_TIMEOUTS


class Talk(Carrier):
    """A connection a -> b of which this worker does not know the numbers."""

    def __init__(self, *, carried: bool, profile: Profile = STRICT) -> None:
        super().__init__(ALLOWED, profile=profile)
        if carried:
            self.a("S", 100, 0)
            self.b("SA", 500, 101)
            assert OFFLOAD in [self.a("A", 101, 501) for _ in range(AFTER_COUNT)]
        else:
            self.tracker.restore(ENDS, self.now, timeout_s=3600, state=TcpState.ESTABLISHED)

    def a(self, flags: str, seq: int, ack: int, **how):
        ports = {"sport": 4000, "dport": 80}
        segment = SEGMENT(**ports, flags=flags, seq=seq, ack=ack)
        return self.feed(IP(src=A4, dst=B4) / segment, **how)

    def b(self, flags: str, seq: int, ack: int, **how):
        ports = {"sport": 80, "dport": 4000}
        segment = SEGMENT(**ports, flags=flags, seq=seq, ack=ack)
        return self.feed(IP(src=B4, dst=A4) / segment, **how)

    def unreachable(self, number: int, **how):
        """An error for a about its segment with this number."""
        quoted = bytes(IP(src=A4, dst=B4) / SEGMENT(sport=4000, dport=80, seq=number, flags="A"))
        return self.feed(IP(src=B4, dst=A4) / ICMP(type=3, code=1) / quoted[:28], **how)

    def told(self, state: TcpState | None) -> list[Cause]:
        """Have the kernel say the flow's state; what it was asked because of."""
        doubts = self.pipeline.doubts
        taken = doubts.take()
        for doubt in taken:
            doubts.settle(doubt, state, self.now)
        return [doubt.cause for doubt in taken]

    @property
    def state(self) -> TcpState:
        return TcpState(self.entry.state)


@pytest.fixture(params=[True, False], ids=["carried", "restored"])
def talk(request) -> Talk:
    return Talk(carried=request.param)


def test_a_reset_that_the_kernel_does_not_believe_changes_nothing(talk: Talk) -> None:
    """RFC 5961 3.2: it passes, so that its receiver may challenge it."""
    assert talk.b("R", FAR_BACK + 1, 0) is ACCEPT
    assert talk.state is TcpState.ESTABLISHED
    expires_at = talk.entry.expires_at
    assert talk.told(TcpState.ESTABLISHED) == [Cause.RESET]
    assert (talk.state, talk.entry.expires_at) == (TcpState.ESTABLISHED, expires_at)
    assert talk.a("A", FAR, FAR_BACK) in (ACCEPT, OFFLOAD)
    assert talk.b("A", FAR_BACK, FAR) in (ACCEPT, OFFLOAD)
    assert talk.told(None) == []


def test_a_reset_that_the_kernel_believes_ends_the_flow(talk: Talk) -> None:
    talk.b("R", FAR_BACK, 0)
    assert talk.told(TcpState.CLOSE) == [Cause.RESET]
    assert talk.state is TcpState.CLOSE
    assert talk.entry.expires_at <= talk.now + CLOSE_S


def test_a_reset_of_a_flow_that_the_kernel_has_lost_ends_it_unless_it_goes_on(talk: Talk) -> None:
    talk.b("R", FAR_BACK, 0)
    talk.told(None)
    assert talk.state is TcpState.ESTABLISHED
    assert talk.entry.expires_at <= talk.now + CLOSE_S
    assert talk.a("A", FAR, FAR_BACK) in (ACCEPT, OFFLOAD)
    assert talk.b("A", FAR_BACK, FAR) in (ACCEPT, OFFLOAD)
    assert talk.entry.expires_at > talk.now + CLOSE_S


def test_a_fin_that_the_kernel_does_not_believe_is_forgotten(talk: Talk) -> None:
    """From before the window: its receiver drops it, and so the kernel's tracker ignores it."""
    assert talk.b("FA", 7, FAR) is ACCEPT
    assert talk.told(TcpState.ESTABLISHED) == [Cause.FIN]
    assert talk.state is TcpState.ESTABLISHED
    assert talk.entry.expires_at > talk.now + 1000
    assert talk.a("A", FAR, FAR_BACK) in (ACCEPT, OFFLOAD)
    assert talk.b("A", FAR_BACK, FAR) in (ACCEPT, OFFLOAD)


@pytest.mark.parametrize("state", [TcpState.FIN_WAIT, TcpState.CLOSE_WAIT, TcpState.LAST_ACK, None])
def test_a_fin_that_the_kernel_believes_stays_with_its_number(talk: Talk, state) -> None:
    """The kernel may have seen more of the end than we; ours comes packet by packet."""
    talk.b("FA", FAR_BACK, FAR)
    assert talk.told(state) == [Cause.FIN]
    assert talk.state is TcpState.FIN_WAIT
    talk.a("A", FAR, FAR_BACK + 1)
    assert talk.state is TcpState.CLOSE_WAIT
    talk.a("FA", FAR, FAR_BACK + 1)
    talk.b("A", FAR_BACK + 1, FAR + 1)
    assert talk.state is TcpState.TIME_WAIT
    assert talk.told(state) == []


def test_what_the_kernel_calls_invalid_teaches_no_numbers(talk: Talk) -> None:
    """Reset, FIN, data: all are dropped until a packet has come that the kernel knows."""
    for flags in ("R", "FA", "A", "PA", "S", "SA"):
        verdict = talk.b(flags, 1, 1, suspect=True)
        assert isinstance(verdict, Drop), flags
        assert verdict.reason is DropReason.INVALID_PACKET_DROPPED
    assert talk.told(TcpState.CLOSE) == []
    assert talk.a("A", FAR, FAR_BACK) in (ACCEPT, OFFLOAD)


def test_after_a_return_only_what_the_kernel_knows_teaches_numbers() -> None:
    """A SYN brings a carried flow back; the lie behind it must not pass for its next packet."""
    talk = Talk(carried=True)
    talk.a("S", 7, 0)
    assert not talk.entry.offloaded
    assert isinstance(talk.b("PA", 1, 1, suspect=True), Drop)
    assert isinstance(talk.b("FA", 1, 1, suspect=True), Drop)
    assert talk.state is TcpState.ESTABLISHED
    assert talk.a("A", FAR, FAR_BACK) is OFFLOAD


def test_an_error_about_numbers_that_nobody_knows_is_dropped(talk: Talk) -> None:
    """RFC 5927 4.1: what cannot be compared is not believed."""
    carried = talk.entry.offloaded
    assert isinstance(talk.unreachable(FAR), Drop)
    assert [doubt.cause for doubt in talk.pipeline.doubts.take()] == [Cause.QUOTED] * carried


def test_an_error_about_a_flow_that_was_brought_back_is_judged_exactly() -> None:
    """The error is about a segment that is not acknowledged, and so sent again."""
    talk = Talk(carried=True)
    talk.pipeline.offloaded.keep(talk.entry)
    assert isinstance(talk.unreachable(FAR), Drop)
    assert talk.told(None) == []
    assert talk.a("PA", FAR, FAR_BACK) is ACCEPT
    assert talk.unreachable(FAR) is ACCEPT
    assert isinstance(talk.unreachable(FAR + 1_000_000), Drop)
    verdicts = [talk.a("PA", FAR, FAR_BACK) for _ in range(AFTER_COUNT)]
    assert [verdict is OFFLOAD for verdict in verdicts].index(True) >= AFTER_COUNT - 2


def test_an_error_of_this_node_itself_is_believed(talk: Talk) -> None:
    """Its kernel quotes a packet that it could not deliver."""
    assert talk.unreachable(FAR, hook=OUTPUT) is ACCEPT
    assert talk.told(None) == []


def test_the_linux_profile_gives_a_restored_flow_away_too() -> None:
    """It enforces no numbers of such a flow, so there are none to wait for."""
    talk = Talk(carried=False, profile=LINUX)
    verdicts = [talk.a("A", FAR, FAR_BACK) for _ in range(AFTER_COUNT)]
    verdicts += [talk.b("A", FAR_BACK, FAR)]
    assert OFFLOAD in verdicts


def test_the_linux_profile_goes_by_the_kernel_too() -> None:
    """It closes at once; the kernel has not."""
    talk = Talk(carried=True, profile=LINUX)
    assert talk.b("R", FAR_BACK + 1, 0) is ACCEPT
    assert talk.told(TcpState.ESTABLISHED) == [Cause.RESET]
    assert talk.state is TcpState.ESTABLISHED
    assert talk.entry.expires_at > talk.now + 1000
