"""What an operator sees of the datapath: counters of every worker, and the packets themselves."""

import os
import re
import signal
import subprocess

import pytest
from evidence import workers
from rules import peers, policy, ports
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.utils import PcapNgReader
from traffic import DEADLINE_S, V4, V6, Echo, delivered, eventually, exchange, token, udp

from firewall.datapath.offload import AFTER_COUNT
from lab.daemon import command

pytestmark = pytest.mark.needs("nfqueue", "nfqueue6", "tproxy", "socket", "connmark", "ipset")

OPEN = policy("app=b", ingress=[{**peers("app=a"), **ports("80/TCP", "53/UDP")}])


@pytest.fixture
def three(lab, bartizan):
    """a may reach b, c may not; two workers; the kernel carries established flows."""
    made = lab(a="app=a", b="app=b", c="app=c")
    made.firewall = bartizan(made, {"workers": 2})
    made.firewall.apply(OPEN)
    return made


def metrics(firewall, name, **labels):
    """The values of a metric's series that have these labels."""
    values = []
    for line in firewall.request("GET", "/v1/metrics")[1].decode().splitlines():
        found = re.fullmatch(rf"{name}(?:{{(.*)}})? (\S+)", line)
        if found and all(f'{key}="{value}"' in (found[1] or "") for key, value in labels.items()):
            values.append(float(found[2]))
    return values


def test_every_worker_tells_what_it_did_and_holds(three):
    """What was sent is found in the sums; status and metrics agree; both queues are named."""
    a, b, c, firewall = three.host("a"), three.host("b"), three.host("c"), three.firewall
    with Echo(b, 80) as server, a.connect(b.address4, 80) as client:
        connection = server.accept()
        for _ in range(20):
            assert exchange(client, connection, token())
        for _ in range(7):
            c.send(bytes(udp(c, b, 53, token())))

        def told():
            rows = firewall.get("/v1/status")["workers"]
            traffic = [row["traffic"] for row in rows if row["kind"] == "datapath"]
            sums = (
                sum(one["dropped"].get("POLICY_DENIED", 0) for one in traffic),
                sum(one["flows"].get("tcp ESTABLISHED", 0) for one in traffic),
                sum(one["flows_offloaded"] for one in traffic),
            )
            return traffic if sums == (7, 1, 1) else None

        traffic = eventually(told, "seven drops, one flow, carried")
        assert len(traffic) == 2
        assert sum(one["flows_evicted"] + one["flows_refused"] for one in traffic) == 0
        assert sum(one["accepted"] for one in traffic) >= AFTER_COUNT
        shown = firewall.cli("status").stdout
        assert "dropped (POLICY_DENIED 7" in shown
        assert "tcp ESTABLISHED 1" in shown
    assert sum(metrics(firewall, "cilium_drop_count_total", reason="POLICY_DENIED")) == 7
    for number in (0, 1):
        worker = f"datapath-{number}"
        for name in ("depth", "packets_total", "kernel_dropped_total", "user_dropped_total"):
            assert len(metrics(firewall, f"bartizan_nfqueue_{name}", worker=worker)) == 1
        for name in ("evicted_total", "refused_total", "expiry_lag_seconds", "offloaded"):
            (value,) = metrics(firewall, f"cilium_datapath_conntrack_{name}", worker=worker)
            assert value >= 0
    entries, limit = (
        metrics(firewall, f"bartizan_kernel_conntrack_{name}")[0] for name in ("entries", "limit")
    )
    assert 0 < entries < limit
    for name in ("dropped_total", "early_dropped_total", "clashed_total"):
        assert len(metrics(firewall, f"bartizan_kernel_conntrack_{name}")) == 1
    forwarded_count = sum(metrics(firewall, "cilium_forward_count_total"))
    assert sum(metrics(firewall, "bartizan_nfqueue_packets_total")) >= forwarded_count + 7


@pytest.fixture
def crowd(lab, bartizan):
    """Ten hosts that may reach b; three workers; the kernel carries established flows."""
    names = {f"h{number}": "app=a" for number in range(10)}
    made = lab(b="app=b", c="app=c", **names)
    made.firewall = bartizan(made, {"workers": 3})
    made.firewall.apply(OPEN)
    return made


