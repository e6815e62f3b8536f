"""One step from a snapshot to the next: the same rows, and a view that says the same."""

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy.snapshots import answers, snapshots, successors

from firewall.policy.difference import difference, patch
from firewall.policy.snapshot import (
    DirectionRow,
    EntryRow,
    IdentityRow,
    IpcacheRow,
    OriginRow,
    PolicyRow,
    Snapshot,
    SnapshotError,
)
from firewall.policy.snapshot_file import decode, encode, read, read_on, step
from firewall.policy.view import View

MANY = settings(max_examples=30, deadline=None)


def chains(length):
    """Snapshots each of which follows from the one before."""

    @st.composite
    def draw_chain(draw):
        found = [draw(snapshots())]
        for _ in range(draw(st.integers(1, length))):
            found.append(draw(successors(found[-1])))
        return found

    return draw_chain()


@MANY
@given(snapshots(), snapshots())
def test_a_difference_leads_from_any_snapshot_to_any_other(old, new):
    assert patch(old, difference(old, new)) == new


@MANY
@given(chains(3))
def test_a_view_that_follows_others_says_what_a_fresh_one_says(chain):
    held = read(encode(chain[0]))
    view = View(held.snapshot)
    answers(view)
    for old, new in pairwise(chain):
        held = read_on(held, step(held.seal, difference(old, new)).data)
        assert held.snapshot == new
        earlier, said = view, answers(view)
        view = View(held.snapshot, view)
        assert answers(view) == answers(View(new))
        assert answers(earlier) == said, "the view that was shared with has changed"


@MANY
@given(chains(3))
def test_differences_in_a_file_are_read_with_it(chain):
    whole = encode(chain[0])
    data, seal = whole, read(whole).seal
    for old, new in pairwise(chain):
        record = step(seal, difference(old, new))
        data, seal = data + record.data, record.seal
    assert decode(data) == chain[-1]


@MANY
@given(chains(2), st.data())
def test_a_file_cut_within_a_difference_holds_what_was_before_it(chain, data):
    whole = encode(chain[0])
    record = step(read(whole).seal, difference(*chain[:2])).data
    cut = data.draw(st.integers(0, len(record) - 1))
    assert decode(whole + record[:cut]) == chain[0]


@MANY
@given(chains(2), st.data())
def test_an_altered_difference_is_refused(chain, data):
    whole = encode(chain[0])
    record = step(read(whole).seal, difference(*chain[:2])).data
    payload_at = record.index(b"\n") + 1
    place = data.draw(st.integers(payload_at, len(record) - 1))
    altered = record[:place] + bytes([record[place] ^ 1]) + record[place + 1 :]
    with pytest.raises(SnapshotError, match="altered"):
        decode(whole + altered)


def test_a_difference_that_follows_another_state_is_refused():
    first, second = Snapshot(revision=1), Snapshot(revision=2)
    record = step(read(encode(second)).seal, difference(first, second))
    with pytest.raises(SnapshotError, match="another state"):
        decode(encode(first) + record.data)
    with pytest.raises(SnapshotError, match="from revision 1"):
        patch(Snapshot(revision=3), difference(first, second))


def test_a_difference_holds_only_what_changed():
    rows = tuple(IdentityRow(n, (f"k8s:n={n}",), ()) for n in range(1000))
    old = Snapshot(revision=1, identities=rows)
    later = (*rows[:500], IdentityRow(500, ("k8s:n=other",), ()), *rows[502:])
    found = difference(old, Snapshot(revision=2, identities=later))
    assert [row.number for row in found.identities] == [500]
    assert found.identities_gone == (501,)
    assert patch(old, found).identities[0] is rows[0]


def test_rows_out_of_order_are_sent_whole():
    rows = [IpcacheRow(bytes([10, 0, 0, n]), 32, 1) for n in range(3)]
    old = Snapshot(revision=1, ipcache=tuple(rows))
    assert difference(old, Snapshot(revision=2, ipcache=tuple(reversed(rows)))) is None


def entry(origin):
    return EntryRow(1, 200, 0.0, 0, 0, 0, 65535, "", -1, origin)


def test_maps_of_unchanged_rows_are_shared_and_others_made_anew():
    def row(identity, origin):
        direction = DirectionRow(True, True, (entry(origin),))
        return PolicyRow(identity, direction, direction)

    origins = tuple(OriginRow("CNP", "x", name, "") for name in "abc")
    old = Snapshot(policies=(row(1, 0), row(2, 1), row(3, 2)), origins=origins)
    moved = (origins[0], origins[1], OriginRow("CNP", "x", "other", ""))
    new = msgspec.structs.replace(
        old, revision=1, policies=(old.policies[0], row(2, 0), old.policies[2]), origins=moved
    )
    before = View(old)
    maps = {n: before.map_of(n, direction) for n in (1, 2, 3) for direction in (1,)}
    after = View(new, before)
    assert after.map_of(1, 1) is maps[1]
    assert after.map_of(2, 1) is not maps[2], "its row is another one"
    assert after.map_of(3, 1) is not maps[3], "its origin says something else"
