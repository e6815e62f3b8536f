"""Packets through the kernel's queue, a real worker, and out again, or not."""

import signal

import datapath_rig
import pytest
from datapath_rig import Rule
from evidence import waiting_count
from scapy.layers import inet
from scapy.layers.inet import IP
from scapy.layers.inet6 import ICMPv6ND_RA, ICMPv6PacketTooBig, IPv6
from traffic import (
    DEADLINE_S,
    FAMILIES,
    V4,
    Echo,
    carries,
    delivered,
    echo,
    eventually,
    exchange,
    tcp,
    token,
    udp,
)

from firewall.control.messages import Announce
from firewall.datapath.marks import Kind, Marks
from firewall.policy.verdict import DropReason, Verdict

rig = datapath_rig.rig
pytestmark = pytest.mark.needs("nfqueue", "nfqueue6", "tproxy", "socket", "ipset", "set", "ipv6")

TCP, UDP, ICMP, ICMPV6 = 6, 17, 1, 58


def refused(client, address, port) -> bool:
    """Whether a connection fails within a second."""
    try:
        client.connect(address, port, timeout_s=1.0).close()
    except (TimeoutError, ConnectionError):
        return True
    return False


@pytest.mark.parametrize("family", FAMILIES)
def test_an_allowed_connection_passes_in_both_directions(rig, family):
    """Replies need no rule: only a -> b is allowed."""
    one = rig()
    one.start()
    one.publish(Rule("a", "b", TCP, (80, 80)))
    a, b = one.lab.host("a"), one.lab.host("b")
    with Echo(b, 80, family) as server:
        client = a.connect(b.address(family), 80)
        accepted = server.accept()
        assert exchange(client, accepted, b"x" * 100_000)
        client.close()
    event = one.event(lambda e: e.verdict == Verdict.ACCEPT and e.protocol == TCP)
    assert (event.source_identity, event.destination_identity) == (1000, 1001)
    assert event.ingress_allowed_by[0].name == "test"
    assert one.drop_count() == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_connection_without_permission_is_dropped_and_reported(rig, family):
    one = rig()
    one.start()
    one.publish(Rule("a", "b", TCP, (80, 80)))
    a, b = one.lab.host("a"), one.lab.host("b")
    with Echo(b, 81, family), Echo(a, 80, family):
        assert refused(a, b.address(family), 81)
        assert refused(b, a.address(family), 80)
    event = one.dropped(DropReason.POLICY_DENIED)
    assert event.isolated_by[0].name == "test"


@pytest.mark.parametrize("family", FAMILIES)
def test_datagrams_and_their_answers_pass_but_unasked_ones_do_not(rig, family):
    one = rig()
    one.start()
    one.publish(Rule("a", "b", UDP, (53, 53)))
    a, b = one.lab.host("a"), one.lab.host("b")
    asked, answered, unasked = token(), token(), token()
    delivered(a, b, udp(a, b, 53, asked, family=family, source_port=4000), asked)
    answer = udp(b, a, 4000, answered, family=family, source_port=53)
    with a.capture() as capture:
        b.send(bytes(udp(b, a, 4001, unasked, family=family, source_port=53)))
        b.send(bytes(answer))
        capture.expect(carries(answered))
        assert not any(unasked in packet for packet in capture.so_far())
    one.dropped(DropReason.POLICY_DENIED)


@pytest.mark.parametrize("family", FAMILIES)
def test_echo_passes_by_its_type_and_the_reply_by_the_flow(rig, family):
    """Policy's port of an ICMP message is its type."""
    request = 8 if family == V4 else 128
    one = rig()
    one.start()
    one.publish(Rule("a", "b", ICMP if family == V4 else ICMPV6, (request, request)))
    a, b = one.lab.host("a"), one.lab.host("b")
    done = a.run(["ping", "-c", "2", "-i", "0.2", "-W", "30", b.address(family)])
    assert done.returncode == 0, done.stdout + done.stderr
    unasked = token()
    b.send(bytes(echo(b, a, unasked, family=family, reply=True)))
    one.dropped(DropReason.INVALID_PACKET_DROPPED)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unsolicited_syn_ack_is_no_reply(rig, family):
    one = rig()
    one.start()
    one.publish(Rule("a", "b"), Rule("b", "a", TCP, (80, 80)))
    a, b = one.lab.host("a"), one.lab.host("b")
    b.send(bytes(tcp(b, a, 4002, family=family, source_port=80, flags="SA")))
    event = one.dropped(DropReason.INVALID_PACKET_DROPPED)
    assert event.source_port == 80


