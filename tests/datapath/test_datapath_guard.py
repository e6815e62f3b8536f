"""Rules by which the kernel's tracker does not see forged sources."""

import pytest

from conntrack.address import parse_address
from firewall.datapath.guard import install_text, is_installed, remove_text
from firewall.datapath.sets import EndpointLink, Family, SetState, update_sets_text

OPENS = "-p tcp -m tcp --tcp-flags SYN SYN"
JUMP = f"-A PREROUTING {OPENS} -j BARTIZAN-RAW"
USER = "-A PREROUTING -s 192.0.2.0/24 -j DROP"


@pytest.mark.parametrize("family", Family)
def test_an_endpoints_address_is_tracked_at_its_own_interface_only(family: Family) -> None:
    assert install_text(family, "").splitlines() == [
        "*raw",
        ":BARTIZAN-RAW - [0:0]",
        "-A BARTIZAN-RAW -i lo -j RETURN",
        f"-A BARTIZAN-RAW -m set --match-set bartizan-bound-{family:d} src,src -j RETURN",
        f"-A BARTIZAN-RAW -m set --match-set bartizan-routed-{family:d} src -j CT --notrack",
        f"-I PREROUTING {OPENS} -j BARTIZAN-RAW",
        "COMMIT",
    ]


def test_the_jump_stands_once_and_first() -> None:
    saved = f"*raw\n:BARTIZAN-RAW - [0:0]\n{JUMP}\n{USER}"
    assert is_installed(saved)
    assert "PREROUTING" not in install_text(Family.IPV4, saved).replace("BARTIZAN-RAW", "")
    for wrong in (f"{USER}\n{JUMP}", f"{JUMP}\n{JUMP}", USER, ""):
        assert not is_installed(wrong)
        changed = install_text(Family.IPV4, wrong).splitlines()
        deleted = [line for line in changed if line == f"-D PREROUTING {OPENS} -j BARTIZAN-RAW"]
        assert len(deleted) == wrong.count(JUMP)
        assert changed[-2:] == [f"-I PREROUTING {OPENS} -j BARTIZAN-RAW", "COMMIT"]


def test_removal_leaves_nothing_of_ours_and_all_of_others() -> None:
    assert remove_text(USER) == ""
    saved = f":BARTIZAN-RAW - [0:0]\n{JUMP}\n{USER}"
    assert remove_text(saved).splitlines() == [
        "*raw",
        f"-D PREROUTING {OPENS} -j BARTIZAN-RAW",
        "-F BARTIZAN-RAW",
        "-X BARTIZAN-RAW",
        "COMMIT",
    ]


def test_what_is_behind_a_bridge_is_not_exempt() -> None:
    """Its packets come from the bridge, which no set of (address, interface) knows."""
    links = (
        EndpointLink((parse_address("10.0.0.1"),), "veth1"),
        EndpointLink((parse_address("10.0.0.2"),), "veth2", "br0"),
        EndpointLink((parse_address("10.0.0.3"),), ""),
    )
    lines = update_sets_text(SetState({}), links).splitlines()
    assert [line for line in lines if "routed-4" in line] == ["add bartizan-routed-4 10.0.0.1"]


def test_an_endpoint_that_leaves_is_never_forged_in_its_own_place() -> None:
    """The set that exempts loses its address before the set that says where it belongs."""
    elements = {
        "bartizan-bound-4": {"10.0.0.1,veth1"},
        "bartizan-routed-4": {"10.0.0.1"},
        "bartizan-managed-4": {"10.0.0.1"},
    }
    lines = update_sets_text(SetState(elements), ()).splitlines()
    gone = [line.split()[1] for line in lines if line.startswith("del ")]
    assert gone == ["bartizan-routed-4", "bartizan-bound-4", "bartizan-managed-4"]
