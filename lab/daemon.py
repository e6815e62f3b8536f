"""A running bartizan in a lab's node: start, wait until it is ready, ask, stop, kill.

Sockets, state and log are in the lab's folder, so they end with the lab. The API is spoken as a
user would speak it: JSON over the unix socket.
"""

import http.client
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

import yaml

from lab import enclosure
from lab.laboratory import Host, Lab, LabError, Machine

T = TypeVar("T")

Query = Mapping[str, str | float]

READY_S = 60.0
"""How long a start may take on a busy machine before it counts as failed."""

ENFORCED_S = 30.0
"""How long workers may take to follow a change on a busy machine."""

_POLL_MS = 20


class ApiRefused(Exception):  # noqa: N818 (an answer, not an accident)
    """The agent answered with an error; `status` is HTTP's, `document` its JSON."""

    def __init__(self, status: int, document: Any) -> None:
        super().__init__(f"HTTP {status}: {json.dumps(document)}")
        self.status = status
        self.document = document


class UnixConnection(http.client.HTTPConnection):
    """HTTP over the unix socket of an agent."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect; raises OSError if nobody listens."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(os.fspath(self._path))


def command() -> list[str]:
    """How to call `bartizan` of this very installation."""
    script = Path(sys.executable).with_name("bartizan")
    if script.exists():
        return [str(script)]
    return [sys.executable, "-c", "from firewall.cli import main; main()"]


class Bartizan:
    """The agent and its workers in a lab's node, or in another machine that forwards.

    Attributes:
        api_socket: For `bartizan --api-socket`.
        process: The agent; None while it is stopped.
    """

    def __init__(
        self,
        lab: Lab,
        config: Mapping[str, Any] | Path | None = None,
        *,
        machine: Machine | None = None,
    ) -> None:
        """Prepare; `config` is laid over the defaults, run_dir and state_dir are the lab's."""
        self._lab = lab
        self._machine = machine or lab.node
        folder = lab.folder if machine is None else lab.folder / machine.name
        folder.mkdir(exist_ok=True)
        self.run_dir = folder / "run"
        self.state_dir = folder / "state"
        self.api_socket = self.run_dir / "api.sock"
        self.config_path = folder / "bartizan.yaml"
        self.log_path = folder / "bartizan.log"
        given = yaml.safe_load(config.read_text()) if isinstance(config, Path) else config
        document = {
            "run_dir": str(self.run_dir),
            "state_dir": str(self.state_dir),
            "node_name": self._machine.name,
            **(given or {}),
        }
        self.config_path.write_text(yaml.safe_dump(document), encoding="utf-8")
        self.process: subprocess.Popen[str] | None = None
        self._range: dict[str, str] = {}

    # --- life ---------------------------------------------------------------------------------

    def start(self, ready_s: float = READY_S) -> None:
        """Start the agent and wait until every worker enforces its snapshot.

        Raises:
            LabError: it ended, or is not ready in time; the text carries its log.
        """
        with self.log_path.open("a", encoding="utf-8") as log:
            argv = [*command(), "run", "-c", str(self.config_path)]
            self.process = self._machine.popen(argv, stdout=log)
        try:
            self.wait_until(self._is_ready, "bartizan is ready", ready_s)
        except TimeoutError as error:
            raise LabError(f"{error}\n{self.log()}") from error

    def _is_ready(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise LabError(f"bartizan ended with exit {self.process.returncode}\n{self.log()}")
        try:
            status = self.get("/v1/status")
        except (OSError, http.client.HTTPException, ApiRefused):
            return False
        # One that hands over to another is on its way out.
        workers = [w for w in status.get("workers", []) if w.get("state") != "leaving"]
        revision = status.get("revision", 0)
        return bool(workers) and all(
            worker.get("state") in ("ready", "running") and worker.get("revision") == revision
            for worker in workers
        )

    def stop(self, within_s: float = 30.0) -> int:
        """SIGTERM: drain, take the rules away, end; the exit code.

        Raises:
            LabError: it did not end in time.
        """
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(within_s)
        except subprocess.TimeoutExpired as error:
            raise LabError(f"bartizan did not end after SIGTERM\n{self.log()}") from error
        self.process = None
        return code

    def kill(self) -> None:
        """SIGKILL to the agent alone; its workers go on deciding."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None

    def wait_until(self, condition: Callable[[], T], what: str, within_s: float = 30.0) -> T:
        """The first truthy answer of `condition`.

        Raises:
            TimeoutError: none in time.
        """
        deadline = time.monotonic() + within_s
        nothing = select.poll()
        while not (answer := condition()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {within_s} s: {what}")
            nothing.poll(_POLL_MS)
        return answer

    def log(self) -> str:
        """What the agent and its workers wrote so far."""
        try:
            return self.log_path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    # --- API ----------------------------------------------------------------------------------

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        query: Query | None = None,
        timeout_s: float = 2 * ENFORCED_S,
    ) -> tuple[int, bytes]:
        """One HTTP exchange: status and body."""
        connection = UnixConnection(self.api_socket, timeout_s)
        try:
            target = f"{path}?{urlencode(query)}" if query else path
            connection.request(method, target, body=body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def _json(self, method: str, path: str, body: bytes | None, query: Query) -> Any:
        status, data = self.request(method, path, body, query)
        document = json.loads(data) if data.strip() else None
        if status >= http.HTTPStatus.BAD_REQUEST:
            raise ApiRefused(status, document)
        return document

    def get(self, path: str, **query: str | float) -> Any:
        """GET, as JSON; raises ApiRefused."""
        return self._json("GET", path, None, query)

    def put(self, path: str, document: Any, **query: str | float) -> Any:
        """PUT a JSON document; raises ApiRefused."""
        return self._json("PUT", path, json.dumps(document).encode(), query)

    def add(self, host: Host, **more: Any) -> dict[str, Any]:
        """Put a host under policy, with the labels of its plan; `more` goes into the request."""
        plan = host.plan
        document = {
            "addresses": list(host.addresses),
            "labels": [f"{key}={value}" for key, value in plan.labels.items()],
            "namespace": plan.namespace,
            "netns": str(host.namespace_path),
            "ports": [f"{port.name}:{port.port}/{port.protocol.lower()}" for port in plan.ports],
            **more,
        }
        row: dict[str, Any] = self.put(f"/v1/endpoint/{host.name}", document, wait=ENFORCED_S)
        return row

    def add_all(self) -> None:
        """Put every managed host of the lab under policy."""
        for host in self._lab.hosts.values():
            if host.plan.managed:
                self.add(host)

    def endpoint(self, name: str) -> dict[str, Any]:
        """One endpoint as the API shows it."""
        row: dict[str, Any] = self.get(f"/v1/endpoint/{name}")
        return row

    def relabel(self, name: str, *remove: str, **labels: str) -> dict[str, Any]:
        """Set labels, remove keys; returns when every worker knows."""
        body = {"set": [f"{key}={value}" for key, value in labels.items()], "remove": list(remove)}
        row: dict[str, Any] = self._json(
            "PATCH", f"/v1/endpoint/{name}/labels", json.dumps(body).encode(), {"wait": ENFORCED_S}
        )
        return row

    def apply(self, text: str, file: str = "test.yaml") -> dict[str, Any]:
        """Apply policies; returns when every worker enforces them."""
        answer: dict[str, Any] = self._json(
            "PUT", "/v1/policy", text.encode(), {"file": file, "wait": ENFORCED_S}
        )
        return answer

    def withdraw(self, kind: str, name: str, namespace: str = "default") -> Any:
        """Delete one policy; returns when every worker knows."""
        return self._json(
            "DELETE",
            "/v1/policy",
            None,
            {"kind": kind, "namespace": namespace, "name": name, "wait": ENFORCED_S},
        )

    def clear(self) -> None:
        """Delete every policy, and let `flows` answer with later decisions only."""
        self._json("DELETE", "/v1/policy", None, {"all": 1, "wait": ENFORCED_S})
        self._range = {"since": datetime.now(UTC).isoformat()}

    def flows(self, last: int = 1000, **filters: str) -> list[dict[str, Any]]:
        """The latest decisions, oldest first, in Hubble's JSON."""
        query: Query = {**self._range, "last": last, **filters}
        status, data = self.request("GET", "/v1/flows", None, query)
        if status != http.HTTPStatus.OK:
            raise ApiRefused(status, data.decode(errors="replace"))
        lines = [json.loads(line) for line in data.splitlines() if line.strip()]
        return [line["flow"] for line in lines if "flow" in line]

    def cli(self, *argv: str | Path, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run the `bartizan` command against this agent, in the node."""
        return self._machine.run([*command(), *argv], timeout_s, env=self.environment)

    def told(self, *argv: str | Path) -> Any:
        """What the command answers with `-o json`.

        Raises:
            LabError: it failed; the text says how.
        """
        done = self.cli(*argv, "-o", "json")
        try:
            return json.loads(done.stdout)
        except ValueError as error:
            words = " ".join(map(str, argv))
            raise LabError(
                f"bartizan {words}: exit {done.returncode}: {done.stderr or done.stdout}"
            ) from error

    @property
    def environment(self) -> dict[str, str]:
        """What a shell needs for `bartizan` to find this agent."""
        return {"BARTIZAN_API_SOCKET": str(self.api_socket)}


def start(
    lab: Lab,
    config: Mapping[str, Any] | Path | None = None,
    *,
    endpoints: bool = True,
    machine: Machine | None = None,
) -> Bartizan:
    """Run bartizan in the lab's node, or in `machine`.

    With `endpoints` every managed host is put under policy.

    Raises:
        LabError: it does not become ready.
    """
    daemon = Bartizan(lab, config, machine=machine)
    daemon.start()
    if endpoints:
        daemon.add_all()
    return daemon


def missing_programs(programs: Sequence[str] = ("ip", "iptables", "ip6tables")) -> list[str]:
    """The programs that a lab with a firewall needs and this machine has not."""
    path = enclosure.search_path()
    return [program for program in programs if shutil.which(program, path=path) is None]
