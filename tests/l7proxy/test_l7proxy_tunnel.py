"""WebSocket: who may open a tunnel, what opens it, what passes and how it ends (RFC 6455)."""

# ruff: noqa: E501 - a message is one line

import pytest
from http_transcript import Script, snapshot, written

from firewall.policy.snapshot import HttpRuleRow
from l7proxy.commands import HandOver
from l7proxy.tunnel import Tunnel

KEY = b"dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
"""The pair of RFC 6455 1.3."""

REQUEST = (
    b"GET /public/ws HTTP/1.1\r\nHost: s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: " + KEY + b"\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
SWITCH = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: " + ACCEPT + b"\r\n\r\n"
)


class Tunnelled(Script):
    """A script whose exchange has handed over to a tunnel, if it does."""

    def __init__(self, request=REQUEST, early=b"", source=None, **limits) -> None:
        super().__init__(source or snapshot(), **limits)
        for command in self.perform("client_data", request + early):
            if isinstance(command, HandOver):
                judge = self.exchange._judge
                self.exchange = Tunnel(judge, self.limits, command.ongoing, command.early, self.now)
                self.perform("start", command.head)

    @property
    def opened(self) -> bool:
        return isinstance(self.exchange, Tunnel)


def quoted(data: bytes) -> str:
    return '"' + data.decode("latin-1").encode("unicode_escape").decode().replace('"', '\\"') + '"'


def test_bytes_pass_both_ways_after_a_101_that_proves_the_key():
    """Early bytes wait for it: a server that stays with HTTP would take them for a request."""
    script = Tunnelled(early=b"early")
    script.check(rf"""
        >> opened
        << upstream "GET /public/ws HTTP/1.1\r\nHost: s\r\nSec-WebSocket-Key: {KEY.decode()}\r\nSec-WebSocket-Version: 13\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        >> client "more"
        >> upstream {quoted(SWITCH + b"hello")}
        << client "HTTP/1.1 101 Switching Protocols\r\nSec-WebSocket-Accept: {ACCEPT.decode()}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello"
        << upstream "earlymore"
        >> client "GET /admin HTTP/1.1\r\n\r\n"
        << upstream "GET /admin HTTP/1.1\r\n\r\n"
        >> upstream "\x81\x02hi"
        << client "\x81\x02hi"
        >> upstream-ended
        << log response GET /public/ws 101 via_upstream
        << close-upstream
        << shutdown
        >> client-ended
        << close
    """)


@pytest.mark.parametrize(
    "change",
    [(b"/public/ws", b"/admin"), (b"GET", b"PUT"), (b"websocket", b"websocket, h2c"), (KEY, b"short"),
     (b"Version: 13", b"Version: 8"), (b"\r\n\r\n", b"\r\nContent-Length: 1\r\n\r\n"),
     (b"websocket", b"tls/1.0"), (b"Sec-WebSocket-Key", b"X-Key")],
)  # fmt: skip
def test_what_is_not_an_allowed_handshake_is_denied(change):
    script = Tunnelled(REQUEST.replace(*change))
    assert not script.opened
    assert any("403" in str(getattr(command, "data", "")) for command in script.commands)
    script.check(">> opened")


@pytest.mark.parametrize(
    "answer",
    [SWITCH.replace(ACCEPT, b"AAAALMBiTxaQ9kYGzzhZRbK+xOo="),
     SWITCH.replace(ACCEPT, ACCEPT.lower()),
     SWITCH.replace(b"Upgrade: websocket", b"Upgrade: h2c"),
     SWITCH.replace(b"Connection: Upgrade\r\n", b""),
     SWITCH.replace(b"Connection: Upgrade", b"Connection: keep-alive"),
     SWITCH.replace(b"Connection: Upgrade", b"Connection: Upgrade, close"),
     SWITCH.replace(b"\r\n\r\n", b"\r\nContent-Length: 5\r\n\r\n"),
     SWITCH.replace(b"\r\n\r\n", b"\r\nSec-WebSocket-Accept: x\r\n\r\n"),
     SWITCH.replace(b"101", b"102"), SWITCH.replace(b"HTTP/1.1", b"HTTP/1.0"), b"\x81\x02hi"],
)  # fmt: skip
def test_answer_that_proves_nothing_opens_no_tunnel(answer):
    """CVE-2024-23326; a client that goes on must reach nobody."""
    script = Tunnelled(early=b"GET /admin HTTP/1.1\r\nHost: s\r\n\r\n")
    script.perform("upstream_opened")
    script.perform("upstream_data", answer)
    script.perform("client_data", b"GET /admin HTTP/1.1\r\nHost: s\r\n\r\n")
    sent = b"".join(c.data for c in script.commands if type(c).__name__ == "SendUpstream")
    assert b"/admin" not in sent


