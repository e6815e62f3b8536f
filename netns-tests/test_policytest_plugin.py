"""The pytest plug-in as its users see it: a test file, a lab, verdicts as values."""

import subprocess
import sys

import pytest
from policytest_reading import text_of, written

pytestmark = pytest.mark.needs("veth", "nfqueue", "tproxy", "socket", "ipset")

POLICY = {
    "apiVersion": "cilium.io/v2",
    "kind": "CiliumNetworkPolicy",
    "metadata": {"name": "rule1", "namespace": "x"},
    "spec": {
        "endpointSelector": {"matchLabels": {"app": "b"}},
        "ingress": [
            {
                "fromEndpoints": [{"matchLabels": {"app": "a"}}],
                "toPorts": [
                    {
                        "ports": [{"port": "80", "protocol": "TCP"}],
                        "rules": {"http": [{"method": "GET", "path": "/v1/.*"}]},
                    },
                    {"ports": [{"port": "53", "protocol": "UDP"}]},
                ],
            }
        ],
    },
}

USERS_TEST = """
import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.packet import Raw

B = "10.0.1.2"


@pytest.mark.bartizan("web.test.yaml")
def test_verdicts_are_values(lab):
    allowed = lab.send(IP(dst=B) / TCP(dport=80), from_="x/a")
    assert (allowed.verdict, allowed.by, allowed.ct_state) == ("redirect", ("x/rule1",), "new")
    assert allowed.rule.startswith(str(lab.case.file) + ":")
    denied = lab.send(IP(dst=B) / TCP(dport=81), from_="x/a")
    assert (denied.verdict, denied.reason, denied.direction) == ("drop", "POLICY_DENIED", "ingress")
    assert denied.by == ("default-deny",)
    for number in range(3):  # a port of its own each time, so each is a new flow
        again = lab.send(IP(dst=B) / UDP(dport=53) / Raw(b"%d" % number), from_="x/a")
        assert (again.verdict, again.ct_state) == ("accept", "new")
    assert not lab.send(IP(dst=B) / ICMP(), from_="host:out").allowed

    # Packets of a known flow arrive without a new decision.
    first = IP(dst=B) / UDP(sport=4000, dport=53) / Raw(b"one")
    assert lab.send(first, from_="x/a").ct_state == "new"
    second = IP(dst=B) / UDP(sport=4000, dport=53) / Raw(b"two")
    known = lab.send(second, from_="x/a")
    assert (known.allowed, known.ct_state, known.flow) == (True, "established", None)
    answer = IP(dst=lab.addresses("x/a")[0]) / UDP(sport=53, dport=4000) / Raw(b"answer")
    assert lab.send(answer, from_="x/b").ct_state == "reply"


@pytest.mark.bartizan("web.test.yaml")
def test_hostile_packets_are_told_apart(lab):
    spoofed = IP(src="198.51.100.1", dst=B) / UDP(dport=53)
    assert lab.send(spoofed, from_="x/a").reason == "INVALID_SOURCE_IP"
    assert not lab.send(IP(dst=B) / TCP(dport=80, flags="SF"), from_="x/a").allowed
    assert not lab.send(IP(dst=B) / TCP(dport=81, flags="A"), from_="x/a").allowed
    assert not lab.send(IP(dst=B, proto=47) / Raw(b"gre"), from_="x/a").allowed
    assert not lab.send(IP(dst=B, proto=6) / Raw(b"1234"), from_="x/a").allowed


@pytest.mark.bartizan("web.test.yaml")
def test_requests(lab):
    put = lab.http("x/a", "PUT http://b.x/v1/x")
    assert (put.status, put.verdict, put.by) == (403, "deny", ("x/rule1",))
    get = lab.http("x/a", "GET http://b.x/v1/x?q=1")
    assert (get.status, get.verdict, get.by) == (200, "allow", ("x/rule1",))
    assert lab.http("x/b", "GET http://a.x:8080/").status == 200
    assert lab.http("host:out", f"GET http://{B}/v1/x").status == 0

    # The steps of the file are performed when asked for.
    syn = IP(dst=B) / TCP(dport=80)
    assert lab.send(syn, from_="x/a").allowed
    assert lab.step().name == "relabelled"
    assert not lab.send(syn, from_="x/a").allowed


def test_the_ini_setting_names_the_file_of_all_other_tests(lab):
    assert lab.addresses("x/b") == (B,)
"""


@pytest.fixture
def project(tmp_path):
    endpoints = [
        {"namespace": "x", "name": "a", "labels": {"app": "a"}},
        {"namespace": "x", "name": "b", "labels": {"app": "b"}, "ip": "10.0.1.2"},
    ]
    hosts = [{"name": "out", "ip": "203.0.113.7"}]
    steps = [{"name": "relabelled", "label": {"x/a": {"app": "c"}}}]
    text = written(endpoints=endpoints, hosts=hosts, policies=[POLICY], steps=steps)
    (tmp_path / "web.test.yaml").write_text(text)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nbartizan_file = web.test.yaml\n"
        "filterwarnings = error\naddopts = --strict-markers\n"
    )
    (tmp_path / "test_web.py").write_text(USERS_TEST)
    return tmp_path


def pytest_in(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        check=False, capture_output=True, text=True, timeout=240, cwd=folder,
    )  # fmt: skip


def test_a_users_tests_pass(project):
    done = pytest_in(project, "-q")
    assert "4 passed" in done.stdout, done.stdout + done.stderr


def test_a_lab_without_a_file_says_how_to_name_one(project):
    (project / "pytest.ini").write_text("[pytest]\n")
    done = pytest_in(project, "-k", "ini_setting")
    assert "@pytest.mark.bartizan" in done.stdout


def test_a_wrong_file_is_told_with_its_problems(project):
    (project / "web.test.yaml").write_text(text_of({"kind": "PolicyTest", "endpoint": []}))
    done = pytest_in(project, "-k", "ini_setting")
    assert 'unknown field "endpoint"; did you mean "endpoints"?' in done.stdout


def test_loading_the_plug_in_imports_nothing_heavy(project):
    (project / "test_web.py").write_text(
        "import sys\n"
        "def test_light():\n"
        "    assert 'policytest.plugin' in sys.modules\n"
        "    heavy = {'scapy', 'lab', 'firewall', 'yaml', 'l7proxy'} & set(sys.modules)\n"
        "    assert not heavy\n"
    )
    done = pytest_in(project, "-q")
    assert "1 passed" in done.stdout, done.stdout
