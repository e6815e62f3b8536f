"""TLS on redirected connections: names without decryption, http rules inside, both real ends."""

import importlib.util
import json
import socket
import ssl
import subprocess
import sys
from contextlib import suppress

import hellos
import pytest
from http2_peers import H2Server
from test_l7proxy_grpc import PEERS, RULES, SEEN
from test_l7proxy_transparent import receive
from tls_world import NAME, TlsWorld, inside_row, names_row
from traffic import DEADLINE_S, FAMILIES, eventually

from firewall.policy.snapshot import HttpRuleRow, L7Row, TlsContextRow
from policytest.authority import Authority

pytestmark = pytest.mark.needs("tproxy", "tproxy6", "socket", "socket6", "ipv6")

PUBLIC = HttpRuleRow(method="GET", path="/public/.*")
GET = b"GET /public/a HTTP/1.1\r\nHost: " + NAME.encode() + b"\r\n\r\n"


@pytest.fixture
def world(lab, tmp_path):
    """A world made of rows."""
    return lambda *rows, **options: TlsWorld(lab, tmp_path, *rows, **options)


def ends_by_reset(sock) -> bool:
    """Whether the other end resets the connection, and says nothing before."""
    sock.settimeout(DEADLINE_S)
    with suppress(ConnectionResetError):
        assert not sock.recv(1), "something came"
        return False
    return True


# --- names, without decryption ----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=["v4", "v6"])
def test_allowed_name_reaches_the_server_with_its_own_certificate(world, family):
    here = world(names_row(NAME, "*.wild.example"), families=FAMILIES)
    with here.live, here.serving(NAME, "a.wild.example", family=family) as server:
        for name in (NAME, "a.wild.example"):
            with here.client_context().wrap_socket(
                here.connect(family), server_hostname=name
            ) as client:
                client.sendall(GET)
                assert receive(client, b"hi").startswith(b"HTTP/1.1 200 OK")
        assert server.names == [NAME, "a.wild.example"]
        assert set(server.peers) == {here.client.address(family)}
    assert '"- - TLS" 0 - ' in here.lines()[0]
    assert f'"{NAME}"' in here.lines()[0]


def test_other_names_and_none_are_reset_and_never_reach_the_server(world):
    """Nor does anything that is no complete hello with one reading."""
    here = world(names_row(NAME))
    with here.live, here.serving(NAME) as server:
        code, _ = here.curl("https://other.example/", "-k")
        assert code == 35  # curl(1): reset in the handshake, as with Cilium
        for data in (
            hellos.real(None),
            hellos.made(hellos.server_name(NAME.encode() + b".")),
            hellos.made(hellos.server_name(NAME.encode(), b"other.example")),
            hellos.made(hellos.server_name(NAME.encode()), hellos.server_name(b"other.example")),
            b"GET / HTTP/1.1\r\nHost: " + NAME.encode() + b"\r\n\r\n",
            b"\x80\x2e\x01\x03\x01",
            hellos.records(hellos.message(hellos.server_name(NAME.encode()))[:-4] + b"zz"),
        ):
            with here.connect() as client:
                client.sendall(data)
                if data[0] == 22 and data[-2:] == b"zz":
                    client.shutdown(socket.SHUT_WR)
                assert ends_by_reset(client), data
        assert server.accepted == 0


@pytest.mark.parametrize("size", [1, 40], ids=["byte-by-byte", "cut-in-the-name"])
def test_a_hello_cut_into_segments_and_records_is_judged_whole(world, size):
    """One byte of the hello per record and per segment; the answer is the server's own."""
    here = world(names_row(NAME))
    with here.live, here.serving(NAME) as server:
        for name, passes in ((NAME, True), ("other.example", False)):
            data = hellos.records(hellos.real(name)[5:], size)
            with here.connect() as client:
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for start in range(len(data) - 1):
                    client.send(data[start : start + 1])
                client.settimeout(DEADLINE_S)
                if passes:
                    assert server.accepted == 0
                    client.send(data[-1:])
                    assert client.recv(5)[0] == 22  # ServerHello
                else:
                    client.send(data[-1:])
                    assert ends_by_reset(client)
        assert (server.accepted, server.names) == (1, [NAME])


