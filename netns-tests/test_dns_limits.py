"""DNS that fails, is silent or is asked too much: what a client hears, and what stays shut."""

import json
import socket
import sys
import time

import dns.message
import dns.rcode
import pytest
import questions
from evidence import stopped
from questions import addresses, query
from test_dns import DNS4, V4S, World
from traffic import DEADLINE_S, eventually

pytestmark = pytest.mark.needs("tproxy", "tproxy6", "socket", "connmark")

ODD_PORT = 5353
LIMITS = {"dns_timeout_s": 4, "dns_idle_timeout_s": 4, "dns_pending_count_per_source": 4,
          "dns_pending_count_per_connection": 2}  # fmt: skip


WARM = [{"fqdn": "warm.example.", "ips": [V4S[40]], "ttl": 600}]


@pytest.fixture(scope="module")
def world(module_lab, module_bartizan, tmp_path_factory):
    known = tmp_path_factory.mktemp("names") / "names.json"
    known.write_text(json.dumps(WARM), encoding="ascii")
    made = World(
        module_lab,
        module_bartizan,
        proxy={"limits": LIMITS},
        fqdn={
            "pre_cache": str(known),
            "endpoint_max_ip_per_hostname": 2,
            "gc_interval_s": 0.5,
            "proxy_response_max_delay_s": 2,
        },
    )
    made.world.start([sys.executable, "-c", questions.ODD, str(ODD_PORT), DNS4, V4S[5]])
    eventually(lambda: "odd server listens" in made.asked(), "the odd server listens")
    yield made
    made.echo.__exit__()


@pytest.mark.parametrize("word", ["nxdomain", "servfail", "refused"])
def test_an_error_is_passed_on_and_what_stands_in_it_is_not_learnt(world, word):
    answer = questions.udp(world.a, DNS4, query(f"{word}.example"), ODD_PORT)
    assert answer.rcode() == dns.rcode.from_text(word)
    assert addresses(answer) == {V4S[5]}
    assert world.cache(f"{word}.example") == []
    assert not world.opens(V4S[5])


def test_a_name_that_nobody_has_is_nxdomain_by_both_protocols(world):
    asked = query("nobody.example")
    assert questions.udp(world.a, DNS4, asked).rcode() == dns.rcode.NXDOMAIN
    (answer,) = questions.tcp(world.a, DNS4, query("nobody.example"))
    assert answer.rcode() == dns.rcode.NXDOMAIN


def test_silence_of_the_server_is_silence_and_counted(world):
    before = world.counter("dns_timeouts")
    with pytest.raises(TimeoutError):
        questions.udp(world.a, DNS4, query("silent.example"), ODD_PORT, within_s=5)
    eventually(lambda: world.counter("dns_timeouts") == before + 1, "the timeout is counted")


def test_where_nobody_listens_the_answer_is_servfail(world):
    """The ICMP error comes back to the proxy's socket."""
    answer = questions.udp(world.a, V4S[0], query("any.example"), ODD_PORT)
    assert answer.rcode() == dns.rcode.SERVFAIL
    eventually(lambda: world.counter("dns_upstream_failures") >= 1, "the failure is counted")


def test_open_questions_of_a_source_are_bounded_and_others_are_served_again(world):
    before = world.counter("dns_overflow")
    with world.a.datagram(family=socket.AF_INET) as sock:
        sock.settimeout(DEADLINE_S)
        sock.connect((DNS4, ODD_PORT))
        for number in range(6):
            sock.send(query("silent.example", id=number).to_wire())
        refused = [dns.message.from_wire(sock.recv(65_535)) for _ in range(2)]
    assert {answer.rcode() for answer in refused} == {dns.rcode.REFUSED}
    eventually(lambda: world.counter("dns_overflow") == before + 2, "the refusals are counted")
    name = world.name("after.example", 12)
    eventually(
        lambda: addresses(questions.udp(world.a, DNS4, query(name))) == {V4S[12]},
        "the open ones are given up"
    )  # fmt: skip


def test_a_connection_has_so_many_open_questions_and_the_next_ones_wait(world):
    """What is not read waits; nothing is refused, and each answer makes room for one question."""
    names = [f"queue{number}.example" for number in range(5)]
    asked = [query(name, id=number) for number, name in enumerate(names)]
    with world.world.listen(ODD_PORT) as listener, world.a.connect(DNS4, ODD_PORT) as client:
        listener.settimeout(DEADLINE_S)
        client.settimeout(DEADLINE_S)
        client.sendall(b"".join(framed(one.to_wire()) for one in asked))
        server, _ = listener.accept()
        server.settimeout(DEADLINE_S)
        stream, answers = server.makefile("rb"), client.makefile("rb")
        open_ = [message(stream), message(stream)]
        server.settimeout(0.3)
        with pytest.raises(TimeoutError):
            server.recv(1)
        server.settimeout(DEADLINE_S)
        for number in range(5):
            server.sendall(framed(dns.message.make_response(open_[number]).to_wire()))
            assert message(answers).id == number
            if number < 3:
                open_.append(message(stream))
        assert [str(one.question[0].name) for one in open_] == [f"{name}." for name in names]
        server.close()


def test_an_answer_is_held_for_so_long_and_no_longer(world):
    """An agent that stands still confirms nothing: the answer comes all the same, and is counted.

    Its addresses open when the agent goes on.
    """
    name = world.name("held.example", 16)
    before = world.counter("dns_hold_timeouts")
    with stopped(world.firewall.process.pid):
        begun = time.monotonic()
        answer = questions.udp(world.a, DNS4, query(name))
        assert time.monotonic() - begun >= 2
        assert addresses(answer) == {V4S[16]}
        assert not world.reaches(V4S[16], 0.9)
    eventually(lambda: world.opens(V4S[16]), "the agent has learnt it")
    timeouts = lambda: world.counter("dns_hold_timeouts")
    eventually(lambda: timeouts() == before + 1, "that it was held in vain is counted")


def framed(wire):
    return len(wire).to_bytes(2, "big") + wire


def message(stream):
    return dns.message.from_wire(stream.read(int.from_bytes(stream.read(2), "big")))


@pytest.mark.parametrize("said", [b"", b"\0", b"\0\x30abc"], ids=["nothing", "length", "message"])
def test_a_connection_that_asks_nothing_is_closed(world, said):
    with world.a.connect(DNS4, 53) as sock:
        sock.settimeout(DEADLINE_S)
        sock.sendall(said)
        assert sock.recv(1) == b""


def test_a_name_has_so_many_addresses_and_no_more(world):
    """Those that expire first give way: they close, although their answer was passed on."""
    name = "capped.example"
    for number, ttl in ((13, 100), (14, 200), (15, 300)):
        world.records = [row for row in world.records if not row.startswith(name)]
        world.add(f"{name} {ttl} A {V4S[number]}")
        found = lambda n=number: addresses(questions.udp(world.a, DNS4, query(name))) == {V4S[n]}
        eventually(found, "the zone is read again")
    kept = lambda: {row["ips"][0] for row in world.cache(name)}
    eventually(lambda: kept() == {V4S[14], V4S[15]}, "the first has given way")
    eventually(lambda: not world.opens(V4S[13]), "the first is closed")
    assert world.opens(V4S[14])
    assert world.opens(V4S[15])


def test_names_of_the_file_are_open_before_anybody_asks(world):
    """And no others; who asks for the name is told what DNS says now."""
    assert world.opens(V4S[40])
    assert not world.opens(V4S[41])
    assert "warm.example" not in world.asked()
