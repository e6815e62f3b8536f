"""The file of the access log: what cannot be written is lost and counted, and nothing else ends."""

import resource
from contextlib import contextmanager
from pathlib import Path

import pytest

from l7proxy.accesslog import Ends
from l7proxy.logfile import AccessLog

ENDS = Ends(bytes((10, 0, 1, 1)), 5000, bytes((10, 0, 2, 1)), 80)


def log_at(path: Path) -> AccessLog:
    """A log whose lines are their numbers."""
    return AccessLog(path, lambda line: f"line {line.stream_id}\n", "host")


def write(log: AccessLog, count: int) -> None:
    """Write some lines, whatever they are about, and flush."""
    for _ in range(count):
        log.write(None, ENDS, 0)
    log.flush()


@contextmanager
def at_most(size):
    """No file of this process grows beyond so many bytes (setrlimit(2): EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_lines_without_space_are_lost_and_counted():
    log = log_at(Path("/dev/full"))
    write(log, 3)
    write(log, 2)
    assert log.lost_count == 5
    assert log.problem == "access log /dev/full: No space left on device"
    log.close()


def test_a_folder_that_is_not_there_yet_is_waited_for(tmp_path):
    path = tmp_path / "later" / "access.log"
    log = log_at(path)
    write(log, 2)
    assert (log.lost_count, log.problem) == (2, f"access log {path}: No such file or directory")
    path.parent.mkdir()
    log.follow()
    write(log, 1)
    assert (log.lost_count, log.problem, path.read_text()) == (2, "", "line 3\n")
    log.close()


def test_a_line_that_was_cut_ends_where_it_was_cut(tmp_path):
    path = tmp_path / "access.log"
    log = log_at(path)
    write(log, 1)
    with at_most(10):
        write(log, 2)
        assert log.problem == f"access log {path}: File too large"
        write(log, 1)
    assert log.lost_count == 3
    write(log, 1)
    assert path.read_text() == "line 1\nlin\nline 5\n"
    assert (log.lost_count, log.problem) == (3, "")
    log.close()


def test_a_file_that_was_moved_is_followed(tmp_path):
    path = tmp_path / "access.log"
    log = log_at(path)
    write(log, 1)
    path.rename(tmp_path / "access.log.1")
    log.follow()
    write(log, 1)
    log.close()
    assert (tmp_path / "access.log.1").read_text() == "line 1\n"
    assert path.read_text() == "line 2\n"
