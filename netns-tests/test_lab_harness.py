"""The lab itself, without a firewall: what tests stand on must be true first."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP
from traffic import (
    DEADLINE_S,
    FAMILIES,
    V4,
    Echo,
    carries,
    curl,
    delivered,
    echo,
    eventually,
    is_tcp,
    tcp,
    token,
    udp,
)

from lab import enclosure, topology
from lab.laboratory import LabError
from lab.namespaces import NAMED
from lab.wire import NothingArrivedError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("family", FAMILIES, ids=["ipv4", "ipv6"])
def test_a_datagram_crosses_the_node_unchanged_but_for_its_hop_limit(lab, family):
    """Routed, not bridged: one hop fewer, and source and destination as sent."""
    two = lab(a="app=a", b="app=b")
    a, b = two.host("a"), two.host("b")
    payload = token()
    arrived = delivered(a, b, udp(a, b, 9, payload, family=family), payload)
    hop_limit = arrived[8] if family == V4 else arrived[7]
    assert hop_limit == 63
    source = arrived[12:16] if family == V4 else arrived[8:24]
    assert source == socket.inet_pton(family, a.address(family))


@pytest.mark.parametrize("family", FAMILIES, ids=["ipv4", "ipv6"])
def test_the_first_packet_passes_preroutings_hook_exactly_once(lab, family):
    """A rule in the node's mangle/PREROUTING counts one packet for one packet sent."""
    two = lab(a="app=a", b="app=b")
    a, b = two.host("a"), two.host("b")
    program = "iptables" if family == V4 else "ip6tables"
    rule = ["-t", "mangle", "-A", "PREROUTING", "-p", "udp", "--dport", "9", "-j", "ACCEPT"]
    two.node.run([program, *rule], check=True)
    payload = token()
    delivered(a, b, udp(a, b, 9, payload, family=family), payload)
    saved = two.node.run([f"{program}-save", "-c", "-t", "mangle"]).stdout
    counted = next(line for line in saved.splitlines() if "--dport 9" in line)
    assert counted.startswith("[1:")


@pytest.mark.parametrize("family", FAMILIES, ids=["ipv4", "ipv6"])
def test_an_echo_request_sent_as_bytes_is_answered_by_the_other_hosts_kernel(lab, family):
    """What scapy builds is a real packet: the peer's stack replies to it."""
    two = lab(a="app=a", b="app=b")
    a, b = two.host("a"), two.host("b")
    payload = token()
    with a.capture() as capture:
        a.send(bytes(echo(a, b, payload, family=family)))
        answer = capture.expect(carries(payload))
    source = answer[12:16] if family == V4 else answer[8:24]
    assert source == socket.inet_pton(family, b.address(family))


@pytest.mark.parametrize("family", FAMILIES, ids=["ipv4", "ipv6"])
def test_sockets_opened_from_the_test_live_in_their_hosts(lab, family):
    """Two hosts listen on one port; each gets its own connection."""
    three = lab(a="", b="", c="")
    a, b, c = (three.host(name) for name in "abc")
    with Echo(b, 80, family) as at_b, Echo(c, 80, family) as at_c:
        for server, host in ((at_b, b), (at_c, c)):
            with a.connect(host.address(family), 80) as client:
                connection = server.accept()
                assert connection.getpeername()[0] == a.address(family)
                assert client.getpeername()[0] == host.address(family)


def test_a_spoofed_source_reaches_the_other_host_when_nothing_forbids_it(lab):
    """rp_filter is off: dropping spoofed packets must be the firewall's merit."""
    three = lab(a="", b="", c="")
    a, b, c = (three.host(name) for name in "abc")
    payload = token()
    arrived = delivered(a, b, udp(c, b, 9, payload), payload)
    assert arrived[12:16] == socket.inet_aton(c.address4)


def test_awaiting_what_never_comes_ends_at_the_deadline_and_shows_what_came(lab):
    """A failing test says what it saw instead."""
    two = lab(a="", b="")
    a, b = two.host("a"), two.host("b")
    with b.capture() as capture:
        a.send(bytes(tcp(a, b, 80)))
        capture.expect(is_tcp(port=80))
        with pytest.raises(NothingArrivedError) as caught:
            capture.expect(carries(b"never"), within_s=0.2)
    assert any(IP(packet)[TCP].dport == 80 for packet in caught.value.seen if packet[0] >> 4 == 4)


@pytest.mark.needs("curl")
def test_names_resolve_in_every_host_and_processes_of_the_topology_run(lab):
    """`NAME.NAMESPACE.svc.cluster.local` and extra names lead to a server of the YAML."""
    plan = topology.parse(
        """
        hosts:
          client: {}
          server:
            namespace: shop
            names: [shop.example]
            processes: [[python3, -m, http.server, "80", --directory, /proc/sys/net/ipv4/neigh]]
        """
    )
    two = lab(plan)
    for name in ("server", "server.shop", "server.shop.svc.cluster.local", "shop.example"):
        reached = eventually(
            lambda name=name: curl(two.host("client"), f"http://{name}/")[1] == "200", name
        )
        assert reached