@pytest.mark.parametrize("early", [False, True], ids=["asked-for", "unasked"])
@pytest.mark.parametrize("name", [NAME, "other.example"])
def test_second_hello_must_ask_for_the_same_name(world, name, early):
    """HelloRetryRequest: a key share that the server does not like."""
    here = world(names_row(NAME))
    with here.live, here.server.listen(443) as listener, here.connect() as client:
        listener.settimeout(DEADLINE_S)
        first = hellos.real(NAME)
        second = hellos.made(hellos.server_name(name.encode()))
        client.settimeout(DEADLINE_S)
        client.sendall(first + (second if early else b""))
        if early and name != NAME:
            assert ends_by_reset(client)
            return
        connection, _ = listener.accept()
        connection.settimeout(DEADLINE_S)
        seen = connection.recv(len(first), socket.MSG_WAITALL)
        assert seen == first
        connection.sendall(hellos.retry_request())
        assert receive(client, hellos.retry_request()) == hellos.retry_request()
        if not early:
            client.sendall(b"\x14\x03\x03\x00\x01\x01" + second)
        wanted = second if early else b"\x14\x03\x03\x00\x01\x01" + second
        if name == NAME:
            assert connection.recv(len(wanted), socket.MSG_WAITALL) == wanted
        else:
            assert ends_by_reset(client)
            connection.settimeout(DEADLINE_S)
            with pytest.raises(ConnectionResetError):
                while connection.recv(100):
                    assert False, "the second hello arrived"  # noqa: B011
        connection.close()


def test_connection_ends_when_a_snapshot_takes_its_name_away(world):
    here = world(names_row(NAME, "kept.example"))
    with here.live, here.serving(NAME, "kept.example"):
        context = here.client_context()
        kept = context.wrap_socket(here.connect(), server_hostname="kept.example")
        with kept, here.connect() as lost:
            lost.sendall(hellos.real(NAME))
            lost.settimeout(DEADLINE_S)
            assert lost.recv(1)
            events = here.announce(names_row("kept.example"))
            with pytest.raises(ConnectionResetError):
                while lost.recv(65536):
                    pass
            kept.sendall(GET)
            receive(kept, b"hi")
        ended = [event for event in events if event.detail]
        assert [(e.detail, e.server_name) for e in ended] == [("connection_denied", NAME)]


def test_unread_bytes_pass_both_ways_in_bounded_memory_and_each_half_ends_alone(world):
    """A slow reader at either end; after the client's FIN the server still answers."""
    here = world(names_row(NAME))
    size = 128 * 1024 * 1024  # the kernel keeps up to 32 MiB for each of two readers (tcp_rmem)
    first = hellos.real(NAME)
    with here.live, here.server.listen(443) as listener, here.connect() as client:
        listener.settimeout(DEADLINE_S)
        client.settimeout(DEADLINE_S)
        client.sendall(first)
        connection, _ = listener.accept()
        connection.settimeout(DEADLINE_S)
        assert connection.recv(len(first), socket.MSG_WAITALL) == first
        before = here.live.resident_bytes()
        for sender, reader in ((connection, client), (client, connection)):
            count = send_unread(sender, size)
            assert 0 < count < size
            assert here.live.resident_bytes() - before < 8 * 1024 * 1024
            while count:
                count -= len(reader.recv(min(count, 1 << 20)))
        client.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
        connection.sendall(b"last")
        assert client.recv(4, socket.MSG_WAITALL) == b"last"
        connection.close()
        assert client.recv(1) == b""


def send_unread(sock, size) -> int:
    """Send what the other end does not read until no more is taken; how many bytes."""
    sock.settimeout(1)
    count = 0
    with suppress(TimeoutError):
        while count < size:
            count += sock.send(bytes(65536))
    sock.settimeout(DEADLINE_S)
    return count


