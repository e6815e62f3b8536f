"""The REST API: JSON over a unix socket, `/v1/...`.

Who may open the socket (mode 0660, group by `api.group`) may do everything; there is no second
check. Every error has one shape, `{"error": {"message": ..., "problems": [...]}}`, and the HTTP
status says whose fault it is: 400 the request, 404 no such thing, 409 it contradicts what is there,
422 the document is invalid, 503 a worker or the store does not answer.

Changes answer when every worker enforces them, or after `?wait=SECONDS` (default 5, 0 = at once);
the header `Bartizan-Enforced: yes|no` tells which.
"""

import asyncio
import contextlib
import grp
import json
import logging
import os
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from conntrack.address import Prefix, format_prefix
from conntrack.flow import FlowTuple
from firewall.agent import views
from firewall.agent.collector import Collector
from firewall.agent.declaration import Declaration, parse_declaration
from firewall.agent.document import DocumentError
from firewall.agent.engine import Engine, LinkError, reader_settings
from firewall.agent.explaining import Explainer, UnknownFlowError
from firewall.agent.loading import Loaded
from firewall.agent.policies import InvalidPolicyError, Key, PolicyText, key_row
from firewall.agent.request import (
    RequestError,
    body_as,
    body_object,
    body_text,
    fits,
    is_set,
    relabelled,
    selection_of,
    wait_of,
)
from firewall.agent.roster import RosterError, UnknownEndpointError
from firewall.agent.setting import value
from firewall.agent.status import Status
from firewall.agent.worker import WorkerState
from firewall.control.agent_channel import AgentChannel
from firewall.control.unix import ChannelClosedError, listen
from firewall.datapath.choice import Ends, choose
from firewall.datapath.ctnetlink import KernelFlow
from firewall.datapath.kernel_flows import delete_flows
from firewall.datapath.marks import Kind
from firewall.flows.filters import FilterError
from firewall.identities.labels import LabelError
from firewall.identities.registry import KvStoreError
from firewall.policy.question import Question, QuestionError
from firewall.policy.readers import read
from firewall.policy.realm import Asked
from firewall.policy.remedy import NoRemedyError

MAX_BODY_BYTES = 32 * 1024 * 1024
"""Largest request body: about 50,000 policies."""

ASK_TIMEOUT_S = 5.0
"""How long a worker may take to answer a question."""

_SOURCES = ("", "lookup", "connection")  # why an address counts; "" = whyever

log = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Api:
    """The routes over an engine.

    Args:
        engine: what is asked and changed.
        collector: the flows.
        status: what is well and what is not.
        loaded: returns the configuration in force.
    """

    def __init__(
        self, engine: Engine, collector: Collector, status: Status, loaded: Callable[[], Loaded]
    ) -> None:
        self._engine = engine
        self._collector = collector
        self._status = status
        self._loaded = loaded
        self._explainer = Explainer(engine, collector)
        self._runner: web.AppRunner | None = None
        self._path: Path | None = None
        self._ending = asyncio.Event()

    async def start(self, path: Path, group: str) -> None:
        """Listen at `path`.

        Raises:
            ChannelError: the path is taken or cannot be bound.
            LookupError: there is no such group. OSError: the socket cannot be given to it.
        """
        bound = listen(path, socket.SOCK_STREAM, 0o660)
        self._path = path
        if group:
            os.chown(path, -1, grp.getgrnam(group).gr_gid)
        self._runner = web.AppRunner(
            self._application(), handle_signals=False, access_log=None, shutdown_timeout=1.0
        )
        await self._runner.setup()
        await web.SockSite(self._runner, bound).start()

    async def stop(self) -> None:
        """End streams, finish requests, stop listening."""
        self._ending.set()
        self._collector.wake()
        if self._runner is not None:
            await self._runner.cleanup()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
            self._path = None

    def _application(self) -> web.Application:
        application = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_shape_errors])
        application.add_routes(
            [
                web.get("/v1/healthz", self._healthz),
                web.get("/v1/status", self._get_status),
                web.get("/v1/config", self._get_config),
                web.get("/v1/endpoint", self._list_endpoints),
                web.get("/v1/endpoint/{name}", self._get_endpoint),
                web.put("/v1/endpoint/{name}", self._put_endpoint),
                web.delete("/v1/endpoint/{name}", self._delete_endpoint),
                web.patch("/v1/endpoint/{name}/labels", self._patch_labels),
                web.get("/v1/identity", self._list_identities),
                web.get("/v1/identity/{number}", self._get_identity),
                web.get("/v1/fqdn/cache", self._get_names),
                web.delete("/v1/fqdn/cache", self._delete_names),
                web.get("/v1/fqdn/names", self._get_name_selectors),
                web.get("/v1/policy", self._get_policy),
                web.put("/v1/policy", self._put_policy),
                web.put("/v1/policy/files", self._put_policies),
                web.delete("/v1/policy", self._delete_policy),
                web.post("/v1/policy/validate", self._validate_policy),
                web.get("/v1/policy/selectors", self._get_selectors),
                web.post("/v1/policy/trace", self._trace_policy),
                web.post("/v1/policy/suggest", self._suggest_policy),
                web.get("/v1/ipcache", self._get_ipcache),
                web.get("/v1/snapshot", self._get_snapshot),
                web.get("/v1/proxy", self._get_proxy),
                web.get("/v1/conntrack", self._get_conntrack),
                web.delete("/v1/conntrack", self._delete_conntrack),
                web.get("/v1/flows", self._get_flows),
                web.get("/v1/packets", self._get_packets),
                web.get("/v1/flows/{uuid}/why", self._get_why),
                web.get("/v1/flows/{uuid}/suggest", self._get_suggestion),
                web.get("/v1/metrics", self._get_metrics),
            ]
        )
        return application

    # --- the daemon ---------------------------------------------------------------------------

    async def _healthz(self, _: web.Request) -> web.Response:
        """Say that the agent answers."""
        return web.json_response({"status": "ok"})

    async def _get_status(self, _: web.Request) -> web.Response:
        """Return agent, workers, queues, endpoints, flows; present troubles under `errors`."""
        return web.json_response(await self._status.document())

    async def _get_proxy(self, _: web.Request) -> web.Response:
        """Return the redirects with what became of their requests, and the workers of the proxy."""
        return web.json_response(await self._status.proxy())

    async def _get_config(self, _: web.Request) -> web.Response:
        """Return every setting with its value and where that came from."""
        loaded = self._loaded()
        rows = [
            {"setting": path, "value": value(loaded.config, path), "source": source}
            for path, source in loaded.sources.items()
        ]
        return web.json_response(body=_encode(rows))

    async def _get_metrics(self, _: web.Request) -> web.Response:
        """Return all metrics in Prometheus' text form."""
        text = await self._status.metrics()
        return web.Response(text=text, content_type="text/plain", charset="utf-8")

    # --- endpoints ----------------------------------------------------------------------------

    async def _list_endpoints(self, _: web.Request) -> web.Response:
        """Return all endpoints, this node among them if it is subject to policy."""
        rows = [views.endpoint(self._engine, member) for member in self._engine.roster]
        host = views.host_endpoint(self._engine)
        rows += [host] if host is not None else []
        return web.json_response(rows)

    async def _get_endpoint(self, request: web.Request) -> web.Response:
        """Return one endpoint, the log of its states included."""
        name = request.match_info["name"]
        if self._engine.roster.find(name) is None and name == self._engine.config.node:
            host = views.host_endpoint(self._engine)
            if host is not None:
                return web.json_response(host)
        return web.json_response(views.endpoint(self._engine, self._engine.roster.meant(name)))

    async def _put_endpoint(self, request: web.Request) -> web.Response:
        """Add or replace an endpoint; `new=1`: one that is there with other settings stays."""
        wait_s = wait_of(request)
        name = request.match_info["name"]
        known = self._engine.roster.find(name)
        declaration = parse_declaration(await body_text(request), f"endpoint {name}", name)
        await self._engine.put_endpoint(declaration, "api", new=is_set(request, "new"))
        enforced = await self._engine.enforced(wait_s)
        document = views.endpoint(self._engine, self._engine.roster.get(name))
        return _changed(document, enforced=enforced, status=200 if known is not None else 201)

    async def _delete_endpoint(self, request: web.Request) -> web.Response:
        """Stop managing an endpoint."""
        wait_s = wait_of(request)
        member = self._engine.roster.meant(request.match_info["name"])
        await self._engine.delete_endpoint(member.endpoint.name, "api")
        return _changed({}, enforced=await self._engine.enforced(wait_s))

    async def _patch_labels(self, request: web.Request) -> web.Response:
        """Set and remove labels: `{"set": {"app": "a"}, "remove": ["tier"]}`."""
        wait_s = wait_of(request)
        member = self._engine.roster.meant(request.match_info["name"])
        declaration = relabelled(member.declaration, await body_object(request))
        await self._engine.put_endpoint(declaration, "api")
        enforced = await self._engine.enforced(wait_s)
        member = self._engine.roster.get(member.endpoint.name)
        return _changed(views.endpoint(self._engine, member), enforced=enforced)

    # --- identities ---------------------------------------------------------------------------

    async def _list_identities(self, _: web.Request) -> web.Response:
        """Return every identity that is known, with its labels."""
        return web.json_response(views.identities(self._engine))

    async def _get_identity(self, request: web.Request) -> web.Response:
        """Return one identity."""
        text = request.match_info["number"]
        for row in views.identities(self._engine):
            if str(row["id"]) == text:
                return web.json_response(row)
        raise _NotFoundError(f"no identity {text!r} is known here")

    async def _get_ipcache(self, _: web.Request) -> web.Response:
        """Return the identity of every known prefix, as published."""
        rows = [
            {
                "prefix": format_prefix(Prefix(row.network, row.length)),
                "identity": row.identity,
            }
            for row in self._engine.publisher.snapshot.ipcache
        ]
        return web.json_response(rows)

    # --- names --------------------------------------------------------------------------------

    async def _get_names(self, request: web.Request) -> web.Response:
        """Return what DNS answered; `matchpattern`, `endpoint`, `source` narrow it."""
        source = request.query.get("source", "")
        if source not in _SOURCES:
            raise RequestError(f"source={source}: expected lookup or connection")
        entries = self._engine.names.find(*self._names_meant(request))
        return web.json_response(views.names(e for e in entries if source in ("", e.source)))

    async def _delete_names(self, request: web.Request) -> web.Response:
        """Forget what DNS answered; `matchpattern`, `endpoint` narrow it."""
        wait_s = wait_of(request)
        pattern, endpoint = self._names_meant(request)
        count = self._engine.names.forget(pattern, endpoint)
        self._engine.publish()
        await self._engine.names.save()
        return _changed({"count": count}, enforced=await self._engine.enforced(wait_s))

    async def _get_name_selectors(self, _: web.Request) -> web.Response:
        """Return the FQDN selectors of all policies, with the names and addresses they mean."""
        return web.json_response(views.name_selectors(self._engine))

    def _names_meant(self, request: web.Request) -> tuple[str, int | None]:
        """Return the pattern and the endpoint's id that a request about names gives."""
        endpoint = request.query.get("endpoint", "")
        number = self._engine.roster.meant(endpoint).endpoint.id if endpoint else None
        return request.query.get("matchpattern", ""), number

    # --- policies -----------------------------------------------------------------------------

    async def _get_policy(self, request: web.Request) -> web.Response:
        """Return policies and what they name; `kind`, `namespace`, `name`, `labels` narrow it."""
        book = self._engine.book
        selection = selection_of(request)
        objects = book.repository.select(**selection)
        resources = [book.resources[key] for key in self._resource_keys(selection)]
        return web.json_response(body=_encode(views.policies(objects, resources, book.repository)))

    def _resource_keys(self, selection: dict[str, Any]) -> list[Key]:
        """Return what is no policy and fits, in order; rule labels are something policies have."""
        if "labels" in selection:
            return []
        return sorted(key for key in self._engine.book.resources if fits(key, selection))

    async def _put_policy(self, request: web.Request) -> web.Response:
        """Apply the YAML of the body, all or nothing; `file` is its name in messages."""
        file = request.query.get("file", "request")
        return await self._apply(request, [PolicyText(file, await body_text(request))])

    async def _put_policies(self, request: web.Request) -> web.Response:
        """Apply several texts, all or nothing: `[["file.yaml", "text"], ...]`."""
        return await self._apply(request, await body_as(request, list[PolicyText]))

    async def _apply(self, request: web.Request, texts: list[PolicyText]) -> web.Response:
        """Apply all texts or none."""
        wait_s = wait_of(request)
        change = await self._engine.apply_policy(texts)
        enforced = await self._engine.enforced(wait_s)
        return _changed(views.applied(change), enforced=enforced)

    async def _delete_policy(self, request: web.Request) -> web.Response:
        """Delete what `kind`, `namespace`, `name`, `labels` choose, or (`all=1`) everything."""
        wait_s = wait_of(request)
        selection = selection_of(request)
        if not selection and not is_set(request, "all"):
            raise RequestError("say which policies: kind, namespace, name, labels, or all=1")
        keys = [key_row(one.key) for one in self._engine.book.repository.select(**selection)]
        keys += self._resource_keys(selection)
        files = self._engine.book.files_of(keys)
        change = await self._engine.delete_policy(keys)
        enforced = await self._engine.enforced(wait_s)
        return _changed(views.deleted(change, files), enforced=enforced)

    async def _validate_policy(self, request: web.Request) -> web.Response:
        """Say what is wrong with the YAML of the body; nothing is applied."""
        file = request.query.get("file", "request")
        result = read(await body_text(request), file, settings=reader_settings(self._engine.config))
        document = {
            "valid": not result.errors,
            "objects": len(result.objects) + len(result.resources),
            "problems": [str(problem) for problem in result.problems],
        }
        return web.json_response(document, status=422 if result.errors else 200)

    async def _get_selectors(self, _: web.Request) -> web.Response:
        """Return every peer that a rule names, and the identities it means now."""
        return web.json_response(self._explainer.selectors())

    async def _trace_policy(self, request: web.Request) -> web.Response:
        """Say what policy does with traffic that is asked about, and why."""
        asked = self._explainer.ask(await body_as(request, Question))
        return web.json_response(self._explainer.trace(asked))

    async def _get_why(self, request: web.Request) -> web.Response:
        """Explain a recorded flow; `last-drop` stands for the newest dropped one."""
        await self._collector.catch_up()
        flow = self._explainer.find(request.match_info["uuid"])
        return web.json_response(body=msgspec.json.encode(self._explainer.why(flow)))

    async def _suggest_policy(self, request: web.Request) -> web.Response:
        """Return the smallest change of policy that lets traffic pass."""
        return await self._suggestion(self._explainer.ask(await body_as(request, Question)))

    async def _get_suggestion(self, request: web.Request) -> web.Response:
        """Return the smallest change of policy that lets the traffic of a flow pass."""
        await self._collector.catch_up()
        asked = self._explainer.ask_again(self._explainer.find(request.match_info["uuid"]))
        if asked is None:
            raise NoRemedyError("no policy decided this flow, so none can change it")
        return await self._suggestion(asked)

    async def _suggestion(self, asked: Asked) -> web.Response:
        plan = await asyncio.to_thread(self._explainer.suggest, asked)
        return web.json_response(body=msgspec.json.encode(plan))

    async def _get_snapshot(self, _: web.Request) -> web.Response:
        """Return the snapshot in force, as the workers have it."""
        return web.json_response(body=_encode(msgspec.to_builtins(self._engine.publisher.snapshot)))

    # --- traffic ------------------------------------------------------------------------------

    async def _get_conntrack(self, request: web.Request) -> web.Response:
        """Return the tracked flows; `from`, `to` (names, addresses) narrow it, repeatable."""
        choice = choose(*self._ends(request))
        answers = await asyncio.gather(
            *(channel.ask("conntrack", ASK_TIMEOUT_S) for channel in self._trackers())
        )
        rows = views.conntrack_rows((row for answer in answers for row in answer), choice)
        return web.json_response(body=_encode(rows))

    async def _delete_conntrack(self, request: web.Request) -> web.Response:
        """Forget the flows that `from` and `to` choose, or (`all=1`) all.

        First the workers forget, or they would mark a flow again that the kernel drops. What the
        kernel holds goes too, or a worker that starts would take it over from there.
        """
        sources, destinations = self._ends(request)
        if sources is None and destinations is None and not is_set(request, "all"):
            raise RequestError("say which flows: from, to, or all=1")
        answers = await asyncio.gather(
            *(ch.forget(sources, destinations, ASK_TIMEOUT_S) for ch in self._trackers())
        )
        forgotten = {
            msgspec.convert(row["original"], FlowTuple) for rows in answers for row in rows
        }
        choice = choose(sources, destinations)
        carried = self._engine.bypass.rules.marks.any_of(Kind.OFFLOAD)

        def goes(flow: KernelFlow) -> bool:
            ours = flow.mark & carried.mask == carried.value
            return flow.original in forgotten or (ours and choice.includes(flow.original))

        kernel_count = await asyncio.to_thread(delete_flows, goes)
        return web.json_response({"flows": len(forgotten), "kernel": kernel_count})

    def _ends(self, request: web.Request) -> tuple[Ends | None, Ends | None]:
        """Return what `from` and `to` of a query stand for; raises UnknownEndpointError."""
        names = (request.query.getall(key, []) for key in ("from", "to"))
        sources, destinations = (views.ends(self._engine, listed) for listed in names)
        return sources, destinations

    def _trackers(self) -> list[AgentChannel]:
        """Return the way to every datapath worker that runs."""
        return [
            worker.channel
            for worker in self._engine.workers
            if worker.spec.kind == "datapath" and worker.state is WorkerState.RUNNING
        ]

    async def _get_flows(self, request: web.Request) -> web.StreamResponse:
        """Stream flows as Hubble's JSON lines; filters are the flags of `hubble observe`."""
        query = self._collector.query(dict.fromkeys(request.query.keys()), request.query.getall)
        return await _streamed(request, self._collector.stream(query, self._ending))

    async def _get_packets(self, request: web.Request) -> web.StreamResponse:
        """Stream packets as they are decided, with their flows; `drops=1`: dropped ones only."""
        keys = dict.fromkeys(key for key in request.query if key != "drops")
        query = self._collector.query(keys, request.query.getall)
        stream = self._collector.monitor.stream(
            query.matches, self._ending, drops_only=is_set(request, "drops")
        )
        return await _streamed(request, stream)


