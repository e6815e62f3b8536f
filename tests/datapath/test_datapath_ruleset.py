"""The rules as text: what is queued, in which order, and that nothing else is touched."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conntrack.address import parse_address
from firewall.datapath.marks import Marks
from firewall.datapath.ruleset import (
    HOOKS,
    RulesetConfig,
    first_queue,
    install_text,
    jumps_installed,
    local_route,
    passing_count,
    remove_text,
    routing_rules,
)
from firewall.datapath.sets import (
    INTERFACES_PER_SET,
    EndpointLink,
    Family,
    RulesetError,
    SetState,
    create_sets_text,
    read_sets,
    remove_sets_text,
    update_sets_text,
)

EMPTY = "*mangle\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n"
USER = "-A PREROUTING -s 10.0.0.0/8 -j MARK --set-xmark 0x7/0xffffffff"
JUMPS = [f"-A {hook} -j BARTIZAN-{hook}" for hook in HOOKS]


def rules(text: str, chain: str) -> list[str]:
    prefix = f"-A BARTIZAN-{chain} "
    return [line[len(prefix) :] for line in text.splitlines() if line.startswith(prefix)]


def link(number: int, interface: str = "") -> EndpointLink:
    return EndpointLink((bytes((10, 0, number >> 8, number & 255)),), interface)


class Ipset:
    """Carries out `ipset restore` as the kernel would, with its limits."""

    def __init__(self) -> None:
        self.sets: dict[str, set[str]] = {}
        self.kinds: dict[str, str] = {}
        self.smallest: dict[str, set[str]] = {}

    def restore(self, text: str) -> None:
        for line in text.splitlines():
            verb, name, *rest = line.split(" ")
            if verb == "create":
                assert name not in self.sets
                self.sets[name], self.kinds[name] = set(), rest[0]
            elif verb == "add":
                self.sets[name].add(rest[0])
                if self.kinds[name] == "hash:net,iface":
                    networks = [item.partition(",")[0] for item in self.sets[name]]
                    assert max(map(networks.count, networks)) <= INTERFACES_PER_SET
                if self.kinds[name] == "list:set":
                    assert rest[0] in self.sets
            elif verb == "del":
                self.sets[name].remove(rest[0])
            else:
                assert verb == "destroy"
                used = [n for n, kind in self.kinds.items() if kind == "list:set" and n != name]
                assert not any(name in self.sets[n] for n in used if n in self.sets)
                del self.sets[name]

    @property
    def state(self) -> SetState:
        lines = [f"create {name} {self.kinds[name]} family inet" for name in self.sets]
        lines += [f"add {name} {item}" for name, items in self.sets.items() for item in items]
        return read_sets("\n".join([*lines, "create other hash:ip", "add other 1.2.3.4", ""]))

    def interfaces(self, family: int) -> set[str]:
        return {
            item.partition(",")[2]
            for name in self.sets["bartizan-interfaces"]
            if f"-if-{family}-" in name
            for item in self.sets[name]
        }


def fresh() -> Ipset:
    kernel = Ipset()
    kernel.restore(create_sets_text(kernel.state))
    return kernel


# --- iptables ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", Family)
def test_loopback_goes_by_first_except_on_its_way_to_the_proxy(family):
    text = install_text(RulesetConfig(), family, EMPTY)
    assert rules(text, "PREROUTING")[0] == "-i lo -m mark ! --mark 0x1000000/0xff000000 -j RETURN"
    assert rules(text, "OUTPUT")[2] == "-o lo -j RETURN"


@pytest.mark.parametrize("family", Family)
def test_a_server_of_this_node_answers_the_proxy_here(family):
    """The proxy asks in its client's name; the answer would leave for that client."""
    first, *_ = found = rules(install_text(RulesetConfig(), family, EMPTY), "OUTPUT")
    assert first.startswith("-o lo -m mark --mark 0x3000000/0xff000000 -j CONNMARK --save-mark")
    back = "-m conntrack --ctdir REPLY -m connmark --mark 0x3000000/0xff000000 -g BARTIZAN-LOCAL"
    assert found.index(back) < next(at for at, rule in enumerate(found) if "NFQUEUE" in rule)