@pytest.mark.parametrize("family", FAMILIES)
def test_a_foreign_source_address_is_dropped_as_spoofed(rig, family):
    one = rig(hosts={"a": "app=a", "b": "app=b", "c": "app=c"})
    one.start()
    one.publish(Rule(None, "b"))
    a, b, c = (one.lab.host(name) for name in "abc")
    payload, stranger, own = token(), token(), token()
    unknown = "10.77.0.1" if family == V4 else "fd77::1"
    with b.capture() as capture:
        c.send(bytes(udp(a, b, 53, payload, family=family)))
        c.send(bytes(udp(unknown, b, 53, stranger, family=family)))
        c.send(bytes(udp(c, b, 53, own, family=family)))
        capture.expect(carries(own))
        seen = b"".join(capture.so_far())
        assert payload not in seen and stranger not in seen
    one.dropped(DropReason.INVALID_SOURCE_IP, "not an address of default/c", 2)
    # The one who lied is named, not the one who was impersonated.
    assert one.dropped(DropReason.INVALID_SOURCE_IP).source_identity == 1002


def test_a_managed_address_from_the_world_is_dropped_as_spoofed(rig):
    one = rig(hosts={"a": "app=a", "b": "app=b", "w": "app=w"}, outside=("w",))
    one.start()
    one.publish(Rule(None, "b"))
    a, b, w = (one.lab.host(name) for name in "abw")
    for family in FAMILIES:
        w.send(bytes(udp(a, b, 53, token(), family=family)))
        own = token()
        delivered(w, b, udp(w, b, 53, own, family=family), own)
    one.dropped(DropReason.INVALID_SOURCE_IP, "belongs to default/a", 2)


def test_a_lost_permission_stops_a_live_connection(rig):
    one = rig()
    one.start()
    one.publish(Rule("a", "b", TCP, (80, 80)))
    a, b = one.lab.host("a"), one.lab.host("b")
    with Echo(b, 80) as server:
        client = a.connect(b.address4, 80)
        accepted = server.accept()
        assert exchange(client, accepted, b"before")
        one.publish()
        client.settimeout(0.5)
        accepted.settimeout(0.5)
        assert not exchange(client, accepted, b"after!")
        one.dropped(DropReason.POLICY_DENIED)
        one.publish(Rule("a", "b", TCP, (80, 80)))
        accepted.settimeout(DEADLINE_S)
        assert accepted.recv(6) == b"after!"  # retransmitted by the client's kernel
        client.close()


def test_without_a_snapshot_everything_is_dropped_until_one_is_announced(rig):
    one = rig()
    one.start()
    assert one.links[0].hello.revision == 0
    a, b = one.lab.host("a"), one.lab.host("b")
    a.send(bytes(udp(a, b, 53, token())))
    eventually(
        lambda: one.metric("drop_count_total", reason="DROP_EP_NOT_READY") >= 1, "the drop counts"
    )
    one.publish(Rule("a", "b"))
    payload = token()
    delivered(a, b, udp(a, b, 53, payload), payload)


def test_a_worker_decides_by_the_file_without_any_agent(rig):
    one = rig()
    one.write(one.build(Rule("a", "b", UDP)))
    one.start(connect=False)
    eventually((one.folder / "datapath-0.sock").exists, "the worker listens")
    a, b = one.lab.host("a"), one.lab.host("b")
    payload = token()
    delivered(a, b, udp(a, b, 53, payload), payload)
    one.connect()
    assert one.links[0].hello.revision == 1


def test_a_damaged_snapshot_is_refused_and_the_one_before_stays(rig):
    one = rig()
    one.start()
    one.publish(Rule("a", "b", UDP))
    one.snapshot.write_bytes(one.snapshot.read_bytes()[:-1])
    link = one.links[0]
    link.say(Announce(7, str(one.snapshot)))

    def refusal():
        link.listen()
        return next((a for a in link.acknowledged if a.error), None)

    assert "cut short" in eventually(refusal, "a refusal").error
    a, b = one.lab.host("a"), one.lab.host("b")
    payload = token()
    delivered(a, b, udp(a, b, 53, payload), payload)


def test_a_worker_drains_and_stops_cleanly(rig):
    one = rig()
    one.start()
    one.publish()
    assert one.drain() == [0]
    assert not (one.folder / "datapath-0.sock").exists()
    one.start()
    assert one.stop(signal.SIGTERM) == [0]


def test_with_no_worker_nothing_passes(rig):
    """Fail closed: NFQUEUE without --queue-bypass."""
    one = rig()
    a, b = one.lab.host("a"), one.lab.host("b")
    with Echo(b, 80):
        assert refused(a, b.address4, 80)


