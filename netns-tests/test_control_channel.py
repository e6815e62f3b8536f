"""The channel between agent and worker over real sockets. Needs no privileges."""

import asyncio
import os
import select
import socket
import stat
import subprocess
import sys
import threading

import pytest
from traffic import DEADLINE_S

from firewall.control.agent_channel import AgentChannel
from firewall.control.messages import Acknowledged, Announce, Answer, Ask, Drain, Events, Hello
from firewall.control.unix import ChannelBusyError, ChannelClosedError, ChannelError, listener_pid
from firewall.control.worker_channel import WorkerChannel
from firewall.flows.event import PacketEvent


def packet_event(source_port):
    return PacketEvent(
        time_ns=1, verdict=1, drop_reason=0, direction=1, source=bytes(4), destination=bytes(4),
        protocol=6, source_port=source_port, destination_port=80, tcp_flags=2, icmp_type=-1,
        icmp_code=-1, length=60, source_identity=2, destination_identity=256, source_endpoint=0,
        destination_endpoint=1, match=1, audited=False, reply=False, ct_state="new",
        interface_index=3, proxy_port=0, policy_revision=1,
    )  # fmt: skip


@pytest.fixture
def worker(tmp_path):
    channel = WorkerChannel(tmp_path / "datapath-0.sock", "datapath", 0, "9.9")
    yield channel
    channel.close()


class Loop(threading.Thread):
    """A worker's poll loop: acknowledges, answers asks, ends on Drain."""

    def __init__(self, channel, rows=()):
        super().__init__(daemon=True)
        self.channel, self.rows = channel, rows
        self._wake, self._woken = socket.socketpair()

    def end(self):
        """Leave the loop: a channel belongs to one thread, closing it here would be two."""
        self._wake.send(b"x")
        self.join(DEADLINE_S)
        self._wake.close()
        self._woken.close()
        self.channel.close()

    def run(self):
        while True:
            ready, _, _ = select.select([self.channel.fileno(), self._woken], [], [], DEADLINE_S)
            if self._woken in ready or not ready:
                return
            for message in self.channel.receive():
                match message:
                    case Announce():
                        self.channel.send(Acknowledged(message.revision))
                    case Ask():
                        self.channel.send(Answer(message.request, self.rows, last=True))
                    case Drain():
                        self.channel.close()
                        return


@pytest.fixture
def serve():
    """Start loops that end with the test."""
    loops = []

    def start(channel, rows=()):
        loop = Loop(channel, rows)
        loop.start()
        loops.append(loop)
        return loop

    yield start
    for loop in loops:
        loop.end()


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 2 * DEADLINE_S))


def test_the_socket_file_is_private_and_goes_with_the_worker(tmp_path):
    """Mode 0600 whatever the umask."""
    old = os.umask(0)
    try:
        channel = WorkerChannel(tmp_path / "w.sock", "datapath", 0, "1")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "w.sock").stat().st_mode) == 0o600
    channel.close()
    channel.close()
    assert not (tmp_path / "w.sock").exists()


def test_a_stale_socket_file_is_replaced_and_a_living_one_is_not(tmp_path, worker):
    """A worker that was killed leaves its file behind."""
    with pytest.raises(ChannelBusyError) as caught:
        WorkerChannel(worker.path, "datapath", 0, "1")
    assert caught.value.pid == os.getpid()
    script = (
        "import os, sys; from firewall.control.worker_channel import WorkerChannel;"
        "c = WorkerChannel(sys.argv[1], 'datapath', 0, '1'); os.kill(os.getpid(), 9)"
    )
    stale = tmp_path / "stale.sock"
    subprocess.run([sys.executable, "-c", script, stale], check=False)
    assert stale.exists()
    assert listener_pid(stale) == 0
    WorkerChannel(stale, "datapath", 0, "1").close()


def test_a_file_that_is_no_socket_is_not_touched(tmp_path):
    """Nothing of others is removed."""
    path = tmp_path / "w.sock"
    path.write_text("precious")
    with pytest.raises(ChannelError, match="not a socket"):
        WorkerChannel(path, "datapath", 0, "1")
    assert path.read_text() == "precious"


def test_a_later_worker_keeps_its_socket_file_when_the_older_closes(tmp_path):
    """Close removes only its own inode."""
    first = WorkerChannel(tmp_path / "w.sock", "datapath", 0, "1")
    (tmp_path / "w.sock").unlink()
    second = WorkerChannel(tmp_path / "w.sock", "datapath", 0, "1")
    first.close()
    assert listener_pid(tmp_path / "w.sock") == os.getpid()
    second.close()


def test_hello_announce_acknowledge_ask_answer(worker, serve):
    """The whole conversation, answers larger than one datagram included."""
    rows = tuple({"row": number, "text": "y" * 200} for number in range(20_000))  # about 4.5 MB
    thread = serve(worker, rows)

    async def conversation():
        agent = AgentChannel(worker.path)
        hello = await agent.connect(DEADLINE_S)
        assert hello == Hello("datapath", 0, os.getpid(), "9.9", 0)
        seen = []

        async def pump():
            seen.extend([message async for message in agent])

        pumping = asyncio.create_task(pump())
        await agent.announce(3, "/s")
        answer = await agent.ask("conntrack", DEADLINE_S)
        assert tuple(answer) == rows
        await agent.drain(0)
        await pumping
        assert seen == [Acknowledged(3)]
        assert not agent.connected
        with pytest.raises(ChannelClosedError):
            await agent.ask("status")

    run(conversation())
    thread.join(DEADLINE_S)


