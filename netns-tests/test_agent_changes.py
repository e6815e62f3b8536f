"""What the running daemon follows: files, signals, links; and what it refuses to follow."""

import json
import os
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml
from evidence import of
from rules import peers, policy, ports
from traffic import DEADLINE_S, delivered, eventually, token, udp

from lab.daemon import ApiRefused, command

OPEN = policy("app=b", ingress=[{**peers("app=a"), **ports("53/UDP")}])
CLOSED = policy("app=b", ingress=[{**peers("app=nobody"), **ports("53/UDP")}])


@pytest.fixture
def directories(lab, bartizan):
    """a and b; policies and endpoints come from watched directories."""
    made = lab(a="app=a", b="app=b")
    made.policies = made.folder / "policies.d"
    made.endpoints = made.folder / "endpoints.d"
    made.policies.mkdir()
    made.endpoints.mkdir()
    config = {
        "workers": 1,
        "proxy": {"workers": 0},
        "policy": {"directory": str(made.policies)},
        "endpoint_directory": str(made.endpoints),
        "flows": {"per_second": 500},  # so that a flood is one on a slow machine as well
    }
    made.firewall = bartizan(made, config)
    return made


def put(path, text):
    """Replace a file as tools do: whole."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_text(text)
    fresh.rename(path)


def await_verdict(made, verdict):
    """Wait until a new flow from a to b has this verdict: a file is followed before long."""
    a, b = made.host("a"), made.host("b")

    def decided():
        packet = udp(a, b, 53, token())
        a.send(bytes(packet))
        records = lambda: [one for one in made.firewall.flows(last=100) if of(packet)(one)]
        return eventually(records, "a record")[0]["verdict"] == verdict

    eventually(decided, f"a new flow is {verdict}")


def is_denied(made):
    await_verdict(made, "DROPPED")


def passes(made):
    await_verdict(made, "FORWARDED")
    a, b = made.host("a"), made.host("b")
    payload = token()
    delivered(a, b, udp(a, b, 53, payload), payload)


def keys(firewall):
    return [item["key"]["name"] for item in firewall.get("/v1/policy")["objects"]]


def errors(firewall):
    return firewall.get("/v1/status")["errors"]


def test_files_of_the_policy_directory_are_followed(directories):
    """They are enforced when they come, change and go."""
    firewall, file = directories.firewall, directories.policies / "b.yaml"
    passes(directories)
    put(file, CLOSED)
    eventually(lambda: keys(firewall) == ["rule"], "the policy is there")
    eventually(lambda: firewall.endpoint("b")["state"] == "ready", "it is enforced")
    is_denied(directories)
    put(file, OPEN)
    eventually(lambda: firewall.get("/v1/policy")["revision"] == 3, "it changed")
    eventually(lambda: firewall.endpoint("b")["state"] == "ready", "it is enforced")
    passes(directories)
    deleted = firewall.cli("policy", "delete", "rule")
    assert f"warning: {file} still has it" in deleted.stderr
    assert keys(firewall) == []
    put(file, CLOSED)
    eventually(lambda: keys(firewall) == ["rule"], "it is back")
    file.unlink()
    eventually(lambda: keys(firewall) == [], "the policy is gone")


def test_a_broken_policy_file_keeps_what_runs_and_is_reported(directories):
    """Also over a restart: the last valid text is enforced."""
    firewall, file = directories.firewall, directories.policies / "b.yaml"
    put(file, CLOSED)
    eventually(lambda: keys(firewall) == ["rule"], "the policy is there")
    put(file, CLOSED.replace("53", "530000"))
    eventually(lambda: errors(firewall), "the status says so")
    assert any(f"{file}:" in error for error in errors(firewall))
    is_denied(directories)
    firewall.kill()
    firewall.start()
    assert keys(firewall) == ["rule"]
    assert any(f"{file}:" in error for error in errors(firewall))
    is_denied(directories)
    put(file, OPEN)
    eventually(lambda: not errors(firewall), "nothing is wrong any more")
    eventually(lambda: firewall.endpoint("b")["state"] == "ready", "it is enforced")
    passes(directories)


def test_a_policy_file_that_was_never_valid_is_no_error_once_it_is_gone(directories):
    """The status tells what is wrong now."""
    firewall, file = directories.firewall, directories.policies / "b.yaml"
    put(file, CLOSED.replace("53", "530000"))
    eventually(lambda: errors(firewall), "the status says so")
    file.unlink()
    eventually(lambda: not errors(firewall), "nothing is wrong any more")


def test_an_endpoint_without_labels_is_in_init_until_one_comes(directories):
    """Cilium's reserved:init, number 5; both directions are enforced meanwhile."""
    firewall = directories.firewall
    made = firewall.put("/v1/endpoint/c", {"addresses": ["10.9.9.9"]})
    assert made["identity"] == {"id": 5, "labels": ["reserved:init"]}
    assert [made["policy"][way]["enforced"] for way in ("ingress", "egress")] == [True, True]
    known = firewall.relabel("c", app="c")
    assert known["identity"]["id"] >= 256
    assert "k8s:io.kubernetes.pod.namespace=default" in known["labels"]
    assert "reserved:init" not in known["labels"]