def test_a_hello_that_does_not_come_is_not_waited_for(world):
    here = world(names_row(NAME), options=("--set", "first_byte_timeout_s=1"))
    with here.live, here.serving(NAME) as server, here.connect() as slow, here.connect() as mute:
        slow.sendall(hellos.real(NAME)[:-1])
        assert ends_by_reset(slow)
        assert ends_by_reset(mute)
        assert server.accepted == 0


@pytest.mark.parametrize("choice", ["allow", "deny"])
def test_an_encrypted_hello_is_matched_by_its_outer_name_or_refused(world, choice):
    here = world(names_row(NAME), options=("--set", f"encrypted_client_hello={choice}"))
    hello = hellos.made(hellos.server_name(NAME.encode()), hellos.extension(0xFE0D, bytes(40)))
    with here.live, here.server.listen(443) as listener, here.connect() as client:
        listener.settimeout(DEADLINE_S)
        client.sendall(hello)
        if choice == "deny":
            assert ends_by_reset(client)
            return
        connection, _ = listener.accept()
        assert connection.recv(len(hello), socket.MSG_WAITALL) == hello
        connection.close()


# --- http rules inside TLS -------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES, ids=["v4", "v6"])
def test_requests_inside_tls_are_judged_and_the_server_is_verified(world, family):
    here = world(inside_row(PUBLIC), families=FAMILIES)
    context = here.client_context()
    with here.live, here.serving(NAME, family=family) as server:
        with context.wrap_socket(here.connect(family), server_hostname=NAME) as client:
            assert client.version() == "TLSv1.3"
            client.sendall(GET)
            assert receive(client, b"hi").startswith(b"HTTP/1.1 200 OK")
            client.sendall(GET.replace(b"/public/a", b"/admin"))
            assert receive(client, b"denied\r\n").startswith(b"HTTP/1.1 403 ")
            client.sendall(GET)
            receive(client, b"hi")
        assert server.names == [NAME]
        assert set(server.peers) == {here.client.address(family)}
        assert [head.split(b"\r\n")[0] for head in server.heads] == [b"GET /public/a HTTP/1.1"] * 2


def test_a_host_that_is_not_the_server_name_is_misdirected(world):
    """421 (RFC 9110 15.5.20): the name was judged, the host was not."""
    here = world(inside_row(HttpRuleRow()))
    with here.live, here.serving(NAME) as server:
        for host, status in (
            (NAME, "200"), (NAME.upper(), "200"), (f"{NAME}:443", "200"), (f"{NAME}.", "200"),
            ("other.example", "421"), (f"a.{NAME}", "421"), ("10.0.0.1", "421"),
        ):  # fmt: skip
            for version in ("--http1.1", "--http2"):
                code, out = here.curl(f"https://{NAME}/", version, "-H", f"Host: {host}")
                assert (code, out.split()[-2]) == (0, status), (host, version, out)
        assert not [head for head in server.heads if b"other" in head or b"10.0" in head]


def test_http2_inside_tls_is_judged_stream_by_stream(world):
    here = world(inside_row(PUBLIC))
    with here.live, here.serving(NAME) as server:
        urls = [f"https://{NAME}/public/a", f"https://{NAME}/admin", f"https://{NAME}/public/b"]
        code, out = here.curl(urls[0], *urls[1:], "-Z", "-w", "\n%{http_code} %{http_version}\n")
        assert code == 0
        assert out.count("200 2") == 2, out  # bodies and these lines come in any order
        assert "403 2" in out
        assert b"/admin" not in b" ".join(server.heads)


