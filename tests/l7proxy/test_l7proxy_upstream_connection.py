"""What the connection to a server tells its owner, and when it falls silent."""

from types import SimpleNamespace

import pytest

from l7proxy.commands import ConnectFailure
from l7proxy.serverside import UpstreamConnection


class Recorder:
    """Stands for the owner and its exchange: what it was told, in order."""

    def __init__(self):
        self.told = []
        self.exchange = SimpleNamespace(
            upstream_data=lambda data, now, link: ("data", data, link),
            upstream_ended=lambda now, link: ("ended", link),
            upstream_lost=lambda now, link: ("lost", link),
        )

    def perform(self, told):
        self.told.append(told)

    def upstream_failed(self, connection, failure, reason):
        self.told.append((failure, reason, connection.link))


@pytest.fixture
def owner():
    return Recorder()


def test_everything_that_a_server_does_is_told_with_its_link(owner):
    server = UpstreamConnection(owner, 7)
    server.data_received(b"bye")
    assert server.eof_received()
    server.connection_lost(None)
    assert owner.told == [("data", b"bye", 7), ("ended", 7), ("lost", 7)]


def test_nothing_is_heard_of_a_server_that_was_given_up(owner):
    server = UpstreamConnection(owner, 7)
    server.close(reset=True)
    server.data_received(b"late")
    server.eof_received()
    server.connection_lost(None)
    assert owner.told == []


def test_an_error_of_ours_is_a_refused_connection(owner):
    """Or its client would wait for the timeout."""
    UpstreamConnection(owner, 7).fail(ValueError("ours"))
    assert owner.told == [(ConnectFailure.REFUSED, "internal error: ours", 7)]
