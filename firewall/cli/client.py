"""The command's side of the API: JSON over the agent's unix socket, with the standard library only.

`aiohttp` would cost 200 ms of import time before the first byte; a command that answers at once is
worth these few lines.
"""

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode

import click

from firewall.cli.exits import ExitCode

CONNECT_TIMEOUT_S = 5.0
"""The agent accepts at once or not at all; longer waits only hide that it hangs."""

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


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("bartizan")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(CONNECT_TIMEOUT_S)
        try:
            self.sock.connect(self._path)
        except OSError as error:
            self.sock.close()
            raise AgentUnreachableError(self._path, error) from error
        self.sock.settimeout(None)


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
        with self._request("GET", segments, query) as response:
            return response.read().decode()

    def lines(self, *segments: str, query: Query | None = None) -> Iterator[bytes]:
        """Yield the lines of a streaming answer as they come; raises as `get`."""
        with self._request("GET", segments, query) as response:
            yield from response

    def _json(
        self,
        method: str,
        segments: tuple[str, ...],
        query: Query | None,
        body: bytes | None = None,
        content_type: str = "",
    ) -> Any:
        with self._request(method, segments, query, body, content_type) as response:
            payload = response.read()
        return json.loads(payload) if payload else None

    def _request(
        self,
        method: str,
        segments: tuple[str, ...],
        query: Query | None,
        body: bytes | None = None,
        content_type: str = "",
    ) -> http.client.HTTPResponse:
        url = "/v1/" + "/".join(quote(segment, safe="") for segment in segments)
        if query:
            url += "?" + urlencode(query, doseq=True)
        connection = _UnixConnection(self._path)
        headers = {"Content-Type": content_type} if body is not None else {}
        try:
            connection.request(method, url, body, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise AgentUnreachableError(
                self._path, OSError(0, f"the answer broke off: {error}")
            ) from error
        if response.status >= 400:
            raise _refusal(response)
        return response


def _refusal(response: http.client.HTTPResponse) -> ApiError:
    payload = response.read()
    try:
        error = json.loads(payload)["error"]
        message, problems = str(error["message"]), [str(p) for p in error.get("problems", [])]
    except (ValueError, KeyError, TypeError):
        message, problems = f"HTTP {response.status}: {payload[:200].decode(errors='replace')}", []
    return (InvalidDocumentError if response.status == 422 else ApiError)(message, problems)