@pytest.mark.parametrize("family", FAMILIES)
def test_fragments_are_judged_whole(rig, family):
    """The rules switch the kernel's reassembly on; a datagram of 4,000 bytes takes 3 fragments."""
    one = rig()
    one.start()
    one.publish(Rule("a", "b", UDP, (53, 53)))
    a, b = one.lab.host("a"), one.lab.host("b")
    receiver = b.datagram(53, family=family)
    other = b.datagram(54, family=family)
    sender = a.datagram(family=family)
    receiver.settimeout(DEADLINE_S)
    other.settimeout(0.3)
    payload = bytes(range(250)) * 16
    sender.sendto(payload, (b.address(family), 54))
    sender.sendto(payload, (b.address(family), 53))
    assert receiver.recv(65536) == payload
    with pytest.raises(TimeoutError):
        other.recv(65536)
    event = one.dropped(DropReason.POLICY_DENIED)
    assert event.length > 4000
    for opened in (receiver, other, sender):
        opened.close()


def test_neighbour_discovery_works_while_everything_is_denied(rig):
    one = rig()
    one.start()
    one.publish()
    a, b = one.lab.host("a"), one.lab.host("b")
    one.lab.node.run(["ip", "-6", "neigh", "flush", "dev", a.interface])
    a.run(["ip", "-6", "neigh", "flush", "dev", "eth0"])
    refused_by_policy = a.run(["ping", "-c", "1", "-W", "1", b.address6])
    assert refused_by_policy.returncode != 0
    one.dropped(DropReason.POLICY_DENIED)
    assert one.metric("drop_count_total", reason="FORBIDDEN_ICMP6_MESSAGE") == 0


def test_an_endpoint_may_not_advertise_a_router(rig):
    """CVE-2020-10749."""

    one = rig()
    one.start()
    one.publish()
    a = one.lab.host("a")
    a.send(bytes(IPv6(src="fe80::2", dst="ff02::1", hlim=255) / ICMPv6ND_RA(routerlifetime=9000)))
    one.dropped(DropReason.FORBIDDEN_ICMP6_MESSAGE, "no router")


def test_a_port_unreachable_comes_back_to_who_asked(rig):
    one = rig()
    one.start()
    one.publish(Rule("a", "b", UDP))
    a, b = one.lab.host("a"), one.lab.host("b")
    for family in FAMILIES:
        client = a.datagram(family=family)
        client.connect((b.address(family), 9))
        client.send(b"x")
        client.settimeout(DEADLINE_S)
        with pytest.raises(ConnectionRefusedError):
            client.recv(10)
        client.close()


def test_a_router_on_the_way_may_report_a_small_mtu(rig):
    one = rig(hosts={"a": "app=a", "b": "app=b", "r": "app=r"}, outside=("r",), workers=2)
    one.start()
    one.publish(Rule("a", "b", UDP))
    a, b, r = (one.lab.host(name) for name in "abr")

    for family in FAMILIES:
        payload = token()
        datagram = udp(a, b, 53, payload, family=family)
        delivered(a, b, datagram, payload)
        if family == V4:
            error = IP(src=r.address4, dst=a.address4) / inet.ICMP(type=3, code=4, nexthopmtu=1400)
        else:
            error = IPv6(src=r.address6, dst=a.address6) / ICMPv6PacketTooBig(mtu=1400)
        with a.capture() as capture:
            r.send(bytes(error / bytes(datagram)))
            capture.expect(carries(payload))


def passed_on(one, hook: str) -> int:
    """How many packets were queued in a hook because one worker had sent them to another."""
    rules = ["iptables", "-t", "mangle", "-nvxL", f"BARTIZAN-{hook}"]
    marks = [f"mark match {Marks().of(Kind.PASS_ON, number)} " for number in range(3)]
    lines = one.lab.node.run(rules, check=True).stdout.splitlines()
    found = [line for line in lines if any(mark in line for mark in marks)]
    assert len(found) == len(marks)
    return sum(int(line.split()[0]) for line in found)


def test_an_error_finds_the_worker_that_tracks_its_flow(rig):
    """Time exceeded from a router hashes to any queue; PASS_ON brings it to the right one."""

    one = rig(hosts={"a": "app=a", "b": "app=b", "r": "app=r"}, outside=("r",), workers=3)
    one.start()
    one.publish(Rule("a", "b", UDP))
    a, b, r = (one.lab.host(name) for name in "abr")
    payload = token()
    datagram = udp(a, b, 53, payload)
    delivered(a, b, datagram, payload)
    for last in range(1, 9):
        error = IP(src=f"10.55.0.{last}", dst=a.address4) / inet.ICMP(type=11, code=0)
        with a.capture() as capture:
            r.send(bytes(error / bytes(datagram)))
            capture.expect(carries(payload), what=f"from router {last}")
    assert passed_on(one, "PREROUTING") > 0
    assert passed_on(one, "FORWARD") == 0  # who accepts a packet ends its mark
    unknown = udp(a, b, 54, token())
    r.send(bytes(IP(src=r.address4, dst=a.address4) / inet.ICMP(type=11) / bytes(unknown)))
    one.dropped(DropReason.INVALID_PACKET_DROPPED)


