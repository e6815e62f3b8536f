"""What `bartizan replay` says about packets: the datapath's verdicts, by the capture's clock."""

import json

import pytest
from click.testing import CliRunner
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import IPv6, IPv6ExtHdrFragment, fragment6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw
from scapy.utils import PcapWriter

from firewall.cli import main
from firewall.cli.exits import ExitCode

A, B, W = "10.0.1.1", "10.0.1.2", "198.51.100.9"
A6, B6 = "fd00::1", "fd00::2"

ENDPOINTS = f"""
- {{name: a, addresses: [{A}, "{A6}"], labels: [app=a]}}
- {{name: b, addresses: [{B}, "{B6}"], labels: [app=b], ports: [http:80]}}
"""
POLICY = """apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web, namespace: default}
spec:
  endpointSelector: {matchLabels: {app: b}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: a}}]
    toPorts: [{ports: [{port: http, protocol: TCP}]}]
  - fromEndpoints: [{matchLabels: {app: a}}]
    toPorts: [{ports: [{port: "81", protocol: TCP}], rules: {http: [{method: GET}]}}]
  - fromEndpoints: [{matchLabels: {app: a}}]
    toPorts: [{ports: [{port: "53", protocol: UDP}]}]
  ingressDeny:
  - toPorts: [{ports: [{port: "22", protocol: TCP}]}]
"""


