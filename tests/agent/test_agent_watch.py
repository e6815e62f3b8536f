"""A watched directory: new, changed and gone files; errors take nothing away."""

import os

from firewall.agent.watch import DirectoryWatch


def test_files_come_change_and_go(tmp_path):
    """One look after another tells the difference."""
    watch = DirectoryWatch(tmp_path)
    assert watch.look() == ({}, {})
    one = tmp_path / "one.yaml"
    one.write_text("1")
    (tmp_path / "two.json").write_text("2")
    (tmp_path / ".hidden.yaml").write_text("x")
    (tmp_path / "readme.md").write_text("x")
    (tmp_path / "sub.yaml").mkdir()
    assert watch.look().texts == {one: "1", tmp_path / "two.json": "2"}
    assert watch.look() == ({}, {})
    one.write_text("changed")
    assert watch.look().texts == {one: "changed"}
    one.unlink()
    assert watch.look() == ({}, {})
    assert watch.paths == (tmp_path / "two.json",)


def test_a_rename_into_place_is_a_change_even_with_equal_size_and_time(tmp_path):
    """Configuration management replaces files whole."""
    path = tmp_path / "p.yaml"
    path.write_text("aaa")
    os.utime(path, ns=(1, 1))
    watch = DirectoryWatch(tmp_path)
    watch.look()
    fresh = tmp_path / "p.tmp"
    fresh.write_text("bbb")
    os.utime(fresh, ns=(1, 1))
    fresh.rename(path)
    assert watch.look().texts == {path: "bbb"}


def test_a_directory_that_vanishes_takes_nothing_away(tmp_path):
    """An unmounted directory is an error, not an empty one."""
    directory = tmp_path / "d"
    directory.mkdir()
    (directory / "p.yaml").write_text("1")
    watch = DirectoryWatch(directory)
    watch.look()
    directory.rename(tmp_path / "e")
    found = watch.look()
    assert not found.texts
    assert watch.paths == (directory / "p.yaml",)
    assert directory in found.errors
    (tmp_path / "e").rename(directory)
    assert watch.look() == ({}, {})


def test_what_is_no_text_is_reported(tmp_path):
    """Bytes that are not UTF-8."""
    (tmp_path / "p.yaml").write_bytes(b"\xff\xfe")
    found = DirectoryWatch(tmp_path).look()
    assert "is not UTF-8" in found.errors[tmp_path / "p.yaml"]