def test_a_policy_that_was_never_valid_keeps_the_daemon_from_starting(directories):
    """Exit 4 with file:line:column, instead of an endpoint that is open by mistake."""
    firewall, file = directories.firewall, directories.policies / "b.yaml"
    firewall.stop()
    put(file, CLOSED.replace("53", "530000"))
    done = directories.node.run([*command(), "run", "-c", firewall.config_path])
    assert done.returncode == 4
    assert f"{file}:" in done.stderr


def test_files_of_the_endpoint_directory_are_followed(directories):
    """An endpoint per file, with an identity like every other."""
    firewall, file = directories.firewall, directories.endpoints / "c.json"
    declared = {"name": "c", "addresses": ["10.0.1.77"], "labels": {"app": "c"}}
    put(file, json.dumps(declared))
    names = lambda: [row["name"] for row in firewall.get("/v1/endpoint")]
    eventually(lambda: names() == ["a", "b", "c"], "c is there")
    assert firewall.endpoint("c")["origin"] == "directory"
    with pytest.raises(ApiRefused) as caught:
        firewall.put("/v1/endpoint/c", {"addresses": ["10.0.1.78"]})
    assert caught.value.status == 409
    assert str(file) in str(caught.value)
    address = directories.host("a").address4
    put(file, "\n" + json.dumps({**declared, "addresses": [address]}))
    eventually(lambda: errors(firewall), "the clash is reported")
    clash = f"{file}: line 2: {address} belongs to endpoint a (through the API)"
    assert clash in str(errors(firewall))
    assert firewall.endpoint("c")["addresses"]["ipv4"] == ["10.0.1.77"]
    file.unlink()
    eventually(lambda: names() == ["a", "b"], "c is gone")
    eventually(lambda: errors(firewall) == [], "nothing is wrong any more")


def test_sighup_applies_live_settings_and_refuses_mistakes(directories):
    """A wrong file changes nothing and is reported; what needs a restart is named."""
    firewall = directories.firewall
    put(directories.policies / "b.yaml", CLOSED)
    eventually(lambda: keys(firewall) == ["rule"], "the policy is there")
    good = firewall.config_path.read_text()
    firewall.config_path.write_text(good + "audti: on\n")
    os.kill(firewall.get("/v1/status")["agent"]["pid"], signal.SIGHUP)
    eventually(lambda: errors(firewall), "the mistake is reported")
    line = good.count("\n") + 1
    assert f"{firewall.config_path}:{line}:1: audti: unknown setting" in str(errors(firewall))
    is_denied(directories)
    section = "policy:\n"
    firewall.config_path.write_text(
        good.replace(section, f"{section}  audit: true\n") + "queue_base: 7\n"
    )
    os.kill(firewall.get("/v1/status")["agent"]["pid"], signal.SIGHUP)
    eventually(lambda: firewall.get("/v1/status")["audit"], "audit is on")
    eventually(lambda: "queue_base" in firewall.log(), "the log names what waits")
    eventually(lambda: errors(firewall) == [], "nothing is wrong any more")
    a, b = directories.host("a"), directories.host("b")
    with b.capture() as capture:
        payload = token()

        def comes():
            a.send(bytes(udp(a, b, 53, payload)))
            return any(payload in data for data in capture.so_far())

        eventually(comes, "what policy would drop comes")