class Stage:
    """Files of one replay."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "endpoints.yaml").write_text(ENDPOINTS)
        (folder / "policies").mkdir()
        (folder / "policies/web.yaml").write_text(POLICY)
        self.capture = folder / "capture.pcap"

    def write(self, *packets):
        """Write packets 10 ms apart, or at the times that are given with them."""
        with PcapWriter(str(self.capture), linktype=1, nano=True) as sink:
            for number, one in enumerate(packets):
                at_s, packet = one if isinstance(one, tuple) else (number * 0.01, one)
                frame = packet if Ether in packet else Ether() / packet
                frame.time = 1_700_000_000 + at_s
                sink.write(frame)

    def run(self, *options, output="json"):
        argv = [
            "replay", str(self.capture), "--endpoints", str(self.folder / "endpoints.yaml"),
            "--policies", str(self.folder / "policies"), "-o", output, *options,
        ]  # fmt: skip
        return CliRunner().invoke(main, argv)

    def rows(self, *packets, options=()):
        self.write(*packets)
        done = self.run(*options)
        assert done.exit_code == 0, done.output
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def segment(source, destination, sport, dport, flags, seq=0, ack=0, payload=b""):  # noqa: PLR0917
    layer = IPv6 if ":" in source else IP
    packet = layer(src=source, dst=destination) / TCP(
        sport=sport, dport=dport, flags=flags, seq=seq, ack=ack
    )
    return packet / Raw(payload) if payload else packet


def connection(port, source=A, destination=B):
    return [
        segment(source, destination, 4000, port, "S", 100),
        segment(destination, source, port, 4000, "SA", 500, 101),
        segment(source, destination, 4000, port, "A", 101, 501),
        segment(source, destination, 4000, port, "PA", 101, 501, b"hello"),
        segment(destination, source, port, 4000, "FA", 501, 106),
    ]


def column(rows, *names):
    return [tuple(row[name] for name in names) for row in rows]


@pytest.mark.parametrize(("source", "destination"), [(A, B), (A6, B6)])
def test_a_connection_is_followed_from_its_first_packet_to_its_end(stage, source, destination):
    rows = stage.rows(*connection(80, source, destination))
    assert column(rows, "number", "conntrack", "tcp_state", "verdict", "reason") == [
        (1, "NEW", "SYN_SENT", "accept", "policy"),
        (2, "REPLY", "SYN_RECV", "accept", "established"),
        (3, "ESTABLISHED", "ESTABLISHED", "accept", "established"),
        (4, "ESTABLISHED", "ESTABLISHED", "accept", "established"),
        (5, "REPLY", "FIN_WAIT", "accept", "established"),
    ]
    assert rows[0]["rule"] == f"CiliumNetworkPolicy default/web {stage.folder}/policies/web.yaml:8"
    assert rows[0]["time"] == "1700000000.000000000"


def test_a_drop_names_reason_and_rule(stage):
    (denied, closed, stray) = stage.rows(
        segment(A, B, 4000, 22, "S"), segment(A, B, 4000, 8080, "S"), segment(A, B, 4001, 80, "A")
    )
    assert (denied["verdict"], denied["reason"]) == ("drop", "POLICY_DENY")
    assert denied["rule"].endswith("policies/web.yaml:14")
    assert (closed["verdict"], closed["reason"]) == ("drop", "POLICY_DENIED")
    assert closed["detail"] == "no ingress rule allows it"
    assert closed["tcp_state"] == ""
    assert (stray["conntrack"], stray["reason"]) == ("INVALID", "INVALID_PACKET_DROPPED")
    assert stray["rule"] == ""


def test_a_dropped_packet_leaves_no_flow(stage):
    rows = stage.rows(segment(A, B, 4000, 22, "S", 1), segment(B, A, 22, 4000, "SA", 1, 2))
    assert column(rows, "conntrack", "verdict") == [("NEW", "drop"), ("INVALID", "drop")]


def test_a_redirected_flow_is_shown_with_both_its_sides(stage):
    """What answers stands for the proxy; what the proxy would not send is refused."""
    rows = stage.rows(*connection(81)[:4], segment(B, A, 81, 4000, "R", 99999))
    assert column(rows, "conntrack", "tcp_state", "verdict") == [
        ("NEW", "SYN_SENT", "redirect"),
        ("REPLY", "SYN_RECV", "accept"),
        ("ESTABLISHED", "ESTABLISHED", "redirect"),
        ("ESTABLISHED", "ESTABLISHED", "redirect"),
        ("INVALID", "ESTABLISHED", "drop"),
    ]


def test_the_time_of_the_capture_is_the_clock(stage):
    """UDP flows end 30 s after their last packet, streams 120 s (STRICT_TIMEOUTS)."""
    query = IP(src=A, dst=B) / UDP(sport=4000, dport=53) / Raw(b"?")
    answer = IP(src=B, dst=A) / UDP(sport=53, dport=4000) / Raw(b"!")
    rows = stage.rows((0, query), (29, answer), (58.9, query), (178.8, answer), (299, answer))
    assert [row["conntrack"] for row in rows] == ["NEW", "REPLY", "ESTABLISHED", "REPLY", "NEW"]


def test_time_that_runs_backwards_is_harmless(stage):
    rows = stage.rows((50.0, connection(80)[0]), (10.0, connection(80)[1]))
    assert column(rows, "conntrack") == [("NEW",), ("REPLY",)]


def test_icmp_errors_are_related_to_their_flow(stage):
    query = IP(src=A, dst=B) / UDP(sport=4000, dport=53) / Raw(b"?")
    error = IP(src=B, dst=A) / ICMP(type=3, code=3) / Raw(bytes(query))
    rows = stage.rows(query, error)
    assert column(rows[1:], "conntrack", "verdict", "reason") == [("RELATED", "accept", "related")]


def test_fragments_are_put_together_before_they_are_judged(stage):
    """IPv4 and IPv6; only the last piece of a datagram has a class."""
    four = fragment(IP(src=A, dst=B, id=7) / UDP(sport=1, dport=53) / Raw(b"x" * 3000))
    six = fragment6(
        IPv6(src=A6, dst=B6) / IPv6ExtHdrFragment(id=9) / UDP(sport=1, dport=53) / Raw(b"x" * 3000),
        1280,
    )
    rows = stage.rows(*four, *reversed(six))
    assert [row["conntrack"] for row in rows] == ["", "", "NEW", "", "", "NEW"]
    assert {row["verdict"] for row in rows if row["conntrack"]} == {"accept"}
    assert rows[0]["detail"] == "fragment: waits for the others"


def test_overlapping_fragments_are_dropped_with_all_that_follow(stage):
    """RFC 5722: the whole datagram."""
    pieces = fragment(IP(src=A, dst=B, id=7) / UDP(sport=1, dport=53) / Raw(b"x" * 40), 16)
    other = IP(src=A, dst=B, id=7, flags="MF", frag=1, proto=17) / Raw(b"y" * 16)
    rows = stage.rows(pieces[0], other, *pieces[1:])
    assert rows[1]["verdict"] == "drop"
    assert rows[1]["reason"] == "IP_FRAGMENTATION_NOT_SUPPORTED"
    assert {row["conntrack"] for row in rows} == {""}


def test_old_pieces_do_not_complete_a_new_datagram(stage):
    """net.ipv4.ipfrag_time: 30 s."""
    pieces = fragment(IP(src=A, dst=B, id=7) / UDP(sport=1, dport=53) / Raw(b"x" * 40), 24)
    rows = stage.rows((0, pieces[0]), (31, pieces[1]))
    assert {row["conntrack"] for row in rows} == {""}


def test_frames_that_are_no_packets_keep_their_number(stage):
    rows = stage.rows(Ether() / ARP(), connection(80)[0])
    assert column(rows, "number", "conntrack", "detail") == [
        (1, "", "not IP: ARP"),
        (2, "NEW", ""),
    ]


def test_bytes_that_are_no_packet_are_invalid_and_dropped(stage):
    (row,) = stage.rows(Ether(type=0x0800) / Raw(b"\x45" + bytes(19)))
    assert (row["conntrack"], row["verdict"], row["reason"]) == (
        "INVALID",
        "drop",
        "INVALID_PACKET_DROPPED",
    )


def test_profile_and_loose_change_what_opens_a_flow(stage):
    """STRICT never, and LINUX by its own default, take a segment from the middle of a flow."""
    middle = segment(A, B, 4000, 80, "A", 5, 5)
    got = [stage.rows(middle, options=o)[0]["conntrack"] for o in ((), ("--loose",))]
    assert got == ["INVALID", "NEW"]
    half = [segment(A, B, 4000, 80, "S", 100), segment(B, A, 80, 4000, "SA", 500, 51)]
    strict, linux = (stage.rows(*half, options=o)[1] for o in ((), ("--profile", "linux")))
    assert (strict["conntrack"], linux["conntrack"]) == ("INVALID", "REPLY")


def test_the_node_has_an_identity_of_its_own(stage):
    """allow-localhost: the node reaches its endpoints whatever policy says (Cilium's default)."""
    packet = segment(W, B, 4000, 8080, "S")
    (world,) = stage.rows(packet)
    (node,) = stage.rows(packet, options=("--node-address", W))
    assert (world["verdict"], node["verdict"]) == ("drop", "accept")


def test_a_file_that_is_no_capture_is_refused(stage):
    stage.capture.write_bytes(b"PK\x03\x04 something else")
    done = stage.run()
    assert done.exit_code == ExitCode.INVALID
    assert f"Error: {stage.capture}: offset 0: packet 1: neither pcap nor pcapng" in done.stderr


def test_a_cut_capture_shows_what_came_before_and_fails(stage):
    stage.write(*connection(80))
    data = stage.capture.read_bytes()
    stage.capture.write_bytes(data[:-1])
    done = stage.run()
    assert done.exit_code == ExitCode.INVALID
    assert len(done.stdout.splitlines()) == 4
    assert f"{stage.capture}: offset " in done.stderr
    assert ": packet 5: cut: the packet has 53 of 54 bytes" in done.stderr


def test_packets_of_a_capture_with_a_limit_are_judged_by_their_head(stage):
    """`tcpdump -s 60`: headers are there, the payload is not."""
    opening = connection(80)
    long = segment(A, B, 4000, 80, "PA", 101, 501, b"x" * 900)
    with PcapWriter(str(stage.capture), linktype=1) as sink:
        sink.write_header(None)
        for packet in (*opening[:3], long):
            frame = bytes(Ether() / packet)
            sink.write_packet(
                frame[:60], sec=1, usec=0, caplen=min(60, len(frame)), wirelen=len(frame)
            )
    done = stage.run()
    assert done.exit_code == 0, done.output
    last = json.loads(done.stdout.splitlines()[-1])
    assert (last["conntrack"], last["verdict"]) == ("ESTABLISHED", "accept")


def test_the_table_has_a_line_per_packet(stage):
    stage.write(*connection(80))
    lines = stage.run(output="table").stdout.splitlines()
    assert lines[0].split() == [
        "NUMBER", "TIME", "SOURCE", "DESTINATION", "PROTOCOL", "CONNTRACK", "STATE", "VERDICT",
        "REASON", "RULE",
    ]  # fmt: skip
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3", "4", "5"]
    assert "SYN_RECV" in lines[2]


def test_an_invalid_policy_stops_before_the_first_packet(stage):
    stage.write(*connection(80))
    (stage.folder / "policies/web.yaml").write_text(POLICY.replace("ingress:", "ingres:"))
    done = stage.run()
    assert done.exit_code == ExitCode.INVALID
    assert done.stdout == ""
    assert "web.yaml:6:" in done.stderr
