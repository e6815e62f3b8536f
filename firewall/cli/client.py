"""The command's side of the API: JSON over the agent's unix socket.

HTTP/1.0, one request per connection: the answer ends where its Content-Length or the stream does,
so that a few lines read it. `aiohttp` would cost 200 ms of imports before the first byte, and
`http.client` 40 ms (it imports ssl and email); a command is worth it that answers at once.
Source: RFC 1945.
"""

import io
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlencode

import click

from firewall.cli.exits import ExitCode
from firewall.cli.interrupt import Interrupt

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

CONNECT_TIMEOUT_S = 5.0
"""The agent accepts at once or not at all; longer waits only hide that it hangs."""

LATE = "not every worker enforces this yet; `bartizan status` says which"

Query = dict[str, str | list[str]]


class ApiError(click.ClickException):
    """The agent refused; `problems` are its file:line:column lines."""

    exit_code = ExitCode.FAILED

    def __init__(self, message: str, problems: list[str]) -> None:
        super().__init__(message)
        self.problems = problems

    def show(self, file: Any = None) -> None:
        """Print the problems first, so that the last line says what became of the request."""
        for problem in self.problems:
            click.echo(problem, err=True, file=file)
        click.echo(f"Error: {self.message}", err=True, file=file)


class WrongRequestError(ApiError):
    """The agent cannot read what the command line asks for (HTTP 400)."""

    exit_code = ExitCode.USAGE


class InvalidDocumentError(ApiError):
    """The agent refused what the document says (HTTP 422)."""

    exit_code = ExitCode.INVALID


class AgentUnreachableError(click.ClickException):
    """Nobody answers on the socket; the message ends with the next step."""

    exit_code = ExitCode.UNABLE

    def __init__(self, path: str, error: OSError) -> None:
        super().__init__(
            f"cannot reach the agent at {path}: {error.strerror or error}. Is bartizan running?\n"
            "Try: bartizan run -c bartizan.yaml   (another socket: --api-socket PATH or "
            "BARTIZAN_API_SOCKET)"
        )


class Answer(NamedTuple):
    """The head of an answer; `length_bytes` None = the body ends with the stream.

    `enforced` False: the change is made, and some worker still decides by what was before.
    """

    status: int
    length_bytes: int | None
    body: IO[bytes]
    enforced: bool = True

    def read(self) -> bytes:
        """Return the whole body; raises ValueError if it is cut short."""
        payload = self.body.read()
        if self.length_bytes is not None and len(payload) != self.length_bytes:
            raise ValueError(f"{len(payload)} of {self.length_bytes} bytes came")
        return payload


class Client:
    """One agent, addressed by its API socket."""

    def __init__(self, path: str) -> None:
        self._path = path

    def get(self, *segments: str, query: Query | None = None) -> Any:
        """Return the decoded answer of GET /v1/segments.

        Raises:
            AgentUnreachableError: nobody listens. ApiError: the agent refused.
        """
        return self._json("GET", segments, query)

    def change(
        self,
        method: str,
        *segments: str,
        query: Query | None = None,
        document: Any = None,
        text: str | None = None,
    ) -> Any:
        """Send a change: a JSON `document` or YAML `text` as the body; raises as `get`."""
        if text is not None:
            return self._json(method, segments, query, text.encode(), "application/yaml")
        body = None if document is None else json.dumps(document).encode()
        return self._json(method, segments, query, body, "application/json")

    def text(self, *segments: str, query: Query | None = None) -> str:
        """Return the answer of GET as text; raises as `get`."""
        with self._request("GET", segments, query) as answer:
            return answer.read().decode()

    def lines(
        self, *segments: str, query: Query | None = None, until: Interrupt | None = None
    ) -> Iterator[bytes]:
        """Yield the lines of a streaming answer as they come; raises as `get`.

        Args:
            segments: of the path.
            query: its parameters.
            until: has been entered, and ends the stream; a line that it cuts is left out.
        """
        with self._request("GET", segments, query, until=until) as answer:
            for line in answer.body:
                if line.endswith(b"\n"):
                    yield line
                elif until is None or not until.came:
                    raise ValueError(f"after {line[-40:]!r}")

    def _json(
        self,
        method: str,
        segments: tuple[str, ...],
        query: Query | None,
        body: bytes | None = None,
        content_type: str = "",
    ) -> Any:
        with self._request(method, segments, query, body, content_type) as answer:
            payload = answer.read()
        if not answer.enforced and (query or {}).get("wait") != "0":
            click.echo(f"warning: {LATE}", err=True)
        return json.loads(payload) if payload else None

    @contextmanager
    def _request(
        self,
        method: str,
        segments: tuple[str, ...],
        query: Query | None,
        body: bytes | None = None,
        content_type: str = "",
        until: Interrupt | None = None,
    ) -> Iterator[Answer]:
        url = "/v1/" + "/".join(quote(segment, safe="") for segment in segments)
        if query:
            url += "?" + urlencode(query, doseq=True)
        head = f"{method} {url} HTTP/1.0\r\nHost: bartizan\r\n"
        if body is not None:
            head += f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        with self._connected() as stream, _reader(stream, until) as reader:
            try:
                stream.sendall(f"{head}\r\n".encode("ascii") + (body or b""))
                answer = read_head(reader)
                if answer.status >= 400:
                    raise _refusal(answer)
                yield answer
            except (OSError, ValueError) as error:
                broken = OSError(0, f"the answer broke off: {error}")
                raise AgentUnreachableError(self._path, broken) from error

    def _connected(self) -> socket.socket:
        stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        stream.settimeout(CONNECT_TIMEOUT_S)
        try:
            stream.connect(self._path)
        except OSError as error:
            stream.close()
            raise AgentUnreachableError(self._path, error) from error
        stream.settimeout(None)
        return stream


class _Stream(io.RawIOBase):
    """Bytes of a socket until its peer, or the user, ends them."""

    def __init__(self, stream: socket.socket, until: Interrupt) -> None:
        self._stream = stream
        self._until = until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        return self._stream.recv_into(buffer) if self._until.wait(self._stream) else 0


def _reader(stream: socket.socket, until: Interrupt | None) -> IO[bytes]:
    """Return what reads a socket, until an interrupt if there is one."""
    if until is None:
        return stream.makefile("rb")
    return io.BufferedReader(_Stream(stream, until))


def read_head(reader: IO[bytes]) -> Answer:
    """Read the status line and the header fields; raises ValueError if that is no HTTP answer."""
    line = reader.readline()
    version, _, rest = line.partition(b" ")
    if not version.startswith(b"HTTP/1."):
        raise ValueError(f"no HTTP answer: {line[:80]!r}")
    length_bytes, enforced = None, True
    while field := reader.readline().strip():
        name, _, value = field.partition(b":")
        if name.lower() == b"content-length":
            length_bytes = int(value)
        elif name.lower() == b"bartizan-enforced":
            enforced = value.strip() != b"no"
    return Answer(int(rest[:3]), length_bytes, reader, enforced)


def _refusal(answer: Answer) -> ApiError:
    payload = answer.read()
    try:
        error = json.loads(payload)["error"]
        message, problems = str(error["message"]), [str(p) for p in error.get("problems", [])]
    except (ValueError, KeyError, TypeError):
        message, problems = f"HTTP {answer.status}: {payload[:200].decode(errors='replace')}", []
    kinds = {400: WrongRequestError, 422: InvalidDocumentError}
    return kinds.get(answer.status, ApiError)(message, problems)
