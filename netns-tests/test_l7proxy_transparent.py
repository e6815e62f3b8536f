"""A proxy worker between two hosts: addresses, policy on live connections, bodies, ends."""

import asyncio
import hashlib
import signal
import socket
import threading
from contextlib import contextmanager

import h2.config
import h2.connection
import h2.events
import msgspec
import pytest
from http_transcript import PUBLIC
from l7proxy_live import PROXY_PORT, Live, snapshot
from traffic import DEADLINE_S, eventually

from conntrack.address import parse_address
from firewall.control.agent_channel import AgentChannel
from firewall.control.messages import Acknowledged

pytestmark = pytest.mark.needs("tproxy", "tproxy6", "socket", "socket6", "ipv6")

PORT = 80
GET = b"GET /public/a HTTP/1.1\r\nHost: s\r\n\r\n"
GET_ADMIN = b"GET /admin HTTP/1.1\r\nHost: s\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


class World:
    """Client a, node with the proxy, server b; `Live` in the node, both families redirected."""

    def __init__(self, lab, folder, *options, **policy) -> None:
        self.lab = lab(a="app=a", b="app=b")
        self.client, self.server = self.lab.hosts["a"], self.lab.hosts["b"]
        self.policy = policy
        self.live = Live(self.lab.node, folder, *options, source=self.snapshot(1, **policy))
        for address in (self.server.address4, self.server.address6):
            self.live.redirect(address, PORT)

    def snapshot(self, revision, **policy):
        return snapshot(
            revision=revision,
            clients=tuple(map(parse_address, (self.client.address4, self.client.address6))),
            servers=tuple(map(parse_address, (self.server.address4, self.server.address6))),
            **policy,
        )

    def connect(self, family=socket.AF_INET):
        return self.client.connect(self.server.address(family), PORT)


@contextmanager
def listening(world, family=socket.AF_INET):
    with world.server.listen(PORT, family=family) as server:
        server.settimeout(DEADLINE_S)
        yield server


def receive(sock, until):
    """Read until `until` has come; everything read."""
    data = b""
    while until not in data:
        more = sock.recv(65536)
        assert more, data
        data += more
    return data


def serve_once(server, answer=OK):
    connection, peer = server.accept()
    connection.settimeout(DEADLINE_S)
    seen = receive(connection, b"\r\n\r\n")
    connection.sendall(answer)
    return connection, peer, seen


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["v4", "v6"])
def test_server_sees_the_client_but_another_port(lab, tmp_path, family):
    """One port for both legs would be one flow to the kernel's connection tracking."""
    world = World(lab, tmp_path)
    with world.live, listening(world, family) as server, world.connect(family) as client:
        client.sendall(GET)
        connection, peer, seen = serve_once(server)
        assert receive(client, b"hi") == OK
        assert peer[0] == world.client.address(family)
        assert peer[1] != client.getsockname()[1]
        assert b"X-Request-Id: " in seen
        connection.close()


def test_port_of_the_client_is_avoided_at_both_ends_of_the_range(lab, tmp_path):
    world = World(lab, tmp_path)
    with world.live, listening(world) as server:
        for port in (1, 1024, 32768, 46884, 60999, 65535):
            with world.client.connect(world.server.address4, PORT, source_port=port) as client:
                client.sendall(GET)
                connection, peer, _ = serve_once(server)
                receive(client, b"hi")
                assert peer[1] != port
                connection.close()