def test_several_workers_are_one_firewall(crowd):
    """Flows of a pair meet in one worker, both ways; lists are sums; a revocation reaches all."""
    b, firewall = crowd.host("b"), crowd.firewall
    hosts = [crowd.host(f"h{number}") for number in range(10)]
    with Echo(b, 80) as server:
        pairs = []
        for host in hosts:
            for _ in range(3):
                client = host.connect(b.address4, 80)
                pairs.append((client, server.accept()))
        for client, accepted in pairs:
            for _ in range(15):
                assert exchange(client, accepted, token())

        def carried():
            rows = firewall.told("conntrack", "list", "--to", "b")
            return rows if all("OFFLOAD" in row["flags"] for row in rows) else None

        rows = eventually(carried, "the kernel carries all of them")
        assert len(rows) == len({row["source"] for row in rows}) == len(pairs)
        assert all(min(row["packets"]) > 15 for row in rows)
        homes = {}
        for row in rows:
            homes.setdefault(row["source_address"], set()).add(row["worker"])
        assert all(len(workers) == 1 for workers in homes.values())
        assert len(set.union(*homes.values())) > 1, "ten pairs of addresses, three queues"

        def carried_count():
            status = firewall.get("/v1/status")["workers"]
            traffic = [row["traffic"] for row in status if row["kind"] == "datapath"]
            return sum(one["flows_offloaded"] for one in traffic)

        eventually(lambda: carried_count() == len(pairs), "the status says so as well")
        firewall.apply(policy("app=b", ingress=[{}]))
        for client, accepted in pairs:
            accepted.settimeout(0.05)
            client.sendall(b"gone")
        for _, accepted in pairs:
            with pytest.raises(TimeoutError):
                accepted.recv(4)
        flushed = firewall.told("conntrack", "flush", "--to", "b")
        assert flushed["flows"] == len(pairs)
        for client, _ in pairs:
            client.close()


def watching(firewall):
    """The reader has said that every worker watches."""
    return firewall.get("/v1/status")["packet_readers"] == 1


def test_dropped_packets_become_a_capture_with_the_reason(three, tmp_path):
    """Both families, byte for byte; what passes is not among them; ^C ends the file well."""
    a, b, c, firewall = three.host("a"), three.host("b"), three.host("c"), three.firewall
    file = tmp_path / "drops.pcapng"
    argv = [*command(), "monitor", "--drops", "--pcap", file, "--protocol", "udp"]
    process = three.node.popen(argv, stderr=subprocess.PIPE, env=firewall.environment)
    eventually(lambda: watching(firewall), "somebody watches")
    sent = [bytes(udp(c, b, 53, token(), family=family)) for family in (V4, V6, V4)]
    for packet in sent:
        c.send(packet)
    payload = token()
    delivered(a, b, udp(a, b, 53, payload), payload)
    whole = 3
    eventually(lambda: len(_read(file)) == whole, "three packets are written")
    # A worker that starts while somebody watches is told so.
    pid = workers(firewall)["datapath", 0], workers(firewall)["datapath", 1]
    for one in pid:
        os.kill(one, signal.SIGKILL)

    def again():
        c.send(bytes(udp(c, b, 53, b"again")))
        return any(packet[UDP].load == b"again" for packet in _read(file))

    eventually(again, "the next workers' packets are written", every_s=0.2)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=DEADLINE_S)[1]
    assert process.returncode == 0
    assert re.fullmatch(r"\d+ packets, \d+ lost\n", said), said
    packets = _read(file)
    # Two workers tell of them, in any order.
    assert sorted(bytes(packet) for packet in packets[:whole]) == sorted(sent)
    assert {IP in packet or IPv6 in packet for packet in packets} == {True}
    for packet in packets:
        assert packet.comment.startswith(b"DENIED: POLICY_DENIED: no ingress rule allows it")
        assert b"default/c:" in packet.comment
    assert file.stat().st_mode & 0o777 == 0o600
    eventually(lambda: firewall.get("/v1/status")["packet_readers"] == 0, "nobody watches")


def _read(file):
    """The packets of a capture as far as it is written, as scapy reads them."""
    if not file.exists() or not file.stat().st_size:
        return []
    with PcapNgReader(str(file)) as packets:
        return list(packets)
