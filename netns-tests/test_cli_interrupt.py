"""^C while the command reads a stream: real signals, a real socket."""

import os
import signal
import socket

import pytest

from firewall.cli.client import AgentUnreachableError, Client
from firewall.cli.interrupt import Interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_stream_between_two_lines(number, monkeypatch):
    """Also one that comes while a line is being written; what came of the next is left out."""
    ours, agent = socket.socketpair()
    monkeypatch.setattr(Client, "_connected", lambda self: ours)
    before = signal.getsignal(number)
    with agent, Interrupt() as until:
        agent.sendall(b"HTTP/1.0 200 OK\r\n\r\none\ntwo\nthr")
        lines = Client("").lines("flows", until=until)
        assert next(lines) == b"one\n"
        os.kill(os.getpid(), number)
        assert list(lines) == [b"two\n"]
    assert signal.getsignal(number) is before


def test_a_stream_that_its_sender_cuts_is_an_error(monkeypatch):
    """Else half of the flows would look like all of them."""
    ours, agent = socket.socketpair()
    monkeypatch.setattr(Client, "_connected", lambda self: ours)
    agent.sendall(b"HTTP/1.0 200 OK\r\n\r\none\ntw")
    agent.shutdown(socket.SHUT_WR)
    lines = Client("").lines("flows")
    with agent, pytest.raises(AgentUnreachableError, match="the answer broke off: after b'tw'"):
        assert next(lines) == b"one\n"
        next(lines)


def test_a_second_signal_does_what_it_always_does():
    with pytest.raises(KeyboardInterrupt), Interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
