"""What a server does before its connection is known to the exchange."""

from types import SimpleNamespace

import pytest

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


@pytest.fixture
def owner():
    return Recorder()


def test_a_server_that_speaks_first_is_heard(owner):
    """HTTP/2: SETTINGS may come with the handshake (RFC 9113 3.4), before we are told of it."""
    server = UpstreamConnection(owner, 7)
    server.data_received(b"settings")
    server.data_received(b"more")
    assert owner.told == []
    server.begin()
    server.data_received(b"last")
    assert owner.told == [("data", b"settings", 7), ("data", b"more", 7), ("data", b"last", 7)]


def test_a_server_that_leaves_at_once_has_left(owner):
    server = UpstreamConnection(owner, 7)
    server.data_received(b"bye")
    assert server.eof_received()
    server.connection_lost(None)
    server.begin()
    assert owner.told == [("data", b"bye", 7), ("ended", 7), ("lost", 7)]


def test_nothing_is_heard_of_a_server_that_was_given_up_meanwhile(owner):
    server = UpstreamConnection(owner, 7)
    server.data_received(b"late")
    server.close(reset=True)
    server.begin()
    assert owner.told == []