_BUGS = """
from conntrack.tracker import Tracker
from firewall.datapath.inquiry import Inquiry
from firewall.datapath.silence import Silence
from firewall.datapath.sweep import Sweep

def fail(*arguments):
    raise ZeroDivisionError("a bug")

Silence.round = Sweep.round = Inquiry.state = fail
"""


def test_bugs_beside_the_packets_do_not_end_the_worker(rig, tmp_path):
    """They are counted, and what they have to do with is not tried again without a pause."""
    (tmp_path / "sitecustomize.py").write_text(_BUGS)
    one = rig()
    one.path.insert(0, str(tmp_path))
    one.publish(Rule("a", "b", TCP))
    one.start()
    a, b = one.lab.host("a"), one.lab.host("b")
    with Echo(b, 80) as server, a.connect(b.address4, 80) as client:
        accepted = server.accept()
        assert exchange(client, accepted, token())
        one.generation += 1  # the silent ones are asked
        one.publish(Rule("a", "b", TCP))
        eventually(lambda: one.metric("internal_errors_total") >= 2, "bugs are counted")
        assert exchange(client, accepted, token())
    assert "ZeroDivisionError" in one.log()
    assert one.processes[0].poll() is None


def test_conntrack_rows_and_status_can_be_asked(rig):
    one = rig()
    one.start()
    one.publish(Rule("a", "b", UDP))
    a, b = one.lab.host("a"), one.lab.host("b")
    for port in range(1, 251):
        a.send(bytes(udp(a, b, port, b"x", source_port=5000)))
    rows = eventually(
        lambda: rows if len(rows := one.ask("conntrack")) == 250 else None, "250 flows"
    )
    row = next(row for row in rows if row["destination_port"] == 7)
    assert row["source"] == f"{a.address4}:5000"
    assert row["flags"] == ["UNREPLIED"]
    assert row["verdict"] == "accept"
    (status,) = one.ask("status")
    assert (status["flow_count"], status["gso"], status["revision"]) == (250, True, 1)


def test_many_events_without_a_reader_are_counted_as_lost(rig):
    one = rig()
    one.start()
    one.publish()
    a, b = one.lab.host("a"), one.lab.host("b")
    drop_count = 0

    def lost():
        """Send while nobody reads; each drop is counted as lost, or told to the next reader."""
        nonlocal drop_count
        one.disconnect()
        for port in range(1, 101):
            a.send(bytes(udp(a, b, port, b"x")))
        eventually(lambda: waiting_count(one.lab.node) == 0, "all are decided")
        one.connect()
        a.send(bytes(udp(a, b, 101, b"x")))
        one.dropped(DropReason.POLICY_DENIED)
        drop_count += 101
        assert one.metric("drop_count_total", reason="POLICY_DENIED") == drop_count
        (link,) = one.links
        told = lambda: link.lost_count + sum(e.verdict == Verdict.DROP for e in one.events())
        eventually(lambda: told() >= 101, "each is told or counted as lost")
        return link.lost_count

    eventually(lost, "a count of loss")


@pytest.mark.parametrize("family", FAMILIES)
def test_connections_survive_the_death_of_their_worker(rig, family):
    """kill -9: the kernel's table is what the next worker begins with; policy judges anew."""
    one = rig(workers=2)
    one.start()
    one.publish(Rule("a", "b", TCP, (80, 81)), Rule("a", "b", UDP))
    a, b = one.lab.host("a"), one.lab.host("b")
    address = b.address(family)
    with Echo(b, 80, family) as kept, Echo(b, 81, family) as lost:
        first, second = a.connect(address, 80), a.connect(address, 81)
        served, refused_now = kept.accept(), lost.accept()
        assert exchange(first, served, b"x" * 9000)
        assert exchange(second, refused_now, b"x" * 9000)
        answering = b.datagram(53, family=family)
        asking = a.datagram(family=family)
        asking.connect((address, 53))
        asking.send(b"question")
        _, asker = answering.recvfrom(100)
        one.stop(signal.SIGKILL)
        one.write(one.build(Rule("a", "b", TCP, (80, 80)), Rule("a", "b", UDP)))
        one.start()
        assert exchange(served, first, b"from the server's side")
        assert exchange(first, served, b"y" * 9000)
        answering.sendto(b"late answer", asker)
        asking.settimeout(DEADLINE_S)
        assert asking.recv(100) == b"late answer"
        second.send(b"no more")
        one.dropped(DropReason.POLICY_DENIED)
        for opened in (first, second, asking, answering):
            opened.close()
    unsolicited = tcp(b, a, 4003, family=family, source_port=80, flags="PA", payload=token())
    b.send(bytes(unsolicited))
    one.dropped(DropReason.INVALID_PACKET_DROPPED)
