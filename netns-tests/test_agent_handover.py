"""Proxy workers that are replaced or die: nobody is refused, only what they served can be lost."""

import os
import signal
import sys
import threading
from contextlib import closing

import pytest
import yaml
from evidence import workers
from rules import peers, policy, ports
from test_firewall_http import LANDING, _ask, _client
from traffic import DEADLINE_S, eventually

pytestmark = pytest.mark.needs("tproxy", "socket", "connmark")

OTHER_TEXT = "denied_body=Go away"


@pytest.fixture
def begun(served):
    """A client that will send the second half of its request later."""
    with closing(_client(served.host("a"), served.host("b").address4)) as client:
        client.request("POST", "/v1/request-landing", b"half of", {"Content-Length": "14"})
        yield client


@pytest.fixture
def served(lab, bartizan):
    """a may ask b's deathstar to land."""
    made = lab(a="app=a", b="app=b")
    made.host("b").start([sys.executable, "-m", "lab.demo.deathstar"])
    eventually(lambda: "operational" in made.host("b").log(), "the server runs")
    made.firewall = bartizan(made)
    made.firewall.apply(LANDING)
    return made


def visit(made, method, path):
    """One request on a connection of its own."""
    with closing(_client(made.host("a"), made.host("b").address4)) as client:
        return _ask(client, method, path)


class Visitors(threading.Thread):
    """One new connection after another, each with one request, until `stop`."""

    def __init__(self, made):
        super().__init__(daemon=True)
        self.made = made
        self.answers = []
        self.failures = []
        self._over = threading.Event()

    def run(self):
        while not self._over.is_set():
            try:
                self.answers.append(visit(self.made, "POST", "/v1/request-landing")[0])
            except OSError as error:
                self.failures.append(repr(error))

    def __enter__(self):
        self.start()
        eventually(lambda: len(self.answers) > 2, "visitors come")
        return self

    def __exit__(self, *_):
        before = len(self.answers)
        eventually(lambda: len(self.answers) > before + 2, "visitors still come")
        self._over.set()
        self.join(DEADLINE_S)


def proxies(firewall, state="running"):
    rows = firewall.get("/v1/status")["workers"]
    return {row["pid"] for row in rows if row["kind"] == "l7proxy" and row["state"] == state}


def configure(firewall, **proxy):
    document = yaml.safe_load(firewall.config_path.read_text())
    firewall.config_path.write_text(yaml.safe_dump(document | {"proxy": proxy}))


def denied(made):
    return visit(made, "GET", "/")[1]


def test_a_new_setting_is_in_force_after_sighup_and_no_connection_is_refused(served, begun):
    """The old process says goodbye to who is idle, and policy still reaches what it serves."""
    firewall = served.firewall
    old = proxies(firewall)
    configure(firewall, limits=[OTHER_TEXT])
    with Visitors(served) as visitors:
        os.kill(firewall.get("/v1/status")["agent"]["pid"], signal.SIGHUP)
        eventually(lambda: denied(served).startswith(b"Go away"), "the new text is said")
        eventually(lambda: proxies(firewall) and not proxies(firewall) & old, "it is another")
        assert proxies(firewall, "leaving") == old
    assert visitors.failures == []
    assert set(visitors.answers) == {200}
    begun.send(b" a body")
    answer = begun.getresponse()
    assert (answer.status, answer.read()) == (200, b"Ship landed\n")
    assert answer.headers["Connection"] == "close"
    eventually(lambda: not proxies(firewall, "leaving"), "the old one has ended")
    assert all(row["restarts"] == 0 for row in firewall.get("/v1/status")["workers"])


def test_policy_reaches_the_connections_of_a_worker_that_is_leaving(served, begun):
    """`apply --wait` returns when the old process has reset what is not allowed any more."""
    firewall = served.firewall
    old = proxies(firewall)
    configure(firewall, limits=[OTHER_TEXT])
    os.kill(firewall.get("/v1/status")["agent"]["pid"], signal.SIGHUP)
    eventually(lambda: proxies(firewall, "leaving") == old and proxies(firewall), "it leaves")
    nobody = policy("app=b", ingress=[{**peers("app=nobody"), **ports("80/TCP")}])
    firewall.apply(nobody)
    with pytest.raises(ConnectionError):
        begun.send(b" a body")
        begun.getresponse()


def test_a_killed_worker_refuses_nobody(served):
    """Who connects while there is no process waits for the next one."""
    firewall = served.firewall
    with Visitors(served) as visitors:
        (pid,) = proxies(firewall)
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: proxies(firewall) not in ({pid}, set()), "another one runs")
    # One connection at a time: at most the one that it was serving is lost.
    assert len(visitors.failures) <= 1, visitors.failures
    assert not any("refused" in failure for failure in visitors.failures)
    assert set(visitors.answers) == {200}


def test_the_next_agent_takes_the_sockets_over_and_replaces_the_worker(served):
    """kill -9 of the agent, then a start with another setting of the proxy."""
    firewall = served.firewall
    old = proxies(firewall)
    with Visitors(served) as visitors:
        firewall.kill()
        configure(firewall, limits=[OTHER_TEXT])
        firewall.start()
        eventually(lambda: denied(served).startswith(b"Go away"), "the new text is said")
        assert not proxies(firewall) & old
    assert visitors.failures == []
    assert set(visitors.answers) == {200}
    (pid,) = proxies(firewall)
    with Visitors(served) as visitors:  # the sockets went to the new agent
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: proxies(firewall) not in ({pid}, set()), "another one runs")
    assert not any("refused" in failure for failure in visitors.failures)
    assert len(workers(firewall)) >= 2


@pytest.mark.needs("migration")
def test_who_waits_for_a_worker_that_is_done_without_is_served_by_another(served):
    """Fewer `proxy.workers`. The one to go is stopped, so that its queue is full for certain."""
    firewall = served.firewall
    firewall.kill()
    configure(firewall, workers=2)
    firewall.start()
    eventually(lambda: len(proxies(firewall)) == 2, "both run")
    second = workers(firewall)["l7proxy", 1]
    firewall.kill()
    os.kill(second, signal.SIGSTOP)
    clients = [_client(served.host("a"), served.host("b").address4) for _ in range(16)]
    for client in clients:
        client.request("POST", "/v1/request-landing")
    eventually(lambda: waiting(served), "some wait for the one that is stopped")
    configure(firewall, workers=1)
    firewall.start()
    answers = [client.getresponse().status for client in clients]
    assert answers == [200] * len(clients)
    assert len(proxies(firewall)) == 1
    for client in clients:
        client.close()


def waiting(made):
    """How many connections wait to be accepted in the node."""
    rows = made.node.run(["ss", "-Hltn"]).stdout.splitlines()
    return sum(int(row.split()[1]) for row in rows)