BAD_SERVERS = {
    "another name": {"names": ("other.example",)},
    "unknown authority": {"trust": False},
    "expired": {"days": (-3, -1)},
    "no TLS": {"tls": False},
    "TLS 1.1 only": {"maximum_version": ssl.TLSVersion.TLSv1_1},
}


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1:DeprecationWarning")
@pytest.mark.parametrize("bad", BAD_SERVERS.values(), ids=BAD_SERVERS)
def test_a_server_that_is_not_to_be_trusted_never_gets_a_request(world, bad):
    here = world(inside_row(PUBLIC))
    options = dict(bad)
    names = options.pop("names", (NAME,))
    if not options.pop("trust", True):
        here.public = Authority("another")
    with here.live, here.serving(*names, **options) as server:
        for version in ("--http1.1", "--http2"):
            code, out = here.curl(f"https://{NAME}/public/a", version)
            assert (code, out.split()[-2]) == (0, "503"), out
        assert server.heads == []


def test_secret_that_is_missing_ends_connections_and_one_that_comes_serves(world):
    """Fail closed, and told; looked at again with the next snapshot."""
    row = inside_row(PUBLIC, terminate=TlsContextRow("web", "late"))
    here = world(row)
    with here.live, here.serving(NAME) as server:
        assert here.curl(f"https://{NAME}/public/a")[0] == 35
        assert "secret web/late: there is no folder" in here.live.log()
        here.private.secret(here.secrets / "web" / "late", NAME)
        here.announce(row)
        code, out = here.curl(f"https://{NAME}/public/a")
        assert (code, out.split()[-2]) == (0, "200"), out
        (here.secrets / "web" / "outside" / "ca.crt").write_bytes(b"no certificate")
        here.announce(row)
        code, out = here.curl(f"https://{NAME}/public/a")
        assert (code, out.split()[-2]) == (0, "503"), out
        assert len(server.heads) == 1


def test_a_renewed_certificate_is_shown_without_another_snapshot(world):
    here = world(inside_row(PUBLIC))
    context = here.client_context()

    def shown():
        with context.wrap_socket(here.connect(), server_hostname=NAME) as client:
            return client.getpeercert()["serialNumber"]

    with here.live, here.serving(NAME):
        before = shown()
        assert shown() == before
        here.private.secret(here.secrets / "web" / "inside", NAME)
        eventually(lambda: shown() != before, "the new certificate is shown")


def test_tls_that_only_ends_here_and_tls_that_only_begins_here(world):
    here = world(inside_row(PUBLIC, originate=None), families=FAMILIES)
    with here.live:
        with here.serving(NAME, tls=False) as server:
            code, out = here.curl(f"https://{NAME}/public/a", "--http1.1")
            assert (code, out.split()[-2]) == (0, "200"), out
            assert len(server.heads) == 1
        here.announce(inside_row(PUBLIC, terminate=None))
        with here.serving(NAME) as server:
            for path, status in (("public/a", "200"), ("admin", "403")):
                code, out = here.curl(f"http://{NAME}/{path}")
                assert (code, out.split()[-2]) == (0, status), out
            assert server.names == [NAME]
            assert here.curl(f"https://{NAME}/public/a")[0] == 35  # TLS, where clear text is meant
            assert here.curl("http://other.example/public/a")[1].split()[-2] == "503"


def test_connection_whose_first_host_bound_the_server_serves_no_other(world):
    here = world(inside_row(HttpRuleRow(), terminate=None))
    with here.live, here.serving(NAME, "other.example") as server, here.connect() as client:
        client.settimeout(DEADLINE_S)
        client.sendall(GET)
        receive(client, b"hi")
        client.sendall(GET.replace(NAME.encode(), b"other.example"))
        assert receive(client, b"\r\n\r\nMisdirected Request").startswith(b"HTTP/1.1 421 ")
        assert len(server.heads) == 1