@pytest.mark.parametrize("family", Family)
def test_only_a_bound_source_or_a_stranger_reaches_the_proxy_unasked(family):
    """Of every other endpoint a worker looks at the source; what it accepts is marked already."""
    text = install_text(RulesetConfig(queue_count=2), family, EMPTY)
    assert [rule.rsplit(" ", 1)[1] for rule in rules(text, "SOCKET")] == [
        *("BARTIZAN-LOCAL", "BARTIZAN-ASKED", "BARTIZAN-ASKED", "BARTIZAN-LOCAL")
    ]
    assert rules(text, "ASKED") == [
        "-j MARK --set-xmark 0x2000000/0xff000000",
        "-j NFQUEUE --queue-balance 0:1",
    ]


@pytest.mark.parametrize("family", Family)
def test_what_dns_servers_reply_to_the_proxy_is_known_by_its_flow(family):
    """The question leaves its mark on the flow; the reply meets no queue, unless it is spoofed."""
    text = install_text(RulesetConfig(), family, EMPTY)
    asked = "-p udp -m mark --mark 0x3000000/0xff000000 -m conntrack --ctdir ORIGINAL -j CONNMARK"
    assert any(rule.startswith(asked) for rule in rules(text, "OUTPUT"))
    back = "-p udp -m conntrack --ctdir REPLY -m connmark --mark 0x3000000/0xff000000"
    found = rules(text, "PREROUTING")
    at = found.index(f"{back} -j BARTIZAN-SOCKET")
    assert at < next(at for at, rule in enumerate(found) if "NFQUEUE" in rule)
    assert rules(text, "SOCKET")[0].endswith("src,src -g BARTIZAN-LOCAL")


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("port", [0, 15006])
def test_no_queue_can_be_bypassed(family, port):
    config = RulesetConfig(http_proxy_port=port, queue_count=3)
    text = install_text(config, family, EMPTY)
    assert "--queue-bypass" not in text
    assert text.count("--queue-balance 0:2") == text.count("NFQUEUE --queue-balance") == 12


def test_what_is_marked_for_a_proxy_that_is_not_there_is_dropped():
    """Else the verdict "repeat" would send the packet around for ever."""
    with_proxy = rules(
        install_text(RulesetConfig(http_proxy_port=9), Family.IPV4, EMPTY), "PREROUTING"
    )
    without = rules(install_text(RulesetConfig(), Family.IPV4, EMPTY), "PREROUTING")
    assert "TPROXY --on-port 9 --on-ip 127.0.0.1" in with_proxy[2]
    assert with_proxy[3].startswith("-p udp -m mark --mark 0x1000000/0xff000000 -j TPROXY")
    assert with_proxy[4] == without[2] == "-m mark --mark 0x1000000/0xff000000 -j DROP"


@pytest.mark.parametrize("family", Family)
def test_defragmentation_is_switched_on_even_without_a_proxy(family):
    """`-m socket` registers the kernel's defragmentation (nf_defrag_ipv4_enable)."""
    assert "-m socket" in install_text(RulesetConfig(), family, EMPTY)


def test_what_the_proxy_sends_is_not_asked_again():
    text = install_text(RulesetConfig(marks=Marks(0xFF00)), Family.IPV4, EMPTY)
    assert "-m mark --mark 0x300/0xff00 -j RETURN" in rules(text, "OUTPUT")


def test_the_jump_is_inserted_once_and_kept_at_the_front():
    fresh_text = install_text(RulesetConfig(), Family.IPV4, EMPTY)
    assert "-I PREROUTING -j BARTIZAN-PREROUTING" in fresh_text
    good = "\n".join([*JUMPS, USER, ""])
    again = install_text(RulesetConfig(), Family.IPV4, good)
    assert "-I " not in again
    assert "-D " not in again
    assert jumps_installed(good)
    late = "\n".join([USER, *JUMPS, JUMPS[0], ""])
    assert not jumps_installed(late)
    moved = install_text(RulesetConfig(), Family.IPV4, late).splitlines()
    assert moved.count("-D PREROUTING -j BARTIZAN-PREROUTING") == 2
    assert moved.count("-I PREROUTING -j BARTIZAN-PREROUTING") == 1
    assert not any("OUTPUT -j BARTIZAN" in line for line in moved)


