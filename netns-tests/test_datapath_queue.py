"""The queue itself, against the kernel: every packet leaves with one verdict, whatever happens."""

import subprocess
import sys

import datapath_rig
import pytest
from datapath_rig import ROOT, Rule
from evidence import queued, waiting_count
from traffic import carries, delivered, eventually, token, udp

rig = datapath_rig.rig
pytestmark = pytest.mark.needs("nfqueue", "ipset", "set")

READER = """
import select, sys
from firewall.datapath.nfqueue import Queue

def judge(packet, hook, indev, physindev, mark, payload):
    if b"fail" in payload:
        raise ZeroDivisionError
    if b"late" in payload:
        queue.accept(packet)
        raise ZeroDivisionError
    if b"drop" in payload:
        queue.drop(packet)
    else:
        queue.accept(packet)

queue = Queue(0, judge, length=64)
limit = 4 if "few" in sys.argv else 128
print("bound", flush=True)
if "wait" in sys.argv:
    sys.stdin.readline()
while True:
    select.select([queue], [], [], 5)
    try:
        read = queue.receive(limit)
    except ZeroDivisionError:
        print("failed", flush=True)
    else:
        print(f"read {read} refused {queue.refused_count}", flush=True)
"""


def reader(rig, *words) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", READER, *words]
    child = rig.lab.node.popen(argv, stdin=subprocess.PIPE, env={"PYTHONPATH": str(ROOT)})
    assert child.stdout.readline() == "bound\n"
    return child


def go(child: subprocess.Popen[str]) -> None:
    child.stdin.write("go\n")
    child.stdin.flush()


def test_a_failing_callback_costs_its_packet_and_no_other(rig):
    """Accepts are sent in batches up to a packet's number: a failure in between is not accepted."""
    one = rig()
    a, b = one.lab.host("a"), one.lab.host("b")
    reader(one)
    with b.capture() as capture:
        words = [b"one", b"fail", b"two", b"drop", b"three", b"late", b"four", b"fail", b"five"]
        packets = [bytes(udp(a, b, 53, b"%s.%d" % (word, n))) for n, word in enumerate(words)]
        a.send(*packets)
        for wanted in (b"one.0", b"two.2", b"three.4", b"late.5", b"four.6", b"five.8"):
            capture.expect(carries(wanted))
        seen = b"".join(capture.so_far())
        assert b"fail" not in seen and b"drop" not in seen
    eventually(lambda: waiting_count(one.lab.node) == 0, "none waits")


def test_a_full_queue_drops_and_the_kernel_counts_it(rig):
    one = rig()
    a, b = one.lab.host("a"), one.lab.host("b")
    child = reader(one, "wait")
    a.send(*(bytes(udp(a, b, 53, b"x")) for _ in range(100)))
    counters = "c = kernel.read_queues()[0]; print(c.depth, c.kernel_dropped, c.packet_count)"
    numbers = lambda: tuple(map(int, one.kernel(counters).split()))
    # The link's own IPv6 messages are queued as well.
    full = lambda: (found := numbers())[0] == found[2] == 64 and found[1] >= 36
    eventually(full, "64 wait, the others were dropped")
    go(child)
    eventually(lambda: waiting_count(one.lab.node) == 0, "the queue is worked off")


def test_a_turn_ends_after_its_number_of_messages(rig):
    one = rig()
    a, b = one.lab.host("a"), one.lab.host("b")
    child = reader(one, "wait", "few")
    a.send(*(bytes(udp(a, b, 53, b"x")) for _ in range(10)))
    eventually(lambda: queued(one.lab.node) >= 10, "ten packets wait")
    go(child)
    counts = [int(child.stdout.readline().split()[1]) for _ in range(3)]
    assert counts[:2] == [4, 4] and 2 <= counts[2] <= 4


def test_verdicts_for_packets_that_the_kernel_has_dropped_are_counted(rig):
    """Deleting any base chain flushes every queue of the namespace (kube-network-policies#402)."""
    one = rig()
    a, b = one.lab.host("a"), one.lab.host("b")
    nft = [
        "nft",
        "add table ip other; add chain ip other c { type filter hook output priority 0; }",
    ]
    one.lab.node.run(nft, check=True)
    child = reader(one, "wait", "few")
    a.send(*(bytes(udp(a, b, 53, b"drop")) for _ in range(10)))
    eventually(lambda: queued(one.lab.node) >= 10, "ten packets wait")
    one.lab.node.run(["nft", "delete table ip other"], check=True)
    a.send(bytes(udp(a, b, 53, b"end")))
    go(child)
    refused = 0
    while refused < 10:  # each of the ten drops by itself, and the accepts by the batch
        said = child.stdout.readline()
        assert said.startswith("read ") and int(said.split()[1]) <= 4, said
        refused = int(said.split()[-1])


def test_a_second_reader_is_told_who_has_the_queue(rig):
    one = rig()
    first = reader(one)
    argv = [sys.executable, "-c", READER]
    done = one.lab.node.run(argv, env={"PYTHONPATH": str(ROOT)})
    assert "another socket reads it" in done.stderr
    assert str(first.pid) in done.stderr


def test_a_packet_larger_than_the_copy_range_passes_whole(rig):
    one = rig()
    one.start()
    one.publish(Rule("a", "b"))
    a, b = one.lab.host("a"), one.lab.host("b")
    payload = token() + b"x" * 1300
    assert len(delivered(a, b, udp(a, b, 53, payload), payload)) == 28 + len(payload)


def test_nothing_is_left_after_removal(rig):
    one = rig(proxy_port=10080, workers=2)
    shown = ["iptables-save", "ip6tables-save", "ipset save", "ip rule", "ip -6 rule"]
    shown += ["ip route show table all", "ip -6 route show table all", "nft list tables"]

    def state() -> str:
        return "".join(one.lab.node.run(command.split()).stdout for command in shown)

    assert "BARTIZAN" in state() and "bartizan" in state() and "17953" in state()
    one.kernel("assert kernel.is_installed()", "kernel.install(config)")
    one.kernel(*["kernel.remove(config)"] * 2, "assert not kernel.is_installed()")
    one.kernel(*["kernel.remove_tables()"] * 2)
    assert not any(word in state() for word in ("BARTIZAN", "bartizan", "17953"))


def test_installing_again_interrupts_nothing_and_keeps_the_users_rules(rig):
    one = rig()
    one.start()
    one.publish(Rule("a", "b"))
    a, b = one.lab.host("a"), one.lab.host("b")
    user = ["iptables", "-t", "mangle", "-I", "PREROUTING", "-s", "192.0.2.1", "-j", "DROP"]
    one.lab.node.run(user, check=True)
    one.lab.node.run(["ipset", "create", "users", "hash:ip"], check=True)
    before = one.lab.node.run(["ipset", "save"], check=True).stdout
    one.update_sets()
    assert one.lab.node.run(["ipset", "save"], check=True).stdout == before
    one.kernel("assert not kernel.is_installed()", *["kernel.install(config)"] * 2)
    saved = one.lab.node.run(["iptables-save", "-t", "mangle"]).stdout.splitlines()
    rules = [line for line in saved if line.startswith("-A PREROUTING")]
    assert rules == [
        "-A PREROUTING -j BARTIZAN-PREROUTING",
        "-A PREROUTING -s 192.0.2.1/32 -j DROP",
    ]
    payload = token()
    delivered(a, b, udp(a, b, 53, payload), payload)