def test_a_reload_with_a_full_disk_applies_what_it_can(directories):
    """Settings count at once, endpoints too; that these were not written down is said."""
    firewall = directories.firewall
    pid = firewall.get("/v1/status")["agent"]["pid"]
    config = yaml.safe_load(firewall.config_path.read_text())
    config["policy"]["audit"] = True
    config["endpoints"] = [{"name": "c", "addresses": ["10.99.0.1"], "labels": ["app=c"]}]
    firewall.config_path.write_text(yaml.safe_dump(config))
    aside = firewall.state_dir.with_name("aside")
    firewall.state_dir.rename(aside)
    os.kill(pid, signal.SIGHUP)
    eventually(lambda: "endpoints not persisted" in str(errors(firewall)), "it is said")
    assert firewall.get("/v1/endpoint/c")["addresses"]["ipv4"] == ["10.99.0.1"]
    aside.rename(firewall.state_dir)
    os.kill(pid, signal.SIGHUP)
    eventually(lambda: not errors(firewall), "all is well")
    assert firewall.get("/v1/status")["audit"]
    written = firewall.state_dir / "endpoints"
    eventually(lambda: written.exists() and '"10.99.0.1"' in written.read_text(), "it is written")


def test_many_changes_at_once_share_snapshots(directories):
    """100 endpoints put in parallel are far fewer than 100 publications, and all become ready."""
    firewall = directories.firewall
    before = firewall.get("/v1/status")["revision"]

    def add(number):
        document = {"addresses": [f"10.9.0.{number}"], "labels": [f"app=many{number % 7}"]}
        return firewall.put(f"/v1/endpoint/many-{number}", document, wait=30)["state"]

    with ThreadPoolExecutor(20) as pool:
        states = set(pool.map(add, range(1, 101)))
    assert states == {"ready"}
    status = firewall.get("/v1/status")
    assert status["endpoints"]["ready"] == 102
    assert status["revision"] - before < 100
    assert status["identities"]["cluster"] == 2 + 7


def test_a_new_link_of_an_endpoint_is_found(directories):
    """The interface's index changes when a container's link is made anew."""
    firewall, node = directories.firewall, directories.node
    document = {"addresses": ["10.0.1.88"], "interface": "to-c"}
    with pytest.raises(ApiRefused) as caught:
        firewall.put("/v1/endpoint/c", document)
    assert caught.value.status == 422
    assert "to-c" in str(caught.value)
    link = ["ip", "link", "add", "to-c", "type", "veth", "peer", "to-d"]
    node.run(link, check=True)
    first = firewall.put("/v1/endpoint/c", document)["interface_index"]
    assert first > 0
    node.run(["ip", "link", "del", "to-c"], check=True)
    eventually(lambda: errors(firewall), "its absence is reported")
    node.run(link, check=True)
    index = lambda: firewall.endpoint("c")["interface_index"]
    eventually(lambda: index() not in (first, 0), "the new one is known")
    eventually(lambda: errors(firewall) == [], "nothing is wrong any more")


def test_an_address_of_the_node_is_the_identity_host(directories):
    """Also one that comes later."""
    firewall = directories.firewall

    def hosts():
        rows = firewall.get("/v1/ipcache")
        return {row["prefix"] for row in rows if row["identity"] == 1}

    assert "10.0.0.1/32" in hosts()
    directories.node.run(["ip", "address", "add", "10.0.0.99/32", "dev", "lo"], check=True)
    eventually(lambda: "10.0.0.99/32" in hosts(), "the new address is known")


