"""What happens to policy and to open connections when something changes or dies."""

import os
import signal

import pytest
from evidence import dropped, workers
from rules import peers, policy, ports
from traffic import DEADLINE_S, Echo, delivered, eventually, exchange, token, udp

OPEN = policy("app=b", ingress=[{**peers("app=a"), **ports("80/TCP", "53/UDP")}])
OTHER = policy("app=b", ingress=[{**peers("app=c"), **ports("80/TCP", "53/UDP")}])


@pytest.fixture
def three(lab, bartizan):
    """a may reach b, c may not."""
    made = lab(a="app=a", b="app=b", c="app=c")
    made.firewall = bartizan(made)
    made.firewall.apply(OPEN)
    return made


def _passes(sender, receiver) -> None:
    payload = token()
    delivered(sender, receiver, udp(sender, receiver, 53, payload), payload)


def _is_denied(firewall, sender, receiver) -> None:
    packet = udp(sender, receiver, 53, token())
    sender.send(bytes(packet))
    dropped(firewall, packet)


def test_another_label_is_another_identity_with_its_own_rights(three):
    """c becomes app=a and may; back to app=c, and may not. The numbers differ, and come back."""
    b, c = three.host("b"), three.host("c")
    before = three.firewall.endpoint("c")["identity"]["id"]
    _is_denied(three.firewall, c, b)
    three.firewall.relabel("c", app="a")
    during = three.firewall.endpoint("c")["identity"]["id"]
    _passes(c, b)
    three.firewall.relabel("c", app="c")
    assert three.firewall.endpoint("c")["identity"]["id"] == before
    _is_denied(three.firewall, c, b)
    assert during == three.firewall.endpoint("a")["identity"]["id"] != before


def test_a_label_that_is_taken_away_cuts_the_open_connection(three):
    """Permission is the identity's, not the connection's."""
    a, b = three.host("a"), three.host("b")
    with Echo(b, 80) as server, a.connect(b.address4, 80) as client:
        connection = server.accept()
        for _ in range(20):  # long enough for the kernel to pass it without asking
            assert exchange(client, connection, token())
        three.firewall.relabel("a", app="exile")
        connection.settimeout(1.0)
        assert not exchange(client, connection, token())


def test_a_policy_that_replaces_another_governs_open_and_new_flows(three):
    """Same name, other peer: a's connection stops, c may connect."""
    a, b, c = (three.host(name) for name in "abc")
    with Echo(b, 80) as server, a.connect(b.address4, 80) as client:
        connection = server.accept()
        assert exchange(client, connection, token())
        three.firewall.apply(OTHER)
        connection.settimeout(1.0)
        assert not exchange(client, connection, token())
    _passes(c, b)
    _is_denied(three.firewall, a, b)


def test_without_its_policy_an_endpoint_is_open_again(three):
    """Deleting the last policy ends the isolation."""
    b, c = three.host("b"), three.host("c")
    _is_denied(three.firewall, c, b)
    three.firewall.withdraw("CiliumNetworkPolicy", "rule")
    _passes(c, b)


def test_with_the_agent_killed_the_workers_decide_as_before(three):
    """The agent is never in the way of a packet; a new one adopts the workers."""
    a, b, c = (three.host(name) for name in "abc")
    with Echo(b, 80) as server, a.connect(b.address4, 80) as client:
        connection = server.accept()
        assert exchange(client, connection, token())
        pids = workers(three.firewall)
        identity = three.firewall.endpoint("a")["identity"]["id"]
        three.firewall.kill()
        assert exchange(client, connection, token())
        _passes(a, b)
        refused = token()
        with b.capture() as at_b:
            c.send(bytes(udp(c, b, 53, refused)))
            payload = token()
            delivered(a, b, udp(a, b, 53, payload), payload)
            assert not [p for p in at_b.so_far() if refused in p]
        three.firewall.start()
        assert workers(three.firewall) == pids
        assert three.firewall.endpoint("a")["identity"]["id"] == identity
        assert exchange(client, connection, token())
    _is_denied(three.firewall, c, b)


def test_a_daemon_that_was_stopped_comes_back_with_identities_policy_and_connections(three):
    """SIGTERM takes the rules away; the next start knows endpoints, numbers and policies."""
    a, b, c = (three.host(name) for name in "abc")
    with Echo(b, 80) as server, a.connect(b.address4, 80) as client:
        connection = server.accept()
        assert exchange(client, connection, token())
        rows = {name: three.firewall.endpoint(name)["identity"] for name in "abc"}
        assert three.firewall.stop() == 0
        rules = three.node.run(["iptables-save", "-t", "mangle"]).stdout
        assert "NFQUEUE" not in rules
        three.firewall.start()
        assert {name: three.firewall.endpoint(name)["identity"] for name in "abc"} == rows
        assert exchange(client, connection, token())
    _passes(a, b)
    _is_denied(three.firewall, c, b)


def test_a_signal_that_comes_twice_at_once_still_removes_the_rules(three):
    """`timeout` signals the process and then its group: that is one wish, not impatience."""
    process = three.firewall.process
    for _ in range(20):
        process.send_signal(signal.SIGTERM)
    assert three.firewall.stop() == 0
    assert "NFQUEUE" not in three.node.run(["iptables-save", "-t", "mangle"]).stdout


@pytest.mark.parametrize("kind", ["datapath"])
def test_a_killed_worker_is_replaced_and_no_connection_breaks(three, kind):
    """kill -9: fails closed for a moment, then a new worker decides by the same snapshot."""
    a, b, c = (three.host(name) for name in "abc")
    with Echo(b, 80) as server, a.connect(b.address4, 80) as client:
        connection = server.accept()
        assert exchange(client, connection, token())
        before = workers(three.firewall)
        for (what, _), pid in before.items():
            if what == kind:
                os.kill(pid, signal.SIGKILL)

        def replaced() -> bool:
            rows = three.firewall.get("/v1/status")["workers"]
            return all(
                row["pid"] and row["pid"] != before[row["kind"], row["number"]]
                for row in rows
                if row["kind"] == kind
            )

        eventually(replaced, "every killed worker is replaced")
        connection.settimeout(DEADLINE_S)
        assert exchange(client, connection, token())
    _passes(a, b)
    _is_denied(three.firewall, c, b)