async def _streamed(
    request: web.Request, stream: AsyncGenerator[bytes, None]
) -> web.StreamResponse:
    """Answer with lines as they come, until they end or the reader has left."""
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    async with contextlib.aclosing(stream) as pieces:
        async for lines in pieces:
            if request.transport is None or request.transport.is_closing():
                break
            if lines:
                await response.write(lines)
        await response.write_eof()
        return response


class _NotFoundError(LookupError):
    """The thing asked for does not exist."""


_STATUS: tuple[tuple[type[Exception], int], ...] = (
    (RequestError, 400),
    (FilterError, 400),
    (QuestionError, 400),
    (UnknownEndpointError, 404),
    (UnknownFlowError, 404),
    (_NotFoundError, 404),
    (RosterError, 409),
    (NoRemedyError, 409),
    (DocumentError, 422),
    (InvalidPolicyError, 422),
    (LabelError, 422),
    (LinkError, 422),
    (KvStoreError, 503),
    (ChannelClosedError, 503),
    (TimeoutError, 503),
    (OSError, 507),
)
"""HTTP status of each error, the first that fits; 507: the state could not be written."""


@web.middleware
async def _shape_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every error in the one shape."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _error(error.status, f"{request.method} {request.path}: {error.reason}")
    except (ConnectionResetError, asyncio.CancelledError):
        raise  # the client left
    except Exception as error:
        for kind, status in _STATUS:
            if isinstance(error, kind):
                return _error(status, _message(error), _problems(error))
        log.exception("request failed: %s %s", request.method, request.path)
        return _error(500, f"internal error: {type(error).__name__}: {error}")


