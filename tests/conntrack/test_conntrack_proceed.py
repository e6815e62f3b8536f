"""`proceed` does what `track` and `confirm` do, or nothing."""

import pytest
from conntrack_corpus import Run, vectors

from conntrack.packet import Packet
from conntrack.profile import LINUX, STRICT
from conntrack.tracker import CtState, Tracker

VECTORS = list(vectors())
FIELDS = (
    *("key", "protocol", "state", "created_at", "expires_at", "seen_reply", "assured", "rank"),
    *("serial", "packets", "bytes", "windows", "memory"),
)
"""What the tracker writes into an entry; a compiled class does not list its attributes."""


def shown(tracker: Tracker) -> list[dict[str, object]]:
    """Every entry, with all that the tracker writes; windows in one form, packed or not."""
    found = []
    for entry in tracker.entries():
        entry.unpack()
        found.append({name: getattr(entry, name) for name in FIELDS})
    return sorted(found, key=lambda one: one["key"])


class Twin(Run):
    """A run that carries packets through by `proceed` where it may, beside one that does not."""

    def __init__(self, vector, profile) -> None:
        super().__init__(vector, profile)
        self.other = Run(vector, profile).tracker
        self.other.loose = self.tracker.loose
        self.proceeded = 0

    def feed(self, parsed: Packet) -> str:
        entry = self.other.entry_of(parsed)
        before = shown(self.other)
        carried = entry is not None and self.other.proceed(entry, parsed, self.now)
        if not carried:
            assert shown(self.other) == before
        answer = super().feed(parsed)
        if carried:
            self.proceeded += 1
            assert answer in ("NEW", "ESTABLISHED", "REPLY")
        elif self.latest.ctstate not in (CtState.INVALID, CtState.UNTRACKED) and (
            self.latest.entry is not None or parsed.hop_limit > 1 or not self.is_router
        ):
            again = self.other.track(parsed, self.now)
            assert again.ctstate == self.latest.ctstate
            self.other.confirm(again, self.now)
        assert shown(self.other) == shown(self.tracker)
        return answer


@pytest.mark.parametrize("profile", [STRICT, LINUX], ids=["strict", "linux"])
@pytest.mark.parametrize("vector", VECTORS)
def test_proceed_writes_what_confirm_writes_or_nothing(vector, profile):
    if "steps" in vector:
        pytest.skip("a limit vector; see test_conntrack_limits")
    run = Twin(vector, profile)
    for packet in vector["packets"]:
        run.step(packet)


def test_the_vectors_contain_packets_that_proceed():
    runs = [Twin(one.values[0], STRICT) for one in VECTORS if one.values[0] is not None]
    if not runs:
        pytest.skip("../shared/corpus/conntrack is absent")
    count = 0
    for run, one in zip(runs, VECTORS, strict=True):
        for packet in one.values[0].get("packets", ()):
            run.step(packet)
        count += run.proceeded
    assert count > 300