@pytest.mark.parametrize("family", Family)
def test_only_our_chains_are_written(family):
    config = RulesetConfig(http_proxy_port=1, queue_count=2)
    for text in (
        install_text(config, family, USER),
        remove_text(f":BARTIZAN-OUTPUT - \n{JUMPS[1]}"),
    ):
        for line in text.splitlines()[1:-1]:
            verb, _, rest = line.partition(" ")
            name = line[1:] if line.startswith(":") else rest
            jump = verb in ("-I", "-D") and rest.split(" -j ")[1].startswith("BARTIZAN-")
            assert name.startswith("BARTIZAN-") or jump, line
        assert text.startswith("*mangle\n")
        assert text.endswith("COMMIT\n")


def test_removal_takes_jumps_before_chains_and_nothing_that_is_not_there():
    saved = "\n".join(
        [":BARTIZAN-PREROUTING - [0:0]", ":BARTIZAN-OUTPUT - [0:0]", *JUMPS[:2], USER]
    )
    assert remove_text(saved).splitlines() == [
        "*mangle",
        "-D PREROUTING -j BARTIZAN-PREROUTING",
        "-D OUTPUT -j BARTIZAN-OUTPUT",
        "-F BARTIZAN-PREROUTING",
        "-F BARTIZAN-OUTPUT",
        "-X BARTIZAN-PREROUTING",
        "-X BARTIZAN-OUTPUT",
        "COMMIT",
    ]
    assert remove_text(EMPTY) == ""


def test_a_packet_can_be_passed_on_to_each_worker_that_the_marks_can_name():
    assert passing_count(Marks(), 1) == 0
    assert passing_count(Marks(), 3) == 3
    assert passing_count(Marks(), 64) == 32
    text = install_text(RulesetConfig(queue_count=3, first_queue=5), Family.IPV6, EMPTY)
    assert "-m mark --mark 0x15000000/0xff000000 -j NFQUEUE --queue-num 7" in text


@pytest.mark.parametrize(
    "wrong",
    [
        {"queue_count": 0},
        {"first_queue": 65536},
        {"first_queue": 65535, "queue_count": 2},
        {"http_proxy_port": 70000},
    ],
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(RulesetError):
        RulesetConfig(**wrong)


def test_marked_packets_are_delivered_here_by_a_table_of_our_own():
    config = RulesetConfig(route_table=7, rule_priority=100)
    assert [" ".join(rule.arguments("add")) for rule in routing_rules(config)] == [
        "rule add priority 100 fwmark 0x2000000/0xff000000 lookup 7",
        "rule add priority 101 fwmark 0x1000000/0xff000000 lookup 7",
    ]
    assert local_route(config)[-2:] == ["table", "7"]


# --- sets -------------------------------------------------------------------------------------


def test_an_endpoint_is_added_by_its_addresses_and_its_interface():
    kernel = fresh()
    both = EndpointLink((parse_address("10.0.0.2"), parse_address("fd00::2")), "veth2")
    kernel.restore(update_sets_text(kernel.state, [both]))
    assert kernel.sets["bartizan-managed-4"] == {"10.0.0.2"}
    assert kernel.sets["bartizan-managed-6"] == {"fd00::2"}
    assert kernel.sets["bartizan-bound-4"] == {"10.0.0.2,veth2"}
    assert kernel.sets["bartizan-if-4-0"] == {"0.0.0.0/0,veth2"}
    assert kernel.sets["bartizan-if-6-0"] == {"::/0,veth2"}
    assert update_sets_text(kernel.state, [both]) == ""


def test_an_endpoint_without_a_known_interface_is_bound_nowhere():
    kernel = fresh()
    kernel.restore(update_sets_text(kernel.state, [link(1)]))
    assert kernel.sets["bartizan-managed-4"] == {"10.0.0.1"}
    assert kernel.sets["bartizan-bound-4"] == set()
    assert kernel.interfaces(4) == set()


def test_additions_come_before_removals():
    kernel = fresh()
    kernel.restore(update_sets_text(kernel.state, [link(1, "a")]))
    verbs = [
        line.split()[0] for line in update_sets_text(kernel.state, [link(2, "b")]).splitlines()
    ]
    assert verbs == sorted(verbs)  # add ... del


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sets(st.integers(0, 300), max_size=250), min_size=1, max_size=5))
def test_any_change_of_any_number_of_endpoints_keeps_within_the_sets_limits(rounds):
    """hash:net,iface holds 64 interfaces of one network; Ipset refuses the 65th."""
    kernel = fresh()
    for numbers in rounds:
        links = [link(number, f"veth{number}") for number in sorted(numbers)]
        kernel.restore(update_sets_text(kernel.state, links))
        names = {f"veth{number}" for number in numbers}
        assert kernel.interfaces(4) == kernel.interfaces(6) == names
        assert len(kernel.sets["bartizan-managed-4"]) == len(numbers)
        assert update_sets_text(kernel.state, links) == ""
    kernel.restore(remove_sets_text(kernel.state))
    assert not kernel.sets


