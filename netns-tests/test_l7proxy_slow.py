"""Clients that drip or do not read, side by side behind a live proxy with short timeouts.

Every form is in tests/l7proxy/test_l7proxy_slow.py; here the clock and the sockets are real.
"""

import socket
import threading
from contextlib import ExitStack, suppress

import pytest
from l7proxy_live import Live, snapshot
from traffic import DEADLINE_S, eventually

from conntrack.address import parse_address
from firewall.policy.snapshot import HttpRuleRow
from l7proxy.frames import PREFACE

pytestmark = pytest.mark.needs("tproxy", "socket")

PORT = 80
RULES = (HttpRuleRow(method="POST|GET", path="/public/.*"),)
SHORT = ("head", "body", "stream_idle", "first_byte", "idle")
POST = b"POST /public/a HTTP/1.1\r\nHost: s\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
BIG = b"GET /public/big HTTP/1.1\r\nHost: s\r\n\r\n"
FORMS = {
    "nothing": (b"", b"", ""),
    "head": (POST, b"X: y\r\n", "request_header_timeout"),
    "body": (POST + b"Content-Length: 9999\r\n\r\n", b"x", "request_body_timeout"),
    "chunk extension": (CHUNKED + b"1", b";a=b", "request_body_timeout"),
    "trailers": (CHUNKED + b"0\r\n", b"X: y\r\n", "request_body_timeout"),
    "header block": (PREFACE + b"\0\0\1\1\0\0\0\0\1\x82", b"", "request_header_timeout"),
    "does not read": (BIG, b"", "client_flush_timeout"),
}


def serve(listener, stack) -> None:
    """Answer nothing but the big one, whose body does not end."""
    with suppress(OSError):
        while True:
            sock, _ = listener.accept()
            stack.callback(sock.close)
            threading.Thread(target=flood, args=(sock,), daemon=True).start()


def flood(sock) -> None:
    with suppress(OSError):
        if b"big" in sock.recv(65536):
            sock.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
            while True:
                sock.sendall(bytes(65536))


def ended(sock) -> bool:
    """Whether the proxy has closed it, after whatever it said."""
    try:
        return sock.recv(65536) == b""
    except ConnectionResetError:
        return True


def between(lab, folder, *options):
    """Client, server, and a proxy between them that is yet to be entered."""
    world = lab(a="app=a", b="app=b")
    client, server = world.hosts["a"], world.hosts["b"]
    source = snapshot(
        rules=RULES,
        clients=(parse_address(client.address4),),
        servers=(parse_address(server.address4),),
    )
    live = Live(world.node, folder, *options, source=source)
    live.redirect(server.address4, PORT)
    return client, server, live


def test_whoever_drips_or_does_not_read_is_given_up_and_logged(lab, tmp_path):
    options = [part for name in SHORT for part in ("--set", f"{name}_timeout_s=2")]
    fields = "%RESPONSE_CODE_DETAILS% %RESPONSE_FLAGS%"
    client, server, live = between(lab, tmp_path, *options, "--access-log-format", fields)
    with live, ExitStack() as stack:
        listener = stack.enter_context(server.listen(PORT))
        threading.Thread(target=serve, args=(listener, stack), daemon=True).start()
        slow = {}
        for form, (at_once, _, _) in FORMS.items():
            sock = client.open_socket(socket.AF_INET, socket.SOCK_STREAM)
            slow[form] = stack.enter_context(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.settimeout(DEADLINE_S)
            sock.connect((server.address4, PORT))
            sock.sendall(at_once)
        wanted = sorted(detail for _, _, detail in FORMS.values() if detail)
        sent_count = 0

        def all_given_up():
            nonlocal sent_count
            for form, sock in slow.items():
                drip = FORMS[form][1]
                with suppress(OSError):  # the proxy has closed it
                    sock.send(drip[sent_count % len(drip) :][:1] if drip else b"")
            sent_count += 1
            lines = live.access_log.read_text(encoding="ascii").split("\n")
            return sorted(line.removesuffix(" SI") for line in lines if " SI" in line) == wanted

        eventually(all_given_up, "every slow client in the log", every_s=0.05)
        for form, sock in slow.items():
            if form != "does not read":
                eventually(lambda one=sock: ended(one), f"the end of {form}")
        with client.connect(server.address4, PORT) as sock:
            sock.sendall(b"GET /admin HTTP/1.1\r\nHost: s\r\n\r\n")
            assert sock.recv(65536).startswith(b"HTTP/1.1 403 ")


def test_a_connection_may_be_told_to_end_after_some_time(lab, tmp_path):
    """With the next answer, and if there is none to give, without."""
    options = ("--set", "connection_duration_s=0.5", "--set", "drain_gap_s=3")
    client, server, live = between(lab, tmp_path, *options)
    denied = b"GET /admin HTTP/1.1\r\nHost: s\r\n\r\n"
    with live, client.connect(server.address4, PORT) as busy:
        busy.settimeout(DEADLINE_S)
        with client.connect(server.address4, PORT) as quiet:
            quiet.settimeout(DEADLINE_S)

            def told():
                busy.sendall(denied)
                return b"Connection: close" in busy.recv(65536)

            eventually(told, "the announcement", every_s=0.05)
            assert busy.recv(1) == b""
            assert quiet.recv(1) == b""


@pytest.mark.parametrize("setting", ["connection_count", "connection_count_per_source"])
def test_connections_above_a_bound_are_reset_and_one_that_ends_makes_room(lab, tmp_path, setting):
    client, server, live = between(lab, tmp_path, "--set", f"{setting}=2")
    denied = b"GET /admin HTTP/1.1\r\nHost: s\r\n\r\n"

    def served(sock):
        sock.settimeout(DEADLINE_S)
        try:
            sock.sendall(denied)
            return sock.recv(65536).startswith(b"HTTP/1.1 403 ")
        except (BrokenPipeError, ConnectionResetError):
            return False

    def another_served():
        try:  # the RST may come before connect() returns
            with client.connect(server.address4, PORT) as another:
                return served(another)
        except ConnectionResetError:
            return False

    with live, client.connect(server.address4, PORT) as first:
        with client.connect(server.address4, PORT) as second:
            assert [served(first), served(second)] == [True, True]
            assert not another_served()
            assert served(first)
        eventually(another_served, "room for another")
