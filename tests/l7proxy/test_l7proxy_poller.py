"""What the poller tells whom, and how a door takes connections in."""

import asyncio
import errno
import os

import pytest
from idle_poller import Watching

from l7proxy import poller as under_test
from l7proxy.poller import ACCEPTS_PER_TURN, READ, Door, Poller


@pytest.fixture
def pipes():
    """Two pipes, each with a byte in it."""
    ends = [os.pipe(), os.pipe()]
    for _, writing in ends:
        os.write(writing, b"x")
    yield [reading for reading, _ in ends]
    for pair in ends:
        for descriptor in pair:
            os.close(descriptor)


class Watcher:
    """Calls what it was given, and remembers whether it failed."""

    def __init__(self, act):
        self.act, self.failure = act, None

    def ready(self, events):
        self.act()

    def fail(self, error):
        self.failure = error


def turned(set_up):
    """Run `set_up(poller, done)` in a loop until it sets `done`."""

    async def run():
        done = asyncio.Event()
        watching = Poller()
        try:
            set_up(watching, done)
            async with asyncio.timeout(60):
                await done.wait()
        finally:
            watching.close()

    asyncio.run(run())


def test_an_error_fails_its_own_descriptor_and_no_other(pipes, caplog):
    told = []

    def set_up(watching, done):
        def fault():
            watching.forget(pipes[0])
            raise ValueError("ours")

        def served():
            watching.forget(pipes[1])
            told.append("served")
            watching.later(done.set)

        told.append(Watcher(fault))
        watching.watch(pipes[0], READ, told[0])
        watching.watch(pipes[1], READ, Watcher(served))

    turned(set_up)
    assert isinstance(told[0].failure, ValueError)
    assert told[1:] == ["served"]
    assert "internal error" in caplog.text


def test_what_is_put_off_comes_after_everything_that_is_ready(pipes):
    told = []

    def set_up(watching, done):
        def at(descriptor):
            def act():
                watching.forget(descriptor)
                told.append("ready")
                watching.later(lambda: told.append("later"))
                if told.count("ready") == len(pipes):
                    watching.later(done.set)

            return act

        for descriptor in pipes:
            watching.watch(descriptor, READ, Watcher(at(descriptor)))

    turned(set_up)
    assert told == ["ready", "ready", "later", "later"]


def test_what_is_put_off_outside_of_a_turn_is_not_called_from_within(pipes):
    told = []

    def set_up(watching, done):
        watching.later(lambda: told.append("later"))
        watching.later(done.set)
        told.append("now")

    turned(set_up)
    assert told == ["now", "later"]


class Listener:
    """Gives connections away as scripted: what to return, or errors to raise."""

    def __init__(self, *script):
        self.script, self.closed = list(script), False

    def fileno(self):
        return -1 if self.closed else 5

    def accept(self):
        found = self.script.pop(0) if self.script else BlockingIOError()
        if isinstance(found, Exception):
            raise found
        return Accepted(), found

    def close(self):
        self.closed = True


class Accepted:
    def setblocking(self, blocking):
        assert not blocking


def test_a_crowd_at_the_door_does_not_keep_everybody_else_waiting():
    async def run():
        crowd = [(f"10.0.0.{number}", 1) for number in range(ACCEPTS_PER_TURN + 3)]
        entered = []
        listener = Listener(*crowd)
        door = Door(Watching(), listener, lambda _, client: entered.append(client))
        door.ready(READ)
        assert entered == crowd[:ACCEPTS_PER_TURN]
        door.ready(READ)
        assert entered == crowd

    asyncio.run(run())


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EBADF, errno.EINVAL])
def test_where_accepting_fails_the_door_stays_shut_for_a_while(number, monkeypatch, caplog):
    """A listener stays readable, and would keep the loop busy."""
    monkeypatch.setattr(under_test, "PAUSE_S", 0.0)

    async def run():
        watching, entered = Watching(), []
        listener = Listener(OSError(number, "no"), ("10.0.0.1", 1))
        door = Door(watching, listener, lambda _, client: entered.append(client))
        watching.changed.clear()
        door.ready(READ)
        assert watching.watched == set()
        async with asyncio.timeout(60):
            await watching.changed.wait()
        door.ready(READ)
        assert entered == [("10.0.0.1", 1)]

    asyncio.run(run())
    assert caplog.messages == [f"cannot accept: [Errno {number}] no"]


@pytest.mark.parametrize("number", [errno.ECONNABORTED, errno.EPERM, errno.ENETDOWN])
def test_a_connection_that_cannot_be_accepted_keeps_nobody_out(number, caplog):
    """accept(2), "Error handling": try again."""

    async def run():
        watching, entered = Watching(), []
        listener = Listener(OSError(number, "no"), ("10.0.0.1", 1))
        Door(watching, listener, lambda _, client: entered.append(client)).ready(READ)
        assert entered == [("10.0.0.1", 1)]
        assert watching.watched == {listener.fileno()}

    asyncio.run(run())
    assert not caplog.messages


def test_a_door_that_is_closed_while_shut_stays_closed(monkeypatch):
    monkeypatch.setattr(under_test, "PAUSE_S", 0.0)

    async def run():
        watching = Watching()
        door = Door(watching, Listener(OSError(errno.ENFILE, "full")), lambda *_: None)
        door.ready(READ)
        door.close()
        for _ in range(3):  # turns of the loop, in which the timer would have come
            await asyncio.sleep(0)
        assert watching.watched == set()

    asyncio.run(run())