@pytest.mark.parametrize("name", ["a b", "a,b", "a/b", "x" * 16, "a\nb", 'q"', "a:b"])
def test_a_name_that_would_change_the_meaning_of_the_text_is_refused(name):
    with pytest.raises(RulesetError, match="not the name of an interface"):
        update_sets_text(fresh().state, [link(1, name)])


def test_an_address_of_another_length_is_refused():
    with pytest.raises(RulesetError, match="neither 4 nor 16"):
        update_sets_text(fresh().state, [EndpointLink((b"abc",), "")])


def test_behind_a_bridge_the_bridge_is_watched_and_no_address_is_believed_unseen():
    kernel = fresh()
    behind = EndpointLink((parse_address("10.0.0.2"),), "veth2", "docker0")
    kernel.restore(update_sets_text(kernel.state, [behind]))
    assert kernel.sets["bartizan-managed-4"] == {"10.0.0.2"}
    assert kernel.sets["bartizan-homed-4"] == {"10.0.0.2"}
    assert kernel.sets["bartizan-bound-4"] == set()
    assert kernel.sets["bartizan-if-4-0"] == {"0.0.0.0/0,docker0"}


def test_what_is_to_be_delivered_here_is_never_forwarded():
    """A bridge switches what TPROXY has marked for local delivery."""
    for family in Family:
        text = install_text(RulesetConfig(), family, EMPTY)
        local = "-m mark --mark 0x2000000/0xff000000"
        assert rules(text, "FORWARD")[2] == f"{local} -j NFQUEUE --queue-num 0"
        assert rules(text, "INPUT")[2] == f"{local} -j RETURN"


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("settling", [False, True])
def test_a_carried_packet_meets_few_rules(family, settling):
    """Of those that it goes by without a mark: one to three per hook, and what they ask for.

    The short cut of FORWARD and INPUT must leave to the other rules all that one could match.
    """
    text = install_text(RulesetConfig(generation=3), family, EMPTY, settles=settling)
    unmarked = "-m mark --mark 0x0/0x7000000"
    carried = "-m conntrack --ctstate ESTABLISHED -m connmark --mark 0x4000000/0x7000000"
    assert rules(text, "PREROUTING")[1] == f"{carried} {unmarked} -j BARTIZAN-BYPASS"
    assert [rule.rsplit(" ", 2)[-2:] for rule in rules(text, "BYPASS")[:3]] == [
        ["-j", "RETURN"],  # of another generation
        ["-g", "BARTIZAN-RECALLED"],  # SYN, FIN or RST
        ["-j", "ACCEPT"],  # from an endpoint at its own interface
    ]
    for hook in ("FORWARD", "INPUT", "POSTROUTING"):
        short, *others = rules(text, hook)
        assert short.endswith(f" {unmarked} -j RETURN")
        inverted = set(short.split()[4].split(","))
        for rule in others:
            words = rule.split()
            states = words[words.index("--ctstate") + 1] if "--ctstate" in words else ""
            assert "-m mark --mark" in rule or states in inverted or rule == "-o lo -j RETURN", rule


def test_a_generation_may_be_kept_while_everything_else_is_replaced():
    first = install_text(RulesetConfig(generation=3), Family.IPV4, EMPTY)
    again = install_text(RulesetConfig(first_queue=64), Family.IPV4, first, keep_generation=True)
    assert rules(again, "BYPASS") == rules(again, "OFFLOAD") == []
    assert ":BARTIZAN-BYPASS" not in again
    fresh_rules = install_text(RulesetConfig(), Family.IPV4, EMPTY, keep_generation=True)
    assert rules(fresh_rules, "OFFLOAD")


@pytest.mark.parametrize(("count", "queue"), [(1, 64), (3, 64)])
def test_the_installed_rules_tell_which_queue_they_feed(count, queue):
    config = RulesetConfig(first_queue=queue, queue_count=count)
    assert first_queue(install_text(config, Family.IPV4, EMPTY)) == queue
    assert first_queue(EMPTY + "-A PREROUTING -m set --match-set x src -j NFQUEUE") is None