def test_closing_a_lab_leaves_no_namespace_process_name_or_file(lab):
    """Also what daemonised itself into a session of its own is ended."""
    hosts_before = Path("/etc/hosts").read_text()
    two = lab(a="", b="")
    run = two.host("a").popen(["sh", "-c", "setsid sleep 1000 & trap '' TERM; echo up; sleep 1000"])
    assert run.stdout.readline() == "up\n"
    inode, folder = two.host("a").netns.inode, two.folder
    two.close()
    assert not list(NAMED.iterdir())
    assert Path("/etc/hosts").read_text() == hosts_before
    assert not folder.exists()
    assert inode not in _namespaces_in_use()


def _namespaces_in_use() -> set[int]:
    found = set()
    for entry in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(entry.stat().st_ino)
        except OSError:
            continue
    return found


def test_a_lab_outside_of_an_enclosure_is_refused(lab, monkeypatch):
    """Nothing is ever made in the machine's own namespaces."""
    monkeypatch.setattr(enclosure, "_MARKER", Path("/nonexistent"))
    with pytest.raises(LabError, match=r"lab\.enclosure"):
        lab(a="")


def _enclosed(*arguments: str, **options) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "lab.enclosure", "--quiet", *arguments],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("how", [[], ["--user"]], ids=["root", "user"])
@pytest.mark.parametrize("victim", ["outer", "init", "starter"])
def test_killing_any_process_of_an_enclosure_ends_all_of_it(how, victim):
    """SIGKILL to the outer process, to pid 1 inside, or to whoever started it."""
    # A shell that waits is the starter; it prints its child's pid, the outer process.
    script = (
        f'"{sys.executable}" -m lab.enclosure --quiet {" ".join(how)} -- sleep 1000 & echo $!; wait'
    )
    starter = subprocess.Popen(
        ["sh", "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    outer = int(starter.stdout.readline())
    family = eventually(lambda: _descendants(outer, 2), "init and sleep run")
    target = {"outer": outer, "init": family[0], "starter": starter.pid}[victim]
    os.kill(target, signal.SIGKILL)
    starter.wait(DEADLINE_S)
    eventually(
        lambda: not any(_alive(pid) for pid in (outer, *family)), "every process of it has ended"
    )
    starter.stdout.close()


def _descendants(pid: int, count: int) -> list[int] | None:
    found: list[int] = []
    while len(found) < count:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if not children:
            return None
        pid = int(children[0])
        found.append(pid)
    return found


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_an_enclosure_ends_with_its_commands_exit_code():
    """Also with 128 + the number of the signal that ended it."""
    for script, code in (("exit 7", 7), ("kill -TERM $$", 143), ("true", 0)):
        run = _enclosed("--", "sh", "-c", script)
        assert run.wait(DEADLINE_S) == code
        run.stdout.close()


def test_sigterm_to_an_enclosure_reaches_the_command():
    """So that `timeout 60 python -m lab.enclosure ...` lets the command clean up."""
    script = "trap 'echo ended; exit 5' TERM; echo ready; while :; do read x; done"
    run = _enclosed("--", "sh", "-c", script, stdin=subprocess.PIPE)
    assert run.stdout.readline() == "ready\n"
    run.send_signal(signal.SIGTERM)
    assert run.wait(DEADLINE_S) == 5
    assert run.stdout.read() == "ended\n"
    run.stdout.close()
    run.stdin.close()


def test_an_ordinary_user_gets_a_lab_too():
    """The user namespace gives what a lab needs: links, routes, packet sockets, iptables."""
    script = (
        "from lab.laboratory import Lab\n"
        "from lab import topology, enclosure\n"
        "with Lab(topology.hosts(a='', b='')) as lab:\n"
        "    for address in lab.host('b').addresses:\n"
        "        lab.host('a').run(['ping', '-c1', '-W30', address], check=True)\n"
        "    rule = ['-t', 'mangle', '-A', 'PREROUTING', '-j', 'ACCEPT']\n"
        "    lab.node.run(['iptables', *rule], check=True)\n"
        "print(enclosure.mode())\n"
    )
    run = _enclosed("--user", "--", sys.executable, "-c", script)
    said = run.communicate(timeout=DEADLINE_S)[0]
    assert run.returncode == 0
    assert said == "user\n"


def test_where_user_namespaces_are_forbidden_the_error_names_the_sysctl():
    """Exit 3. The limit is set inside a user namespace, so it is not this machine's."""
    inner = f'"{sys.executable}" -m lab.enclosure --quiet --user -- true'
    script = f"echo 0 > /proc/sys/user/max_user_namespaces && {inner}; echo exit $?"
    run = _enclosed("--user", "--", "sh", "-c", script, stderr=subprocess.STDOUT)
    said = run.communicate(timeout=DEADLINE_S)[0]
    assert "sudo sysctl -w user.max_user_namespaces=" in said
    assert said.endswith("exit 3\n")
