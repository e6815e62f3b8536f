"""Liars beside the path of a flow whose numbers the worker does not know, only the kernel.

That is so while the kernel carries the flow, and after a worker has died, until the flow's next
packet. The liar knows addresses and ports, and guesses numbers (RFC 5961, RFC 5927).
"""

import random
from collections.abc import Iterator

import datapath_rig
import pytest
from scapy.layers.inet import ICMP, IP, TCP
from scapy.packet import Raw
from test_attacks import Victim
from traffic import carries, eventually, exchange, token

from firewall.policy.verdict import DropReason

rig = datapath_rig.rig
pytestmark = pytest.mark.needs("nfqueue", "nfqueue6", "connmark", "ipset", "set", "conntrack-tool")

SEED = 20261128
ENOUGH = 12
"""Exchanges after which a flow is the kernel's: see AFTER_COUNT in firewall/datapath/offload.py."""


def states(one: "datapath_rig.Rig") -> list[object]:
    return [row["state"] for row in one.ask("conntrack") if row["protocol"] == "tcp"]


def is_carried(one: "datapath_rig.Rig") -> bool:
    return any("OFFLOAD" in row["flags"] for row in one.ask("conntrack"))


@pytest.fixture
def carried(rig) -> Iterator[Victim]:
    """A connection a -> s that the kernel carries; w is beside the path."""
    one = rig(hosts={"a": "app=a", "s": "app=s", "w": "app=w"}, outside=("s", "w"), bypass=True)
    one.start()
    one.publish()
    victim = Victim(one)
    talk(victim, ENOUGH)
    eventually(lambda: is_carried(one), "the kernel carries the connection")
    yield victim
    victim.client.close()
    victim.server.__exit__()


def talk(victim: Victim, times: int = 1) -> None:
    """Exchange something, and keep count of the numbers."""
    for _ in range(times):
        word = token()
        assert exchange(victim.client, victim.accepted, word)
        victim.server_next += len(word)
        victim.client_next += len(word)


def arrives(victim: Victim, packet: bytes, at: str) -> None:
    """Send a forged packet and wait until the host has it."""
    host = victim.one.lab.host(at)
    with host.capture() as capture:
        victim.w.send(packet)
        capture.expect(lambda data: data[9] == packet[9] and data[20:28] == packet[20:28])


def test_a_reset_within_the_window_of_a_carried_flow_changes_nothing(carried: Victim) -> None:
    """RFC 5961 3.2: its receiver challenges it; the flow must outlive that."""
    for ahead in (1, 100, 20_000):
        arrives(carried, carried.segment("R", carried.server_next + ahead), "a")
        eventually(lambda: states(carried.one) == ["ESTABLISHED"], "the connection lives")
        talk(carried)
    talk(carried, ENOUGH)
    eventually(lambda: is_carried(carried.one), "the kernel carries it again")


def test_the_exact_reset_of_a_carried_flow_ends_it(carried: Victim) -> None:
    arrives(carried, carried.segment("R", carried.server_next), "a")
    eventually(lambda: "ESTABLISHED" not in states(carried.one), "the connection is over")


def test_a_fin_from_before_the_window_of_a_carried_flow_changes_nothing(carried: Victim) -> None:
    """The kernel lets it pass and does not believe it; its receiver drops it."""
    old = carried.segment("FA", carried.server_next - 100_000, carried.client_next)
    arrives(carried, old, "a")
    eventually(lambda: states(carried.one) == ["ESTABLISHED"], "the connection lives")
    talk(carried)


def test_resets_and_data_after_a_workers_death_change_nothing(rig) -> None:
    """The next worker knows the flow by the kernel's table, and its numbers not yet."""
    one = rig(hosts={"a": "app=a", "s": "app=s", "w": "app=w"}, outside=("s", "w"))
    one.start()
    one.publish()
    victim = Victim(one)
    one.stop(9)
    one.start()
    chance = random.Random(SEED)
    far = [victim.server_next + (1 << 20) + chance.getrandbits(30) for _ in range(50)]
    for number in far:
        victim.w.send(victim.segment("R", number))
        victim.w.send(victim.segment("PA", number, victim.client_next, b"lie"))
        victim.w.send(victim.segment("A", number, chance.getrandbits(32)))
    arrives(victim, victim.segment("R", victim.server_next + 100), "a")
    eventually(lambda: states(one) == ["ESTABLISHED"], "the connection lives")
    talk(victim)
    victim.still_talks()
    victim.client.close()
    victim.server.__exit__()


