"""What a user types, against one running daemon: answers, messages and exit codes."""

import json
import os
import signal

import pytest
import yaml
from evidence import dropped, of, workers
from rules import peers, policy, ports
from traffic import V6, delivered, tcp, token, udp

from firewall.cli.exits import ExitCode

OPEN = policy("app=b", ingress=[{**peers("app=a"), **ports("80/TCP", "53/UDP")}])


@pytest.fixture(scope="module")
def running(module_lab, module_bartizan):
    made = module_lab(a="app=a", b="app=b", c="app=c")
    made.firewall = module_bartizan(made, {"workers": 2})
    return made


@pytest.fixture
def three(running):
    """Hosts a, b, c under a running firewall without policies."""
    running.firewall.clear()
    return running


def said(three, *argv, code=ExitCode.OK):
    """Run a command that ends with `code`; what it printed, stdout before stderr."""
    done = three.firewall.cli(*argv)
    assert done.returncode == code, (argv, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


NOUNS = [
    ("endpoint", "list"),
    ("endpoint", "get", "a"),
    ("identity", "list"),
    ("identity", "get", "1"),
    ("policy", "get"),
    ("policy", "selectors"),
    ("conntrack", "list"),
    ("fqdn", "cache", "list"),
    ("fqdn", "names"),
    ("proxy", "list"),
    ("status",),
]


@pytest.mark.parametrize("noun", NOUNS, ids=" ".join)
def test_every_noun_answers_as_table_json_and_yaml(three, noun):
    """The same keys in both; the table is none of them."""
    three.firewall.apply(OPEN)
    as_json = json.loads(said(three, *noun, "-o", "json"))
    documents = list(yaml.safe_load_all(said(three, *noun, "-o", "yaml")))
    if noun == ("policy", "get"):  # what `policy apply -f -` takes
        assert documents == [one["document"] for one in as_json["objects"]]
    elif isinstance(as_json, list):
        assert [sorted(row) for row in documents[0]] == [sorted(row) for row in as_json]
    else:
        assert documents[0].keys() == as_json.keys()
    table = said(three, *noun)
    assert not table.startswith(("{", "[", "- "))


def test_the_endpoint_table_is_ciliums(three):
    """Enforcement for each direction, number, one label a line, addresses, state."""
    three.firewall.apply(OPEN)
    header, second, *rows = said(three, "endpoint", "list").splitlines()
    columns = "ENDPOINT NAME POLICY (ingress) POLICY (egress) IDENTITY LABELS (source:key[=value])"
    assert header.split() == [*columns.split(), "IPv6", "IPv4", "STATUS"]
    assert second.split() == ["ENFORCEMENT", "ENFORCEMENT"]
    row = three.firewall.endpoint("b")
    first = next(line for line in rows if " default/b " in line)
    assert first.split() == [
        str(row["id"]), "default/b", "Enabled", "Disabled", str(row["identity"]["id"]),
        "k8s:app=b", *row["addresses"]["ipv6"], *row["addresses"]["ipv4"], "ready",
    ]  # fmt: skip


def test_an_endpoint_is_added_once(three):
    """The same again is no error; another one under that name has to be meant."""
    add = ("endpoint", "add", "x", "--ip", "10.9.9.9")
    said(three, *add, "--label", "app=x")
    said(three, *add, "--label", "app=x")
    refusal = said(three, *add, code=ExitCode.FAILED)
    assert "endpoint x is there already" in refusal
    assert "--replace" in refusal
    assert "k8s:app=x" in said(three, "endpoint", "get", "x")
    assert "reserved:init" in said(three, *add, "--replace")
    assert said(three, "endpoint", "delete", "x") == "endpoint x deleted\n"
    said(three, "endpoint", "delete", "x", code=ExitCode.FAILED)


def test_labels_are_set_and_removed_as_with_kubectl(three):
    """k=v and k-: another identity, and the first one again."""
    row = three.firewall.endpoint("c")
    with_tier = json.loads(said(three, "endpoint", "label", "c", "tier=db", "app-", "-o", "json"))
    assert "k8s:tier=db" in with_tier["labels"]
    assert "k8s:app=c" not in with_tier["labels"]
    assert with_tier["identity"]["id"] != row["identity"]["id"]
    assert with_tier["state"] == "ready"
    back = json.loads(said(three, "endpoint", "label", "c", "tier-", "app=c", "-o", "json"))
    assert back["identity"] == row["identity"]


def test_an_endpoint_is_called_as_the_list_shows_it(three):
    """NAMESPACE/NAME and the number, as well as the name."""
    row = three.firewall.endpoint("a")
    for name in ("a", "default/a", str(row["id"])):
        assert json.loads(said(three, "endpoint", "get", name, "-o", "json"))["id"] == row["id"]
    said(three, "endpoint", "get", "elsewhere/a", code=ExitCode.FAILED)


def test_files_are_applied_together_or_not_at_all(three, tmp_path):
    """The second file is wrong: the first one is not in force either."""
    good, bad = tmp_path / "1-good.yaml", tmp_path / "2-bad.yaml"
    good.write_text(OPEN)
    bad.write_text(OPEN.replace("name: rule", "name: other").replace("'80'", "'808080'"))
    before = three.firewall.get("/v1/policy")
    refusal = said(three, "policy", "apply", "-f", tmp_path, code=ExitCode.INVALID)
    assert f"{bad}:" in refusal
    assert refusal.endswith("1 error, nothing was applied\n")
    assert three.firewall.get("/v1/policy") == before
    bad.write_text(OPEN.replace("name: rule", "name: other"))
    applied = said(three, "policy", "apply", "-f", tmp_path).splitlines()
    assert applied == [
        "ciliumnetworkpolicy default/rule created",
        "ciliumnetworkpolicy default/other created",
        f"Revision: {before['revision'] + 1}",
    ]


def test_a_change_that_a_worker_does_not_enforce_in_time_is_said(three, tmp_path):
    """It is made all the same; who asked not to wait is not told."""
    file = tmp_path / "open.yaml"
    file.write_text(OPEN)
    pid = workers(three.firewall)["datapath", 0]
    os.kill(pid, signal.SIGSTOP)
    try:
        late = said(three, "policy", "apply", "-f", file, "--wait", "0.2")
        file.write_text(OPEN.replace("'53'", "'54'"))
        unasked = said(three, "policy", "apply", "-f", file, "--wait", "0")
    finally:
        os.kill(pid, signal.SIGCONT)
    assert "ciliumnetworkpolicy default/rule created" in late
    assert "warning: not every worker enforces this yet" in late
    assert "warning" not in unasked
    assert "warning" not in said(three, "policy", "apply", "-f", file)


def test_what_is_not_there_is_an_error(three, tmp_path):
    """A name that nothing has, a file without a policy: scripts must notice."""
    said(three, "policy", "get", "nothing", code=ExitCode.FAILED)
    said(three, "policy", "delete", "nothing", code=ExitCode.FAILED)
    said(three, "identity", "get", "60000", code=ExitCode.FAILED)
    empty = tmp_path / "empty.yaml"
    empty.write_text("# nothing yet\n")
    refusal = said(three, "policy", "apply", "-f", empty, code=ExitCode.INVALID)
    assert f"no policy in {empty}: nothing was applied" in refusal


MISTAKES = [
    (("endpoint", "add", "x", "--ip", "10.9.9.300"), ExitCode.INVALID, "endpoint x: addresses[0]"),
    (("endpoint", "add", "x", "--ip", "10.9.9.9", "--label", "moon:a=b"), ExitCode.INVALID,
     "unknown label source 'moon'"),
    (("endpoint", "add", "x", "--ip", "10.9.9.9", "--netns", "nowhere"), ExitCode.INVALID,
     "network namespace nowhere"),
    (("endpoint", "label", "a", "moon:a=b"), ExitCode.INVALID, "unknown label source 'moon'"),
    (("endpoint", "label", "a", "reserved:host"), ExitCode.INVALID, "reserved"),
    (("observe", "--since", "yesterday"), ExitCode.USAGE, "--since 'yesterday'"),
    (("observe", "--to-port", "http"), ExitCode.USAGE, "--to-port 'http'"),
    (("conntrack", "list", "--from", "nobody"), ExitCode.FAILED, "no endpoint 'nobody'"),
    (("policy", "apply", "-f", "/nowhere.yaml"), ExitCode.USAGE, "/nowhere.yaml"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "code", "words"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_are_named_and_change_nothing(three, argv, code, words):
    """Exit codes as docs/cli.md has them."""
    before = three.firewall.get("/v1/endpoint")
    assert words in said(three, *argv, code=code)
    assert three.firewall.get("/v1/endpoint") == before


def test_the_newest_flow_is_shown_at_once(three):
    """Also if the worker that decided it would have told a moment later."""
    a, b = three.host("a"), three.host("b")
    for number in range(1, 21):
        payload = token()
        packet = udp(a, b, 1000 + number, payload)
        delivered(a, b, packet, payload)
        (last,) = three.firewall.flows(last=1, protocol="udp")
        assert last["l4"]["UDP"]["destination_port"] == 1000 + number


def test_each_filter_of_observe_finds_its_flow_and_its_negation_the_other(three):
    """By names, labels, addresses, numbers, ports, protocol, family and verdict."""
    three.firewall.apply(OPEN)
    a, b, c = (three.host(name) for name in "abc")
    payload = token()
    passed = udp(b, a, 7001, payload)
    delivered(b, a, passed, payload)
    refused = tcp(c, b, 80, family=V6)
    c.send(bytes(refused))
    dropped(three.firewall, refused)
    numbers = {name: str(three.firewall.endpoint(name)["identity"]["id"]) for name in "ab"}
    filters = [
        ("from-pod", "default/b"), ("to-pod", "a"), ("pod", "default/a"),
        ("from-label", "app=b"), ("to-label", "app in (a, z)"), ("label", "k8s:app=a"),
        ("from-ip", b.address4), ("to-ip", f"{a.address4}/32"), ("ip", "10.0.0.0/8"),
        ("from-identity", numbers["b"]), ("to-identity", numbers["a"]), ("identity", numbers["a"]),
        ("to-port", "7001"), ("from-port", str(passed.sport)), ("port", "7001"),
        ("protocol", "udp"), ("ip-version", "v4"), ("verdict", "FORWARDED"),
    ]  # fmt: skip
    for flag, value in filters:
        for key, shown, hidden in ((flag, passed, refused), (f"not-{flag}", refused, passed)):
            flows = three.firewall.flows(**{key: value})
            assert any(map(of(shown), flows)), (key, value)
            assert not any(map(of(hidden), flows)), (key, value)


def test_observe_prints_hubbles_line_and_hubbles_json(three):
    """What the node saw of one packet, for people and for programs."""
    a, b = three.host("a"), three.host("b")
    payload = token()
    packet = udp(a, b, 7002, payload)
    delivered(a, b, packet, payload)
    numbers = {name: three.firewall.endpoint(name)["identity"]["id"] for name in "ab"}
    line = said(three, "observe", "--last", "1", "--to-port", "7002", "-4")
    assert line.partition(": ")[2] == (
        f"default/a:{packet.sport} (ID:{numbers['a']}) -> default/b:7002 (ID:{numbers['b']}) "
        "policy-verdict:all INGRESS ALLOWED (UDP)\n"
    )
    answer = json.loads(said(three, "observe", "--last", "1", "--to-port", "7002", "-o", "json"))
    assert answer.keys() == {"flow", "node_name", "time"}
    assert of(packet)(answer["flow"])
