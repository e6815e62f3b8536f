"""A client connection played to its end against the core; the server answers what it can read."""

import re

from http_transcript import Script

from l7proxy.commands import (
    CloseClient,
    CloseUpstream,
    OpenUpstream,
    SendClient,
    SendUpstream,
    ShutdownClient,
)

REPLY = b"HTTP/1.1 200 OK\r\nX-Upstream: 1\r\nContent-Length: 0\r\n\r\n"


class Played:
    """What came of it: the `client`'s bytes, the `servers`, whether the client's side has `ended`.

    Args:
        script: the core, with its policy and limits.
        segments: the client's bytes, as they are cut.
        make: makes a server, for each connection to it.
        read: gives it bytes, and returns the requests that are complete with them.
    """

    def __init__(self, script: Script, segments, make, read) -> None:
        self._script, self._make, self._read = script, make, read
        self.client = b""
        self.servers = []
        self.ended = False
        for segment in segments:
            if segment and not self.ended:
                self._apply(script.perform("client_data", segment))

    def _apply(self, commands) -> None:
        for command in commands:
            match command:
                case SendClient(data):
                    self.client += data
                case OpenUpstream():
                    self.servers.append(self._make())
                    self._apply(self._script.perform("upstream_opened"))
                case SendUpstream(data):
                    for _ in self._read(self.servers[-1], data):
                        self._apply(self._script.perform("upstream_data", REPLY))
                case ShutdownClient() | CloseClient():
                    self.ended = True
                case CloseUpstream():
                    pass

    @property
    def answers(self) -> list[str]:
        """The status of each answer to the client, "F" for the server's own."""
        head = rb"HTTP/1\.1 (\d\d\d)[^\r]*\r\n((?:[^\r]+\r\n)*)\r\n"
        found = re.findall(head, self.client)
        return ["F" if b"X-Upstream" in rest else status.decode() for status, rest in found]