def test_what_was_acknowledged_before_a_workers_death_is_so_after_it(rig) -> None:
    """It was lost with the worker: the next one meets the flow at a repeated segment.

    The answer to it acknowledges more than that segment, which the worker has not seen.
    """
    one = rig(hosts={"a": "app=a", "s": "app=s", "w": "app=w"}, outside=("s", "w"))
    one.start()
    one.publish()
    victim = Victim(one)
    numbers = {"seq": victim.client_next, "ack": victim.server_next}
    talk(victim, 2)
    one.stop(9)
    one.start()
    ends = IP(src=victim.a.address4, dst=victim.s.address4)
    repeated = ends / TCP(sport=victim.port, dport=80, flags="PA", **numbers) / Raw(b"again")
    with victim.a.capture() as capture:
        victim.a.send(bytes(repeated))
        capture.expect(lambda data: data[9] == 6 and IP(data)[TCP].ack == victim.client_next)
    talk(victim)
    victim.client.close()
    victim.server.__exit__()


def test_an_error_about_a_carried_flow_must_quote_what_is_in_flight(carried: Victim) -> None:
    """RFC 5927 4.1, for flows whose numbers only the kernel has seen."""
    last = token()
    chance = random.Random(SEED)
    with carried.a.capture() as capture:
        for _ in range(10):
            number = (carried.client_next + 100_000 + chance.getrandbits(31)) % 2**32
            quoted = IP(src=carried.a.address4, dst=carried.s.address4) / TCP(
                sport=carried.port, dport=80, seq=number, flags="A"
            )
            ends = IP(src=carried.s.address4, dst=carried.a.address4)
            carried.w.send(bytes(ends / ICMP(type=3, code=1) / Raw(bytes(quoted)[:28])))
        carried.accepted.sendall(last)
        capture.expect(carries(last))
        assert not [data for data in capture.so_far() if data[9] == 1]
    assert carried.client.recv(100) == last


def test_an_error_about_a_segment_that_is_sent_again_comes_through(carried: Victim) -> None:
    """The first one brings the flow back from the kernel; its numbers come with the repetition."""
    dropping = ["iptables", "-A", "INPUT", "-p", "tcp", "-j", "DROP"]  # the path is gone
    carried.s.run(dropping, check=True)
    ends = IP(src=carried.s.address4, dst=carried.a.address4)
    word = token()
    with carried.s.capture() as lost, carried.a.capture() as capture:
        carried.client.sendall(word)
        segment = lost.expect(carries(word))
        carried.w.send(bytes(ends / ICMP(type=3, code=1) / Raw(segment[:28])))
        eventually(lambda: not is_carried(carried.one), "the flow is brought back")
        with carried.s.capture() as repeated:
            repeated.expect(carries(word), what="the segment once more")
        carried.w.send(bytes(ends / ICMP(type=3, code=1) / Raw(segment[:28])))
        capture.expect(lambda data: data[9] == 1, what="the error")


@pytest.mark.parametrize("outside", ["s", "a"], ids=["opened-here", "opened-there"])
def test_a_liar_with_both_addresses_cannot_begin_a_carried_flow_anew(rig, outside: str) -> None:
    """A SYN and the SYN/ACK that answers it: the kernel would believe the two.

    One of them bears an endpoint's address, and comes from elsewhere. The ends' own answers are
    held back meanwhile.
    """
    hosts = {"a": "app=a", "s": "app=s", "w": "app=w"}
    one = rig(hosts=hosts, outside=(outside, "w"), bypass=True)
    one.start()
    one.publish(datapath_rig.Rule(None, "s"))
    victim = Victim(one)
    talk(victim, ENOUGH)
    eventually(lambda: is_carried(one), "the kernel carries the connection")
    a, s, node = victim.a, victim.s, one.lab.node
    silence = ["PREROUTING", "-s", f"{a.address4},{s.address4}", "-m", "set", "--match-set"]
    silence += ["bartizan-bound-4", "src,src", "-j", "DROP"]
    node.run(["iptables", "-t", "raw", "-A", *silence], check=True)
    listen = a if outside == "s" else s
    for quarter in range(4):
        number = (quarter << 30) + 7_000_000
        ends = {"sport": victim.port, "dport": 80, "flags": "S", "seq": number}
        first = bytes(IP(src=a.address4, dst=s.address4) / TCP(**ends))
        second = victim.segment("SA", 9_000_000, number + 1)
        seen = second if outside == "s" else first
        with listen.capture() as capture:
            victim.w.send(first)
            victim.w.send(second)
            capture.expect(lambda data, seen=seen: data[20:28] == seen[20:28])
    one.dropped(DropReason.INVALID_SOURCE_IP, count=4)
    lines = node.run(["conntrack", "-L", "-p", "tcp"], check=True).stdout.splitlines()
    assert [line.split()[3] for line in lines] == ["ESTABLISHED"], lines
    node.run(["iptables", "-t", "raw", "-D", *silence], check=True)
    talk(victim, ENOUGH)
    victim.client.close()
    victim.server.__exit__()
