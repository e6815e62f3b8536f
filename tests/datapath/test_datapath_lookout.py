"""When the worker looks at what the kernel carries."""

from datapath_world import A4, ALLOWED, B4, UDP, Carrier

from conntrack.address import parse_address
from conntrack.flow import FlowTuple
from firewall.datapath import lookout
from firewall.datapath.ctnetlink import KernelFlow
from firewall.datapath.troubles import Troubles


class Look:
    """A dump that has the carried flow, and ends when it is read."""

    ended = True

    def __init__(self, mark):
        pass

    def fileno(self):
        return 7

    def flows(self):
        ends = parse_address(A4), parse_address(B4)
        return [KernelFlow(FlowTuple(*ends, UDP, 4000, 53), 0, 0, 30, True, True)]

    def close(self):
        pass


class Poll:
    """Is told what to watch."""

    def register(self, descriptor, events):
        pass

    def unregister(self, descriptor):
        pass


def test_a_look_under_way_does_not_put_off_the_one_that_is_asked_for(monkeypatch):
    """`conntrack list` wants to know what is so after it was asked, and does not wait long."""
    monkeypatch.setattr(lookout, "Dump", Look)
    carrier = Carrier(ALLOWED)
    carrier.until_carried()
    offloaded = carrier.pipeline.offloaded
    looks, now = lookout.Lookout(offloaded, None, Poll(), Troubles()), offloaded.next_dump_at
    looks.turn([], now)
    turn_count = 0
    for _ in looks.fresh():
        looks.turn([7], now)
        turn_count += 1
        assert turn_count < 10
    assert turn_count == 3  # one ends, the next begins, and ends
