"""The snapshot file between one writer and its readers: whatever happens, they agree."""

import os
import resource
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from policy.snapshots import answers, snapshots, successors

from firewall.agent.snapshot_writer import FOLD_COUNT, SnapshotWriter
from firewall.control.snapshots import SnapshotReader
from firewall.policy.snapshot import IdentityRow, Snapshot, SnapshotError
from firewall.policy.snapshot_file import decode
from firewall.policy.view import View

events = st.sampled_from(
    ["write", "write", "fold", "load", "reader restarts", "writer restarts", "torn", "foreign"]
)


class Reader:
    """A worker, as far as the file goes."""

    def __init__(self):
        self.file = SnapshotReader()
        self.view = None

    def load(self, path):
        self.view = View(self.file.load(path), self.view)


@settings(max_examples=20, deadline=None)
@given(st.lists(events, min_size=1, max_size=10), st.data())
def test_readers_end_with_what_was_written_last(tmp_path_factory, happened, data):
    path = tmp_path_factory.mktemp("state") / "snapshot"
    writer, quick, slow = SnapshotWriter(path), Reader(), Reader()
    last = data.draw(snapshots())
    writer.write(last)
    torn = False
    for event in happened:
        match event:
            case "write":
                last, torn = data.draw(successors(last)), False
                writer.write(last)
            case "fold":
                writer.fold()
            case "load":
                slow.load(path)
                assert slow.view.snapshot == last
            case "reader restarts":
                quick = Reader()
            case "writer restarts":
                writer = SnapshotWriter(path)
            case "torn":  # it died while it appended; nobody was told
                before = path.read_bytes()
                new = data.draw(successors(last))
                writer.write(new)
                after = path.read_bytes()
                if after.startswith(before) and len(after) > len(before):
                    os.truncate(path, data.draw(st.integers(len(before), len(after) - 1)))
                    torn = True
                else:
                    last = new  # it was replaced, and a renamed file is never torn
                writer = SnapshotWriter(path)
            case "foreign" if not torn:  # what makes a torn record whole again alters it
                with path.open("ab") as file:
                    file.write(b"bartizan-snapshot")
        quick.load(path)
        assert quick.view.snapshot == last
        assert decode(path.read_bytes()) == last
        assert answers(quick.view) == answers(View(last))
    slow.load(path)
    assert answers(slow.view) == answers(View(last))


def world(revision, count=200, changed=0):
    rows = [IdentityRow(n, (f"k8s:n={n}",), ()) for n in range(count)]
    rows[changed] = IdentityRow(changed, (f"k8s:n=other{revision}",), ())
    return Snapshot(revision=revision, identities=tuple(rows))


def test_a_change_is_appended_and_read_on_from(tmp_path):
    path = tmp_path / "snapshot"
    writer, reader = SnapshotWriter(path), SnapshotReader()
    writer.write(world(1))
    reader.load(path)
    size = path.stat().st_size
    writer.write(world(2, changed=7))
    assert path.stat().st_size - size < 500
    assert reader.load(path) == world(2, changed=7)
    assert (reader.whole_count, reader.step_count) == (1, 1)


def test_a_folded_file_is_not_read_again_by_who_holds_its_state(tmp_path):
    path = tmp_path / "snapshot"
    writer, reader, late = SnapshotWriter(path), SnapshotReader(), SnapshotReader()
    writer.write(world(1))
    held, _ = reader.load(path), late.load(path)
    writer.write(world(2))
    held = reader.load(path)
    writer.fold()
    assert reader.load(path) is held
    assert late.load(path) == world(2)
    assert (reader.whole_count, late.whole_count) == (1, 2)
    writer.write(world(3))
    assert reader.load(path) == late.load(path) == world(3)
    assert (reader.whole_count, late.whole_count) == (1, 2)


def test_many_differences_want_folding(tmp_path):
    writer = SnapshotWriter(tmp_path / "snapshot")
    writer.write(world(1))
    for revision in range(2, FOLD_COUNT + 2):
        assert not writer.wants_folding
        writer.write(world(revision))
    assert writer.wants_folding
    writer.fold()
    assert not writer.wants_folding
    assert decode(writer.path.read_bytes()) == world(FOLD_COUNT + 1)


def test_a_write_that_the_disk_refuses_leaves_the_old_state(tmp_path):
    path = tmp_path / "snapshot"
    writer, reader = SnapshotWriter(path), SnapshotReader()
    writer.write(world(1))
    reader.load(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 50, hard))
        with pytest.raises(OSError, match="too large"):
            writer.write(world(2, count=400))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert reader.load(path) == SnapshotReader().load(path) == world(1)
    writer.write(world(3))
    assert reader.load(path) == SnapshotReader().load(path) == world(3)


def test_a_file_that_is_not_what_it_was_is_read_whole(tmp_path):
    path = tmp_path / "snapshot"
    reader = SnapshotReader()
    SnapshotWriter(path).write(world(1))
    reader.load(path)
    SnapshotWriter(path).write(world(5, count=3))
    assert reader.load(path) == world(5, count=3)
    assert reader.whole_count == 2


def test_a_damaged_file_is_refused_and_what_is_held_stays(tmp_path):
    path = tmp_path / "snapshot"
    writer, reader = SnapshotWriter(path), SnapshotReader()
    writer.write(world(1))
    reader.load(path)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"x")
    with pytest.raises(SnapshotError, match="altered"):
        SnapshotReader().load(path)
    path.write_bytes(b"rubbish\n")
    with pytest.raises(SnapshotError, match="header"):
        reader.load(path)
    writer = SnapshotWriter(path)
    writer.write(world(1))
    writer.write(world(2))
    assert reader.load(path) == world(2)