@pytest.mark.parametrize("notifies", [True, False], ids=["notified", "cut"])
def test_an_answer_that_ends_with_the_connection_needs_close_notify(world, notifies):
    """RFC 8446 6.1: a FIN alone may be an attacker's."""
    here = world(inside_row(PUBLIC))
    with here.live, here.serving(NAME) as server:
        server.answer = b"HTTP/1.1 200 OK\r\n\r\nall of it"
        server.notifies = notifies
        code, out = here.curl(f"https://{NAME}/public/a", "--http1.1")
        assert (code == 0) is notifies, out


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1:DeprecationWarning")
def test_versions_below_tls_12_are_refused(world):
    here = world(inside_row(PUBLIC))
    with here.live, here.serving(NAME):
        context = here.client_context()
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = ssl.TLSVersion.TLSv1_1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
        with here.connect() as client, pytest.raises(OSError):
            context.wrap_socket(client, server_hostname=NAME)
        code, out = here.curl(f"https://{NAME}/public/a", "--tls-max", "1.2")
        assert (code, out.split()[-2]) == (0, "200"), out
        code, out = here.curl(f"https://{NAME}/public/a", "--http1.0")
        assert (code, out.split()[-2]) == (0, "200"), out


@pytest.mark.parametrize("setting", ["tls_handshake_count", "tls_handshake_count_per_source"])
def test_handshakes_are_bounded_in_number_and_time(world, setting):
    options = ("--set", f"{setting}=2", "--set", "tls_handshake_timeout_s=4")
    here = world(inside_row(PUBLIC), options=options)
    with here.live, here.serving(NAME), here.connect() as one, here.connect() as two:
        for client in (one, two):
            client.settimeout(DEADLINE_S)
            client.sendall(hellos.real(NAME))
            assert client.recv(1)  # the proxy's answer, which gets none
        with here.connect() as third:
            third.sendall(hellos.real(NAME))
            assert ends_by_reset(third)
        for client in (one, two):
            with pytest.raises(ConnectionResetError):
                while client.recv(65536):
                    pass
        code, out = here.curl(f"https://{NAME}/public/a")
        assert (code, out.split()[-2]) == (0, "200"), out


def test_each_form_meets_its_own_rules_on_a_mixed_port(world):
    """Clear http, names unread and http inside TLS side by side: nothing lends to another."""
    here = world(
        L7Row("http", http=(HttpRuleRow(path="/clear"),)),
        names_row("unread.example"),
        inside_row(PUBLIC, names=(NAME,)),
    )
    with here.live:
        with here.serving(NAME, "unread.example") as server:
            assert here.curl("https://unread.example/admin")[1].split()[-2] == "200"
            assert here.curl(f"https://{NAME}/public/a")[1].split()[-2] == "200"
            assert here.curl(f"https://{NAME}/admin")[1].split()[-2] == "403"
            assert here.curl("https://other.example/public/a")[0] == 35
            assert len(server.heads) == 2
        with here.serving(tls=False) as server:
            assert here.curl(f"http://{NAME}/clear")[1].split()[-2] == "200"
            assert here.curl(f"http://{NAME}/public/a")[1].split()[-2] == "403"
            assert len(server.heads) == 1


def test_egress_and_ingress_are_both_enforced(world):
    """The client's side names servers, the server's side judges requests; then the other way."""
    here = world(inside_row(PUBLIC), egress=(names_row(NAME),))
    with here.live, here.serving(NAME, "other.example") as server:
        assert here.curl("https://other.example/public/a")[0] == 35
        assert here.curl(f"https://{NAME}/public/a")[1].split()[-2] == "200"
        assert here.curl(f"https://{NAME}/admin")[1].split()[-2] == "403"
        here.announce(names_row(NAME), egress=(inside_row(PUBLIC),))
        assert here.curl("https://other.example/public/a")[0] == 35
        assert here.curl(f"https://{NAME}/public/a")[1].split()[-2] == "200"
        assert here.curl(f"https://{NAME}/admin")[1].split()[-2] == "403"
        here.announce(names_row(NAME), egress=(inside_row(PUBLIC, originate=None),))
        # What leaves the first proxy is clear text, which the second does not allow.
        assert here.curl(f"https://{NAME}/public/a")[0] == 35
        assert len(server.heads) == 2


