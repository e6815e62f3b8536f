"""The tables behind the nat table as text: what is asked, what is redirected, what stays shut."""

import re

import pytest

from firewall.datapath.marks import Kind, Marks, Stage
from firewall.datapath.ruleset import RulesetConfig, install_text, settles
from firewall.datapath.sets import EndpointLink, Family, managed
from firewall.datapath.translated import ASKING, set_text, table_text

NAMES = {Family.IPV4: "ip", Family.IPV6: "ip6"}
CONFIG = RulesetConfig(http_proxy_port=15006)


def chains(text: str) -> dict[str, list[str]]:
    """The rules of each chain."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("add rule "):
            _, _, _, _, chain, rule = line.split(" ", 5)
            found.setdefault(chain, []).append(rule)
    return found


@pytest.mark.parametrize("family", Family)
@pytest.mark.parametrize("mask", [0xFF000000, 0x1F])
def test_every_chain_that_is_named_is_made_and_emptied_first_but_the_one_that_queues(family, mask):
    """Its one rule is made by netlink: emptied, packets would be dropped until it is back."""
    text = table_text(RulesetConfig(marks=Marks(mask), http_proxy_port=9), family, ["x"])
    named = set(re.findall(r"(?:goto|jump) (\w+)", text)) - {ASKING}
    made = set(re.findall(r"^chain (\w+)", text, re.MULTILINE))
    assert named < made
    emptied = set(re.findall(rf"^flush chain {NAMES[family]} bartizan (\w+)$", text, re.MULTILINE))
    assert emptied == made == chains(text).keys()
    assert text.index("flush chain") < text.index("add rule")


@pytest.mark.parametrize("family", Family)
def test_what_is_to_be_asked_is_dropped_where_nobody_can_be(family):
    """NFQUEUE ends a packet's way through a chain; only without it the next rule is reached."""
    for name, rules in chains(table_text(CONFIG, family, [])).items():
        for at, rule in enumerate(rules):
            if ASKING in rule:
                assert rules[at + 1].endswith("drop"), name


@pytest.mark.parametrize("family", Family)
def test_what_a_worker_has_redirected_reaches_the_proxy_or_nobody(family):
    rules = chains(table_text(CONFIG, family, []))["redirected"]
    loopback = "127.0.0.1" if family is Family.IPV4 else "[::1]"
    assert f"tproxy to {loopback}:15006" in rules[0]
    assert rules[1:] == ["drop"]
    assert chains(table_text(RulesetConfig(), family, []))["redirected"] == ["drop"]


def test_the_users_bits_of_a_mark_are_kept():
    text = table_text(RulesetConfig(marks=Marks(0xFF00)), Family.IPV4, [])
    for kept in re.findall(r"mark set meta mark & (\w+)", text):
        assert int(kept, 16) == 0xFFFF00FF


@pytest.mark.parametrize("family", Family)
def test_the_narrowest_mask_has_room_for_every_stage(family):
    marks = Marks(0x1F)
    values = {marks.of(Kind.DEFERRED, stage).value for stage in Stage}
    assert len(values) == len(Stage)


def test_the_set_holds_the_addresses_of_a_family():
    links = [
        EndpointLink((bytes((10, 0, 0, 1)), bytes(15) + b"\7"), "eth0"),
        EndpointLink((bytes((10, 0, 0, 2)),), ""),
    ]
    assert managed(links, Family.IPV6) == {"::7"}
    assert set_text(Family.IPV4, managed(links, Family.IPV4)) == (
        "flush set ip bartizan managed\nadd element ip bartizan managed { 10.0.0.1, 10.0.0.2 }\n"
    )
    assert set_text(Family.IPV6, []) == "flush set ip6 bartizan managed\n"


@pytest.mark.parametrize("family", Family)
def test_what_mangle_leaves_to_the_table_is_decided_further_on_without_it(family):
    """By the same match, no mark: whatever happens to the table, or to marks, in between."""
    managed = f"bartizan-managed-{family:d}"
    left = f"-m conntrack --ctstate NEW -m set --match-set {managed} src "
    left += f"-m set ! --match-set {managed} dst"
    for there in (False, True):
        text = install_text(CONFIG, family, "*mangle\nCOMMIT\n", settles=there)
        assert settles(text) == there
        assert (f"-A BARTIZAN-PREROUTING {left} -j RETURN" in text) == there
        for hook in ("FORWARD", "INPUT"):
            rules = [line for line in text.splitlines() if line.startswith(f"-A BARTIZAN-{hook} ")]
            # Whatever has been redirected and is not the proxy's goes no further.
            assert rules[1].endswith("-m mark --mark 0x1000000/0x7000000 -j DROP")
            assert (rules[-1].endswith(f"{left} -j NFQUEUE --queue-num 0")) == there
