"""The proxy's admin page: Envoy's paths over all proxy workers.

A unix socket in the run directory (0660), or a loopback address. The agent serves it, out of the
data path: it asks the workers, and shows the snapshot. What changes something is POST; GET is 405.
Values of secrets are in no snapshot, only their names. On a loopback address a request must be for
a loopback host, so that no web page in a browser here can reach it by a name of its own (DNS
rebinding). Source: envoy docs, operations/admin.rst.
"""

import contextlib
import functools
import json
import logging
import re
import socket
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from aiohttp import web

from firewall.agent.engine import Engine
from firewall.agent.proxying import admin_problem
from firewall.agent.secrets import inventory
from firewall.agent.supervisor import Supervisor
from firewall.agent.worker import VERSION, Worker, WorkerState, ask_each
from firewall.control.messages import Instruct
from firewall.control.unix import ChannelError, listen
from firewall.policy.snapshot import Snapshot
from l7proxy import stats

ASK_TIMEOUT_S = 5.0
"""How long a worker may take to answer."""

_LEVELS = ("debug", "info", "warning", "error")

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class _Page(NamedTuple):
    """One of Envoy's paths; what changes something is POST."""

    path: str
    text: str
    serve: Handler
    changes: bool = False


def admin_path(run_dir: Path) -> Path:
    """Where the page is served unless an address is configured."""
    return run_dir / "proxy-admin.sock"


