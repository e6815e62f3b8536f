"""TLS on redirected connections: names without decryption, http rules inside, both real ends."""

import socket
from contextlib import suppress

import hellos
import pytest
from test_l7proxy_transparent import receive
from tls_world import NAME, TlsWorld, names_row
from traffic import FAMILIES

pytestmark = pytest.mark.needs("tproxy", "tproxy6", "socket", "socket6", "ipv6")

GET = b"GET /public/a HTTP/1.1\r\nHost: " + NAME.encode() + b"\r\n\r\n"


@pytest.fixture
def world(lab, tmp_path):
    """A world made of rows."""
    return lambda *rows, **options: TlsWorld(lab, tmp_path, *rows, **options)


def ends_by_reset(sock) -> bool:
    """Whether the other end resets the connection, and says nothing before."""
    sock.settimeout(10)
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
