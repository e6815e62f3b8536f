"""State files: complete or refused, and never overwritten when refused."""

import msgspec
import pytest

from firewall.agent.statefile import FORMAT, StateError, read, write


class Row(msgspec.Struct):
    name: str
    count: int


VALUE = (Row("a", 1), Row("b", 2))


def load(path):
    return read(path, "rows", tuple[Row, ...], "start without rows")


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "rows"
    write(path, "rows", VALUE)
    return path


def test_what_was_written_is_read(path):
    """And nothing else is left in the directory."""
    assert load(path) == VALUE
    assert [entry.name for entry in path.parent.iterdir()] == ["rows"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_missing_file_is_no_error(tmp_path):
    """The first start has none."""
    assert load(tmp_path / "rows") is None


def test_a_file_cut_anywhere_is_refused_and_kept(path):
    """A cut at any byte is noticed."""
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(StateError, match="start without rows"):
            load(path)
        assert path.read_bytes() == whole[:length]


def test_a_changed_byte_is_noticed(path):
    """SHA-256 over the payload."""
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(StateError, match="altered"):
        load(path)


def test_a_foreign_version_is_named(path):
    """A newer daemon's file is not half-understood."""
    path.write_bytes(path.read_bytes().replace(b"rows %d " % FORMAT, b"rows 99 ", 1))
    with pytest.raises(StateError, match="has format 99, this version reads"):
        load(path)


def test_a_file_of_another_kind_is_refused(path):
    """Two files mixed up."""
    with pytest.raises(StateError, match="is no bartizan-policies file"):
        read(path, "policies", tuple[Row, ...], "x")


def test_a_sound_file_of_another_shape_is_refused(path):
    """The checksum says nothing about meaning."""
    write(path, "rows", [{"name": 1}])
    with pytest.raises(StateError, match="does not decode"):
        load(path)


def test_a_failed_write_leaves_the_old_file(path, monkeypatch):
    """A full disk costs nothing that was there."""
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        write(path, "rows", ())
    assert load(path) == VALUE
    assert [entry.name for entry in path.parent.iterdir()] == ["rows"]