def _message(error: Exception) -> str:
    """Return one line; a document's own lines are its problems."""
    if isinstance(error, DocumentError):
        count = len(error.problems)
        return f"the document is invalid: {count} error{'s' * (count > 1)}, nothing was changed"
    return str(error) or type(error).__name__


def _problems(error: Exception) -> list[str]:
    """Return the lines of a refusal; what is only told says that it is.

    Nobody sees the text of a request, so lines in it are not named.
    """
    if isinstance(error, DocumentError):
        return [str(one._replace(place=one.place._replace(line=0))) for one in error.problems]
    if isinstance(error, InvalidPolicyError):
        said = {"error": "", "warning": "warning: "}
        return [f"{said[problem.severity]}{problem}" for problem in error.problems]
    return []


def _error(status: int, message: str, problems: list[str] | None = None) -> web.Response:
    document = {"error": {"message": message, "problems": problems or []}}
    return web.json_response(document, status=status)


def _changed(document: Any, *, enforced: bool, status: int = 200) -> web.Response:
    headers = {"Bartizan-Enforced": "yes" if enforced else "no"}
    return web.json_response(document, status=status, headers=headers)


def _encode(document: Any) -> bytes:
    """Encode what may hold paths and other plain objects."""
    return json.dumps(document, default=_plain).encode()


def _plain(thing: object) -> object:
    """Return what stands for an object in JSON: addresses as hex, declarations by name."""
    if isinstance(thing, bytes):
        return thing.hex()
    if isinstance(thing, Declaration):
        return thing.name
    return str(thing)