@pytest.mark.parametrize(
    "connection",
    [b"Connection: keep-alive, Upgrade", b"Connection: Keep-Alive\r\nConnection: UPGRADE"],
)
def test_a_switch_may_name_other_options_beside_upgrade(connection):
    """RFC 6455 4.1: `Connection` must hold the token."""
    script = Tunnelled(early=b"early")
    script.perform("upstream_opened")
    switched = script.perform("upstream_data", SWITCH.replace(b"Connection: Upgrade", connection))
    client, server = (command.data for command in switched)
    assert client.endswith(b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    assert b"eep-" not in client
    assert server == b"early"


def test_other_answer_is_passed_on_and_the_connection_closes():
    script = Tunnelled(early=b"GET /admin HTTP/1.1\r\n")
    script.perform("upstream_opened")
    script.check(r"""
        >> upstream "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno"
        << client "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno"
        << log response GET /public/ws 200 via_upstream
        << close-upstream
        << shutdown
    """)


def test_tunnel_ends_when_its_request_is_no_longer_allowed():
    script = Tunnelled()
    script.perform("upstream_opened")
    script.perform("upstream_data", SWITCH)
    script.policy.install(snapshot(rules=None, plain=True, revision=2))
    script.check(">> policy")
    script.policy.install(snapshot(rules=(), revision=3))
    script.check("""
        >> policy
        << log response GET /public/ws 101 UAEX connection_denied
        << close-upstream reset
        << close reset
    """)


def test_tunnel_is_idle_for_a_bounded_time_and_buffers_are_bounded():
    script = Tunnelled(stream_idle_timeout_s=5.0, buffer_bytes=10)
    script.perform("upstream_opened")
    script.check(f"""
        >> client "12345678901"
        << pause-client
        >> upstream {quoted(SWITCH)}
        << client "HTTP/1.1 101 Switching Protocols\\r\\nSec-WebSocket-Accept: {ACCEPT.decode()}\\r\\nConnection: Upgrade\\r\\nUpgrade: websocket\\r\\n\\r\\n"
        << upstream "12345678901"
        << resume-client
        >> client-blocked yes
        << pause-upstream
        >> client-blocked no
        << resume-upstream
        >> upstream-blocked yes
        << pause-client
        >> wait 6
        << log response GET /public/ws 101 SI stream_idle_timeout
        << close-upstream reset
        << close reset
    """)


def test_client_that_was_paused_is_read_again_after_the_hand_over():
    """The tunnel pauses by its own count, and would never resume what it has not paused."""
    script = Script(snapshot(), buffer_bytes=10)
    script.perform("client_data", b"GET /public/a HTTP/1.1\r\nHost: s\r\n\r\n" + REQUEST + b"x")
    script.perform("upstream_opened")
    assert "pause-client" in map(written, script.commands)
    script.perform("upstream_data", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
    last = [written(command).split()[0] for command in script.commands[-3:]]
    assert last == ["close-upstream", "resume-client", "hand-over"]


def test_a_rule_may_ask_for_the_upgrade():
    """What the server gets is what rules see: a path for WebSockets and nothing else."""
    rules = snapshot((HttpRuleRow(path="/public/.*", headers=("Upgrade: websocket",)),))
    assert Tunnelled(source=rules).opened
    assert not Tunnelled(REQUEST.replace(b"Connection: Upgrade\r\n", b""), source=rules).opened
    plain = Script(rules)
    plain.perform("client_data", b"GET /public/ws HTTP/1.1\r\nHost: s\r\n\r\n")
    assert any("403" in written(command) for command in plain.commands)
