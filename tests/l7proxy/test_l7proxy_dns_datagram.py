"""The sockets of DNS over UDP when the kernel, or we, fail."""

import asyncio
import errno
from types import SimpleNamespace

from idle_poller import Watching

from l7proxy import poller
from l7proxy.dns_datagram import _Ear, _Question
from l7proxy.poller import READ


class Script:
    """A socket that gives datagrams and errors as written, then has none."""

    def __init__(self, *script):
        self.script = list(script)

    def fileno(self):
        return 5

    def recv(self, _size, *_rest):
        found = self.script.pop(0) if self.script else BlockingIOError()
        if isinstance(found, Exception):
            raise found
        return found

    recvmsg = recv


def test_a_listener_that_cannot_be_read_is_left_alone_for_a_while(monkeypatch):
    """It stays ready, and would keep the loop busy."""
    monkeypatch.setattr(poller, "PAUSE_S", 0.0)

    async def run():
        watching, came = Watching(), []
        sock = Script((b"1", [], 0, ()), OSError(errno.ENOBUFS, "full"), (b"2", [], 0, ()))
        ear = _Ear(watching, sock, lambda data, *_: came.append(data))
        watching.changed.clear()
        ear.ready(READ)
        assert (came, watching.watched) == ([b"1"], set())
        async with asyncio.timeout(60):
            await watching.changed.wait()
        ear.ready(READ)
        assert came == [b"1", b"2"]
        sock.script = [OSError(errno.ENOBUFS, "full")]
        ear.ready(READ)
        ear.close()
        for _ in range(3):  # turns of the loop, in which the timer would have come
            await asyncio.sleep(0)
        assert watching.watched == set()

    asyncio.run(run())


def test_a_question_ends_with_its_answer_an_error_of_the_kernel_or_one_of_ours():
    told = []
    owner = SimpleNamespace(
        answered=lambda _question, data: told.append(data) or data == b"right",
        failed=lambda _question, reason: told.append(reason),
    )
    question = _Question(owner, None, (), Script(b"forged", b"right", b"late"))
    question.ready(READ)
    assert told == [b"forged", b"right"]
    question.sock = Script(OSError(errno.ECONNREFUSED, "refused"), b"late")
    question.ready(READ)
    question.fail(ValueError("ours"))
    assert told[2:] == ["refused", "internal error: ours"]