class ProxyAdmin:
    """The page over the proxy workers of a supervisor."""

    def __init__(self, engine: Engine, supervisor: Supervisor) -> None:
        self._engine = engine
        self._supervisor = supervisor
        self._began = time.monotonic()
        self._runner: web.AppRunner | None = None
        self._path: Path | None = None

    async def start(self, run_dir: Path, where: str) -> None:
        """Listen: "socket" = `<run_dir>/proxy-admin.sock`, ADDRESS:PORT, or "off".

        Raises:
            ChannelError, OSError: it cannot be bound.
        """
        if where == "off":
            return
        if where == "socket":
            self._path = admin_path(run_dir)
            bound = listen(self._path, socket.SOCK_STREAM, 0o660)
        else:
            host, _, port = where.rpartition(":")
            family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
            bound = socket.create_server((host.strip("[]"), int(port)), family=family)
        application = web.Application(middlewares=[] if self._path else [_for_this_host])
        for page in self._pages():
            if page.changes:
                application.router.add_post(page.path, page.serve)
                application.router.add_get(page.path, _post_required)
            else:
                application.router.add_get(page.path, page.serve)
        application.router.add_get("/help", self._help)
        self._runner = web.AppRunner(application, handle_signals=False, access_log=None)
        await self._runner.setup()
        await web.SockSite(self._runner, bound).start()

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _pages(self) -> tuple[_Page, ...]:
        form = "?filter=REGEX&usedonly&format=text|json|prometheus"
        level = "(POST) ?level=debug|info|warning|error, of the workers"
        drain = "(POST) let every worker finish what it serves; fresh ones accept"
        return (
            _Page("/", "this list", self._help),
            _Page("/ready", "200 LIVE if every worker serves, else 503", self._ready),
            _Page("/server_info", "version, state, workers", self._server_info),
            _Page("/stats", f"counters; {form}", self._stats),
            _Page("/stats/prometheus", "the same as ?format=prometheus", self._stats_prometheus),
            _Page("/config_dump", "the policy in force, with the revision that each worker"
                  " enforces", self._config_dump),
            _Page("/listeners", "where connections are accepted; ?format=json", self._listeners),
            _Page("/certs", "certificates in use, with names and dates", self._certs),
            _Page("/memory", "resident bytes of the workers", self._memory),
            _Page("/clusters", "towards the servers; ?format=json", self._clusters),
            _Page("/drain_listeners", drain, self._drain_listeners, changes=True),
            _Page("/logging", level, self._logging, changes=True),
            _Page("/reset_counters", "(POST) count from zero again", self._reset_counters,
                  changes=True),
        )  # fmt: skip

    # --- workers ------------------------------------------------------------------------------

    @property
    def _workers(self) -> list[Worker]:
        return [worker for worker in self._supervisor.workers if worker.spec.kind == "l7proxy"]

    @property
    def _running(self) -> list[Worker]:
        return [worker for worker in self._workers if worker.state is WorkerState.RUNNING]

    @property
    def _state(self) -> str:
        serving = {w.spec.number for w in self._running}
        wanted = {w.spec.number for w in self._workers}
        return "LIVE" if serving == wanted and wanted else "INITIALIZING"

    async def _ask(self, what: str) -> list[list[dict[str, object]]]:
        """Ask every worker; one that does not answer is left out."""
        asked = [
            worker
            for worker in self._workers
            if worker.state in (WorkerState.RUNNING, WorkerState.LEAVING)
        ]
        return [*(await ask_each(asked, what, ASK_TIMEOUT_S)).values()]

    async def _tell(self, what: str, value: str = "") -> None:
        for worker in self._workers:
            with contextlib.suppress(ChannelError):
                await worker.channel.send(Instruct(what, value))

    # --- pages --------------------------------------------------------------------------------

    async def _help(self, _: web.Request) -> web.Response:
        pages = self._pages()
        width = max(len(page.path) for page in pages)
        return _text("".join(f"{page.path:<{width}}  {page.text}\n" for page in pages))

    async def _ready(self, _: web.Request) -> web.Response:
        return web.Response(text=f"{self._state}\n", status=200 if self._state == "LIVE" else 503)

    async def _server_info(self, _: web.Request) -> web.Response:
        rows = [row for answer in await self._ask("status") for row in answer]
        document = {
            "version": VERSION,
            "state": self._state,
            "uptime_current_epoch": f"{time.monotonic() - self._began:.0f}s",
            "concurrency": len({worker.spec.number for worker in self._workers}),
            "command_lines": {w.spec.name: " ".join(w.spec.arguments) for w in self._running},
            "workers": rows,
        }
        return _json(document)

    async def _stats(self, request: web.Request) -> web.Response:
        return await self._stats_as(request, request.query.get("format", "text"))

    async def _stats_prometheus(self, request: web.Request) -> web.Response:
        return await self._stats_as(request, "prometheus")

    async def _stats_as(self, request: web.Request, form: str) -> web.Response:
        shown = {"text": stats.as_text, "json": stats.as_json, "prometheus": stats.as_prometheus}
        if form not in shown:
            return _text(f"format={form}: one of {', '.join(shown)}\n", 400)
        found, times = stats.gather(await self._ask("stats"))
        found = sorted([*found, *(await self._server_stats())])
        try:
            chosen = stats.chosen(
                found, times, request.query.get("filter", ""),
                used_only="usedonly" in request.query,
            )  # fmt: skip
        except re.error as error:
            return _text(f"filter: not a regular expression: {error}\n", 400)
        return _text(shown[form](*chosen))

    async def _server_stats(self) -> list[stats.Stat]:
        """Return what Envoy counts of its server."""
        rows = [row for answer in await self._ask("status") for row in answer]
        memory = sum(int(str(row["memory_bytes"])) for row in rows)
        values = {
            "server.live": float(self._state == "LIVE"),
            "server.state": 0.0 if self._state == "LIVE" else 2.0,
            "server.uptime": float(int(time.monotonic() - self._began)),
            "server.concurrency": float(len(self._running)),
            "server.memory_physical_size": float(memory),
        }
        return [stats.Stat(name, value, counts=False) for name, value in values.items()]

    async def _config_dump(self, _: web.Request) -> web.Response:
        snapshot = self._engine.publisher.snapshot
        document = {
            "version_info": str(snapshot.policy_revision),
            "snapshot_revision": snapshot.revision,
            "workers": {
                worker.spec.name: {"revision": worker.revision, "error": worker.error}
                for worker in self._running
            },
            "policies": _policies(snapshot),
        }
        return _json(document)

    async def _listeners(self, request: web.Request) -> web.Response:
        found = []
        for answer in await self._ask("status"):
            for row in answer:
                for key, protocol in (("addresses", "TCP"), ("datagram_addresses", "UDP")):
                    listed = msgspec.convert(row.get(key, ()), tuple[tuple[str, int], ...])
                    name = f"l7proxy-{row['number']}" + ("" if protocol == "TCP" else "-udp")
                    found += [(name, protocol, host, port) for host, port in listed]
        if request.query.get("format") == "json":
            rows = [
                {
                    "name": name,
                    "local_address": {
                        "socket_address": {
                            "protocol": protocol,
                            "address": host,
                            "port_value": port,
                        }
                    },
                }
                for name, protocol, host, port in found
            ]
            return _json({"listener_statuses": rows})
        return _text("".join(f"{name}::{_host(host)}:{port}\n" for name, _, host, port in found))

    async def _certs(self, _: web.Request) -> web.Response:
        folder = self._engine.config.proxy.secrets_dir
        return _json({"certificates": inventory(self._engine.publisher.snapshot, folder)})

    async def _memory(self, _: web.Request) -> web.Response:
        rows = [row for answer in await self._ask("status") for row in answer]
        held = {f"l7proxy-{row['number']}": int(str(row["memory_bytes"])) for row in rows}
        return _json({"total_physical_bytes": str(sum(held.values())), "workers": held})

    async def _clusters(self, request: web.Request) -> web.Response:
        found, _ = stats.gather(await self._ask("stats"))
        prefix = f"cluster.{stats.CLUSTER}."
        rows = {s.name.removeprefix(prefix): s.value for s in found if s.name.startswith(prefix)}
        if request.query.get("format") == "json":
            return _json({"cluster_statuses": [{"name": stats.CLUSTER, "stats": rows}]})
        return _text("".join(f"{stats.CLUSTER}::{key}::{n:.15g}\n" for key, n in rows.items()))

    # --- changes ------------------------------------------------------------------------------

    async def _drain_listeners(self, _: web.Request) -> web.Response:
        for worker in self._running:
            worker.renewal.set()
        log.info("proxy drains by the admin page")
        return _text("OK\n")

    async def _logging(self, request: web.Request) -> web.Response:
        level = request.query.get("level", "")
        if level not in _LEVELS:
            return _text(f"level={level}: one of {', '.join(_LEVELS)}\n", 400)
        await self._tell("log_level", level)
        return _text(f"level: {level}\n")

    async def _reset_counters(self, _: web.Request) -> web.Response:
        await self._tell("reset_counters")
        return _text("OK\n")