def test_more_connections_than_there_are_ports_reach_the_server(lab, tmp_path):
    """A port that we have closed waits for a minute, unless the kernel may take it again."""
    world = World(lab, tmp_path)
    world.lab.node.netns.set(ipv4__ip_local_port_range="61000 61003")
    ports = []

    def served():
        with world.connect() as client:
            client.settimeout(DEADLINE_S)
            client.sendall(GET.replace(b"Host", b"Connection: close\r\nHost"))
            return receive(client, b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")

    with world.live, listening(world) as server:
        for _ in range(6):
            helper = threading.Thread(target=lambda: ports.append(serve_and_part(server)))
            helper.start()
            eventually(served, "there is a port")
            helper.join()
    assert set(ports) <= set(range(61000, 61004))


def serve_and_part(server):
    """Answer one request, and close when the proxy does; the proxy's port."""
    connection, peer, _ = serve_once(server)
    with connection:
        assert connection.recv(1) == b""
    return peer[1]


def test_denied_request_never_reaches_the_server_and_the_connection_stays(lab, tmp_path):
    world = World(lab, tmp_path)
    with world.live, listening(world) as server, world.connect() as client:
        client.sendall(GET_ADMIN)
        assert receive(client, b"Access denied\r\n").startswith(b"HTTP/1.1 403 ")
        client.sendall(GET)
        connection, _, seen = serve_once(server)
        assert b"/admin" not in seen
        receive(client, b"hi")
        connection.close()


async def announce(world, revision, **policy):
    """Publish another snapshot and wait until it is enforced; the events seen meanwhile."""
    return await world.live.announce(world.snapshot(revision, **policy))


def test_policy_change_holds_for_the_next_request_of_an_open_connection(lab, tmp_path):
    world = World(lab, tmp_path)
    with world.live, listening(world) as server, world.connect() as client:
        client.sendall(GET)
        connection, _, _ = serve_once(server)
        receive(client, b"hi")
        asyncio.run(announce(world, 2, rules=PUBLIC[1:]))
        client.sendall(GET)
        assert receive(client, b"denied\r\n").startswith(b"HTTP/1.1 403 ")
        connection.close()


def test_a_request_that_waits_for_its_server_is_judged_by_the_new_policy(lab, tmp_path):
    """It has reached nobody yet; what the server gets first is the next one."""
    world = World(lab, tmp_path)
    deaf = ["INPUT", "-p", "tcp", "--dport", str(PORT), "-j", "DROP"]
    with world.live, listening(world) as server, world.connect() as client:
        world.server.run(["iptables", "-A", *deaf], check=True)
        client.sendall(GET)

        def waits():
            return "SYN-SENT" in world.lab.node.run(["ss", "-Htan"]).stdout

        eventually(waits, "the proxy dials the server")
        asyncio.run(announce(world, 2, rules=PUBLIC[1:]))
        assert receive(client, b"denied\r\n").startswith(b"HTTP/1.1 403 ")
        world.server.run(["iptables", "-D", *deaf], check=True)
        client.sendall(GET.replace(b"/public/a", b"/"))
        connection, _, seen = serve_once(server)
        receive(client, b"hi")
        assert seen.startswith(b"GET / ")
        connection.close()


def test_connection_that_lost_its_permission_is_reset_before_the_acknowledgement(lab, tmp_path):
    world = World(lab, tmp_path)
    with world.live, listening(world) as server, world.connect() as client:
        client.sendall(GET)
        connection, _ = server.accept()
        connection.settimeout(DEADLINE_S)
        receive(connection, b"\r\n\r\n")
        events = asyncio.run(announce(world, 2, deny=True))
        for end in (client, connection):
            with pytest.raises(ConnectionResetError):
                end.recv(1)
        assert [event.detail for event in events if event.detail] == ["connection_denied"]
        connection.close()


def test_snapshot_that_is_damaged_is_refused_and_the_old_one_stays(lab, tmp_path):
    world = World(lab, tmp_path)
    with world.live, listening(world) as server:

        async def damaged():
            agent = AgentChannel(world.live.socket_path)
            await agent.connect(DEADLINE_S)
            world.live.snapshot_path.write_bytes(b"bartizan-snapshot 1 9 0\n")
            await agent.announce(2, world.live.snapshot_path)
            async with asyncio.timeout(DEADLINE_S):
                async for message in agent:
                    if isinstance(message, Acknowledged):
                        agent.close()
                        return message.error
            return ""

        assert asyncio.run(damaged())
        with world.connect() as client:
            client.sendall(GET)
            connection, _, _ = serve_once(server)
            receive(client, b"hi")
            connection.close()


def test_without_a_snapshot_connections_are_reset(lab, tmp_path):
    world = World(lab, tmp_path)
    world.live.snapshot_path.unlink(missing_ok=True)
    world.live.process.kill()
    world.live.process.wait()
    world.live.socket_path.unlink(missing_ok=True)
    world.live.process = world.lab.node.popen(world.live.process.args[3:])
    # The reset may come while we still connect.
    with (
        world.live,
        listening(world),
        pytest.raises(ConnectionResetError),
        world.connect() as client,
    ):
        client.sendall(GET)
        client.recv(1)


def test_proxys_own_port_is_not_served(lab, tmp_path):
    """It would connect to itself, for ever."""
    world = World(lab, tmp_path)
    with world.live:
        node = world.lab.node
        # The reset may come while we still connect, or as the end of what we read.
        with pytest.raises(ConnectionError), node.connect("127.0.0.1", PROXY_PORT) as client:
            client.sendall(GET)
            assert client.recv(1) == b""
            raise ConnectionError
        assert world.live.running
        assert "connection from" in world.live.log()


def test_server_that_refuses_is_told_as_502(lab, tmp_path):
    world = World(lab, tmp_path)
    with world.live, world.connect() as client:
        client.sendall(GET)
        assert receive(client, b"Bad Gateway\r\n").startswith(b"HTTP/1.1 502 ")


def test_large_bodies_arrive_whole_through_a_slow_reader_in_bounded_memory(lab, tmp_path):
    world = World(lab, tmp_path, rules=(msgspec.structs.replace(PUBLIC[0], method=None),))
    size = 48 * 1024 * 1024
    block = bytes(range(256)) * 256
    with world.live, listening(world) as server, world.connect() as client:
        client.settimeout(DEADLINE_S)
        before = world.live.resident_bytes()

        def send():
            client.sendall(
                b"POST /public/a HTTP/1.1\r\nHost: s\r\nContent-Length: %d\r\n\r\n" % size
            )
            for _ in range(size // len(block)):
                client.sendall(block)

        sender = threading.Thread(target=send)
        sender.start()
        connection, _ = server.accept()
        connection.settimeout(DEADLINE_S)
        data = receive(connection, b"\r\n\r\n").partition(b"\r\n\r\n")[2]
        peak = before
        seen, left = hashlib.sha256(data), size - len(data)
        while left:
            data = connection.recv(1 << 20)
            assert data
            seen.update(data)
            left -= len(data)
            peak = max(peak, world.live.resident_bytes())
        sender.join()
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n")
        receive(client, b"0\r\n\r\n")
        assert seen.digest() == hashlib.sha256(block * (size // len(block))).digest()
        assert peak - before < 8 * 1024 * 1024
        connection.close()


def listens(world):
    """Whether the proxy's port is listened on."""
    return str(PROXY_PORT) in world.lab.node.run(["ss", "-Hltn"]).stdout


def test_sigterm_finishes_what_has_begun(lab, tmp_path):
    world = World(lab, tmp_path)
    with world.live, listening(world) as server, world.connect() as client:
        client.sendall(GET)
        connection, _ = server.accept()
        connection.settimeout(DEADLINE_S)
        receive(connection, b"\r\n\r\n")
        world.live.process.send_signal(signal.SIGTERM)
        eventually(lambda: not listens(world), "the listeners are closed")
        connection.sendall(OK)
        answer = receive(client, b"hi")
        assert b"Connection: close" in answer
        client.close()
        assert world.live.process.wait(DEADLINE_S) == 0
        connection.close()


def test_streams_of_one_client_take_no_more_connections_to_servers_than_it_may_have(lab, tmp_path):
    """A server of HTTP/1 serves each stream on one of its own; descriptors are everybody's."""
    world = World(lab, tmp_path, "--set", "connection_count_per_source=3")
    client = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding=None))
    client.initiate_connection()
    fields = [(":method", "GET"), (":scheme", "http"), (":path", "/public/a"), (":authority", "s")]

    def ask(*numbers):
        for number in numbers:
            client.send_headers(number, fields, end_stream=True)
        sock.sendall(client.data_to_send())

    def answers(count):
        found = {}
        while len(found) < count:
            for event in client.receive_data(sock.recv(65536)):
                if isinstance(event, h2.events.ResponseReceived):
                    found[event.stream_id] = dict(event.headers)[b":status"]
        return found

    with world.live, listening(world) as server, world.connect() as sock:
        ask(1, 3, 5, 7)
        assert answers(1) == {7: b"503"}
        accepted = [server.accept()[0] for _ in range(3)]
        for upstream in accepted:
            receive(upstream, b"\r\n\r\n")
            upstream.sendall(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            upstream.close()
        assert answers(3) == dict.fromkeys((1, 3, 5), b"200")
        ask(9)
        with server.accept()[0] as upstream:
            receive(upstream, b"\r\n\r\n")
            upstream.sendall(OK)
            assert answers(1) == {9: b"200"}