def test_the_next_hello_tells_the_revision_in_force(worker, serve):
    """A new agent learns what the worker enforces already."""
    worker.send(Acknowledged(12))
    worker.send(Acknowledged(13, "does not load"))
    serve(worker)

    async def conversation():
        agent = AgentChannel(worker.path)
        assert (await agent.connect(DEADLINE_S)).revision == 12
        agent.close()

    run(conversation())


def test_connect_waits_for_a_worker_that_starts_later(tmp_path, serve):
    """Starting order does not matter."""
    path = tmp_path / "late.sock"

    async def conversation():
        agent = AgentChannel(path)
        with pytest.raises(TimeoutError):
            await agent.connect(0.2)
        connecting = asyncio.create_task(agent.connect(DEADLINE_S))
        await asyncio.sleep(0)  # its first attempt finds nobody
        late = WorkerChannel(path, "datapath", 4, "1")
        serve(late)
        assert (await connecting).number == 4
        agent.close()

    run(conversation())


def test_a_new_agent_replaces_the_old_one(worker, serve):
    """A successor need not wait for the kernel to notice that the first agent died."""
    serve(worker)

    async def conversation():
        first, second = AgentChannel(worker.path), AgentChannel(worker.path)
        await first.connect(DEADLINE_S)
        await second.connect(DEADLINE_S)
        assert [message async for message in first] == []
        await second.announce(8, "/s")
        async for message in second:
            assert message == Acknowledged(8)
            break
        second.close()

    run(conversation())


def test_events_without_an_agent_are_counted_and_told_later(worker):
    """Loss is visible."""
    assert not worker.send(Events(tuple(packet_event(n) for n in range(5)), lost_count=2))
    assert worker.lost_count == 7
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as agent:
        agent.connect(str(worker.path))
        worker.receive()
        assert worker.send(Events((packet_event(9),)))
        agent.recv(1 << 17)
        assert b"lost_count\x07" in agent.recv(1 << 17)
    assert worker.lost_count == 0
    assert worker.lost_total_count == 7


def test_a_sleeping_agent_never_blocks_the_worker(worker):
    """Events are dropped when the buffer is full; acknowledgements wait and arrive in order."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as agent:
        agent.settimeout(DEADLINE_S)
        agent.connect(str(worker.path))
        worker.receive()
        batch = Events(tuple(packet_event(n) for n in range(300)))
        sent = 0
        while worker.send(batch):
            sent += 1
            assert sent < 10_000
        for revision in range(1, 4):
            assert worker.send(Acknowledged(revision))
        lost = worker.lost_total_count
        assert lost == 300
        received = b""
        while b"\xa8revision\x03" not in received:
            select.select([worker.fileno()], [], [], 0)
            worker.receive()
            received = agent.recv(1 << 17)
        assert worker.lost_count == lost


def test_garbage_ends_the_connection_and_nothing_else(worker, serve):
    """An agent of another kind is dropped; the next one is served."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.connect(str(worker.path))
        stranger.send(b"GET / HTTP/1.1\r\n\r\n")
        assert worker.receive() == []
        assert not worker.connected
        stranger.settimeout(DEADLINE_S)
        stranger.recv(1 << 17)  # the greeting
        assert stranger.recv(1) == b""
    serve(worker)

    async def conversation():
        agent = AgentChannel(worker.path)
        await agent.connect(DEADLINE_S)
        agent.close()

    run(conversation())


def test_the_worker_end_works_under_asyncio_and_uvloop(worker):
    """One descriptor to watch, whatever watches it."""
    uvloop = pytest.importorskip("uvloop")

    async def conversation():
        loop = asyncio.get_running_loop()

        def ready():
            for message in worker.receive():
                if isinstance(message, Announce):
                    worker.send(Acknowledged(message.revision))

        loop.add_reader(worker.fileno(), ready)
        agent = AgentChannel(worker.path)
        await agent.connect(DEADLINE_S)
        await agent.announce(2, "/s")
        async for message in agent:
            assert message == Acknowledged(2)
            break
        agent.close()
        loop.remove_reader(worker.fileno())

    run(conversation())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(conversation())


def test_closing_wakes_whoever_iterates(worker, serve):
    """A supervisor that lets go of a worker does not leave a task behind."""
    serve(worker)

    async def conversation():
        agent = AgentChannel(worker.path)
        await agent.connect(DEADLINE_S)

        async def pump():
            return [message async for message in agent]

        pumping = asyncio.create_task(pump())
        asking = asyncio.create_task(agent.ask("status"))
        await asyncio.sleep(0)
        agent.close()
        assert await pumping == []
        with pytest.raises(ChannelClosedError):
            await asking

    run(conversation())
