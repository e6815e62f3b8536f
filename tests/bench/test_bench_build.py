"""Which builds are measured."""

import os

import pytest

from bench import build


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Return a function that makes a source and a compiled module, of these ages."""
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "FOLDER", tmp_path / "build/compiled")

    def make(source_at, compiled_at):
        for name, at in (
            ("part/one.py", source_at),
            ("build/compiled/part/one.cpython-311-x86_64-linux-gnu.so", compiled_at),
            ("build/compiled/0123__mypyc.cpython-311-x86_64-linux-gnu.so", compiled_at),
        ):
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
            os.utime(file, (at, at))

    return make


def test_both_builds_are_measured_where_the_compiled_one_is_up_to_date(tree):
    tree(source_at=1000, compiled_at=2000)
    assert build.builds() == ("pure", "compiled")


def test_a_compiled_tree_older_than_its_source_is_not_measured(tree, capsys):
    tree(source_at=2000, compiled_at=1000)
    assert build.builds() == ("pure",)
    assert "older than its source" in capsys.readouterr().err


def test_without_a_compiled_tree_pure_python_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    assert build.builds() == ("pure",)


def test_programs_import_the_build_that_is_used(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/before")
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    with build.using("compiled"):
        assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(build.FOLDER), str(build.ROOT)]
        assert os.environ["PYTHONSAFEPATH"] == "1"
    assert os.environ["PYTHONPATH"] == "/before"
    assert "PYTHONSAFEPATH" not in os.environ