@pytest.mark.skipif(importlib.util.find_spec("grpc") is None, reason="grpcio is not installed")
def test_grpc_inside_tls_is_judged_call_by_call_with_http2_at_both_ends(world):
    """ALPN chooses h2 with the client and with the server."""
    here = world(inside_row(*RULES), options=("--set", "connect_timeout_s=30"))
    folder = here.public.secret(here.folder / "server", NAME)
    server = here.server.popen(
        [sys.executable, "-u", PEERS, "server", "0.0.0.0", "443", folder], stdout=subprocess.PIPE
    )
    try:
        assert server.stdout.readline().strip() in {b"serving", "serving"}
        with here.live:
            done = here.client.run(
                [sys.executable, PEERS, "client", here.server.address4, "443", here.trusted]
            )
            assert done.returncode == 0, done.stdout + done.stderr
            assert json.loads(done.stdout.splitlines()[-1]) == SEEN
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


def test_a_server_of_http2_is_told_the_scheme_of_its_own_connection(world):
    """RFC 9113 8.3.1: https inside TLS, whatever the client's leg is."""
    here = world(inside_row(PUBLIC, terminate=None))
    folder = here.public.secret(here.folder / "server", NAME)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    context.set_alpn_protocols(["h2"])
    url, seen = f"http://{NAME}:443/public/a", []
    command = ["curl", "-sS", "--http2-prior-knowledge", "--resolve",
               f"{NAME}:443:{here.server.address4}", url]  # fmt: skip
    with here.live, here.server.listen(443) as listener:
        listener.settimeout(DEADLINE_S)
        client = here.client.popen(command, stdout=subprocess.PIPE)
        connection, _ = listener.accept()
        with context.wrap_socket(connection, server_side=True) as server:
            server.settimeout(DEADLINE_S)
            peer = H2Server(seen)
            server.sendall(peer.receive(b""))
            while not seen:
                server.sendall(peer.receive(server.recv(65536)))
            assert client.communicate(timeout=DEADLINE_S)[0] in {b"/public/a", "/public/a"}
    assert (b":scheme", b"https") in seen[0][2]


def test_a_server_that_prefers_http_1_gets_it_although_its_client_speaks_http2(world):
    here = world(inside_row(PUBLIC))
    with here.live, here.serving(NAME, protocols=("http/1.1",)) as server:
        code, out = here.curl(f"https://{NAME}/public/a", "--http2")
        assert (code, out.split()[-2:]) == (0, ["200", "2"]), out
        assert server.heads[0].startswith(b"GET /public/a HTTP/1.1")


def test_clients_must_have_a_certificate_where_the_rule_names_an_authority(world):
    row = TlsContextRow("web", "inside", trusted_ca="ca.crt")
    here = world(inside_row(PUBLIC, terminate=row))
    (here.secrets / "web" / "inside" / "ca.crt").write_bytes(here.private.certificate)
    mine = here.private.secret(here.folder / "mine", "client.example")
    with here.live, here.serving(NAME) as server:
        url = f"https://{NAME}/public/a"
        assert here.curl(url)[0] != 0
        assert server.accepted == 0
        code, out = here.curl(url, "--cert", mine / "tls.crt", "--key", mine / "tls.key")
        assert (code, out.split()[-2]) == (0, "200"), out


def test_large_bodies_pass_through_both_tls_layers_whole_in_bounded_memory(world):
    here = world(inside_row(HttpRuleRow()))
    size = 24 * 1024 * 1024
    body = here.folder / "body"
    body.write_bytes(bytes(range(256)) * (size // 256))
    with here.live, here.serving(NAME) as server:
        server.answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + body.read_bytes()
        before = here.live.resident_bytes()
        got = here.folder / "got"
        for version in ("--http1.1", "--http2"):
            limit = ("--limit-rate", "20M")
            code, out = here.curl(f"https://{NAME}/big", version, *limit, "-o", got)
            assert (code, out.split()[-2]) == (0, "200"), out
            assert got.read_bytes() == body.read_bytes()
        assert here.live.resident_bytes() - before < 16 * 1024 * 1024