def _policies(snapshot: Snapshot) -> list[dict[str, Any]]:
    """Return the L7 rules of each endpoint, with where they are written."""
    by_identity = {row.identity: row for row in snapshot.policies}
    found: list[dict[str, Any]] = []
    for endpoint in snapshot.endpoints:
        row = by_identity.get(endpoint.identity)
        if row is None:
            continue
        sides = {}
        for name, direction in (("ingress", row.ingress), ("egress", row.egress)):
            sides[name] = [
                {
                    "ports": f"{entry.port_low}-{entry.port_high}",
                    "origin": _plain(snapshot.origins[entry.origin]),
                    "l7": _redacted(_plain(snapshot.l7[entry.l7])),
                }
                for entry in direction.entries
                if entry.l7 >= 0
            ]
        if any(sides.values()):
            name = f"{endpoint.namespace}/{endpoint.name}"
            found.append({"endpoint": name, "identity": endpoint.identity, **sides})
    return found


def _plain(value: Any) -> Any:
    """Return a row of the snapshot with the names of its fields, without those that say nothing."""
    if isinstance(value, msgspec.Struct):
        named = {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
        return {name: one for name, one in named.items() if one not in (None, "", [])}
    return [_plain(one) for one in value] if isinstance(value, tuple) else value


def _redacted(row: Any) -> Any:
    """Say of each header compared with a secret that its value is not shown."""
    for rule in row.get("http") or ():
        for match in rule.get("header_matches") or ():
            if match.get("secret_name") is not None:
                match["value"] = "[redacted]"
    return row


def _host(text: str) -> str:
    return f"[{text}]" if ":" in text else text


def _text(text: str, status: int = 200) -> web.Response:
    return web.Response(text=text, status=status)


def _json(document: Any) -> web.Response:
    return web.json_response(document, dumps=functools.partial(json.dumps, indent=1))


async def _post_required(request: web.Request) -> web.Response:
    """Envoy's words for what changes something."""
    allow = {"Allow": "POST"}
    text = f"Method {request.method} not allowed, POST required.\n"
    return web.Response(text=text, status=405, headers=allow)


@web.middleware
async def _for_this_host(request: web.Request, handler: Handler) -> web.StreamResponse:
    host = request.host.rpartition(":")[0] or request.host
    if host != "localhost" and admin_problem(f"{host}:1"):
        return _text("this page is for the machine itself\n", 403)
    return await handler(request)