def test_flows_are_followed_as_they_come(directories):
    """One JSON line per decision, filtered; the stream ends with the daemon."""
    firewall = directories.firewall
    a, b = directories.host("a"), directories.host("b")
    lines = []
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(firewall.api_socket))
        client.settimeout(DEADLINE_S)
        client.sendall(
            b"GET /v1/flows?follow=1&protocol=udp&not-port=9999 HTTP/1.1\r\nHost: x\r\n\r\n"
        )
        stream = client.makefile("rb")

        def read():
            lines.extend(line for line in stream if line.startswith(b"{"))

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        eventually(lambda: firewall.get("/v1/status")["flows"]["followers"] == 1, "follows")
        for port in (9999, 5353):
            payload = token()
            delivered(a, b, udp(a, b, port, payload), payload)
        eventually(lambda: lines, "the flow comes")
        assert firewall.stop() == 0
        reader.join(DEADLINE_S)
        assert not reader.is_alive()
    ports_seen = {json.loads(line)["flow"]["l4"]["UDP"]["destination_port"] for line in lines}
    assert ports_seen == {5353}


REFUSALS = [
    ("GET", "/v1/endpoint/nobody", None, 404),
    ("GET", "/v1/nothing", None, 404),
    ("GET", "/v1/identity/99999", None, 404),
    ("PUT", "/v1/endpoint/x", b"{", 422),
    ("PUT", "/v1/endpoint/x", b'{"addresses": ["10.0.0.999"]}', 422),
    ("PUT", "/v1/endpoint/x?wait=long", b'{"addresses": ["10.7.7.7"]}', 400),
    ("PUT", "/v1/endpoint/x", b"\xff", 400),
    ("PATCH", "/v1/endpoint/a/labels", b'{"st": []}', 400),
    ("PATCH", "/v1/endpoint/a/labels", b'{"set": ["reserved:host"]}', 422),
    ("DELETE", "/v1/policy", None, 400),
    ("PUT", "/v1/policy", b"kind: CiliumNetworkPolicy", 422),
    ("GET", "/v1/flows?verdict=PERHAPS", None, 400),
    ("GET", "/v1/flows?last=few", None, 400),
]
"""Request, and the status that says whose fault it is."""


def test_every_refusal_has_the_one_shape(directories):
    """{"error": {"message", "problems"}}."""
    for method, path, body, status in REFUSALS:
        got, data = directories.firewall.request(method, path, body)
        document = json.loads(data)
        assert got == status, (method, path, document)
        assert document["error"]["message"], (method, path)
        assert isinstance(document["error"]["problems"], list)
    assert len(directories.firewall.get("/v1/endpoint")) == 2


def test_a_declared_endpoint_takes_its_address_when_the_other_one_gives_it_up(directories):
    """A clash is no reason to touch the file again."""
    firewall, file = directories.firewall, directories.endpoints / "c.yaml"
    address = "10.0.1.66"
    firewall.put("/v1/endpoint/x", {"addresses": [address], "labels": ["app=x"]}, wait=5)
    put(file, f"name: c\naddresses: [{address}]\n")
    eventually(lambda: errors(firewall), "the clash is reported")
    firewall.request("DELETE", "/v1/endpoint/x")
    eventually(lambda: not errors(firewall), "the clash is over")
    assert firewall.endpoint("c")["addresses"]["ipv4"] == [address]


def test_a_flood_of_drops_does_not_silence_the_api(directories):
    """Flows beyond the rate are counted as lost; the API answers while the flood goes on."""
    firewall = directories.firewall
    a, b = directories.host("a"), directories.host("b")
    put(directories.policies / "b.yaml", CLOSED)
    is_denied(directories)
    packets = [bytes(udp(a, b, 1000 + number, b"x")) for number in range(250)]
    over = threading.Event()

    def flood():
        while not over.is_set():
            a.send(*packets)
            over.wait(0.01)

    sender = threading.Thread(target=flood, daemon=True)
    sender.start()
    try:
        for _ in range(25):  # it ends with the last answer
            firewall.get("/v1/healthz")
        lost = lambda: firewall.get("/v1/status")["flows"]["lost"]
        eventually(lost, "flows beyond the rate are counted")
    finally:
        over.set()
        sender.join()
    flows = firewall.get("/v1/status")["flows"]
    assert flows["current"] <= flows["max"]

    sent = []

    def recorded_again():
        sent.append(udp(a, b, 53, token()))
        a.send(bytes(sent[-1]))
        return any(of(packet)(flow) for flow in firewall.flows() for packet in sent)

    eventually(recorded_again, "after the flood flows are recorded again")
