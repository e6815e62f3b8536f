"""DNS in the agent: lessons of the proxy in, "it is enforced" out, and what has expired away.

A lesson is answered when every worker decides by a snapshot that holds it. The proxy waits no
longer than `fqdn.proxy_response_max_delay_s`, so nothing here waits longer either.
"""

import asyncio
import logging
import time

from conntrack.address import parse_address
from firewall.agent.engine import Engine
from firewall.agent.worker import Worker, WorkerState, ask_each
from firewall.control.journal import fields
from firewall.control.messages import Learnt, Settled
from firewall.control.unix import ChannelClosedError
from firewall.fqdn.cache import Connection

ASK_TIMEOUT_S = 5.0
"""How long a worker may take to name its connections; without them nothing is forgotten."""

log = logging.getLogger(__name__)


class Resolving:
    """The link between proxy workers and the engine's names."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._tasks: set[asyncio.Task[None]] = set()

    def learnt(self, worker: Worker, lesson: Learnt) -> None:
        """Take a lesson; its worker hears when it is enforced."""
        engine = self._engine
        if not engine.addresses.is_endpoint(lesson.endpoint):
            changed = False  # it went while its question was open
        else:
            changed = engine.names.learn(
                lesson.endpoint, lesson.name, lesson.addresses, lesson.ttl_s
            )
        if changed:
            engine.publish()
        task = asyncio.create_task(self._settle(worker, lesson))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _settle(self, worker: Worker, lesson: Learnt) -> None:
        delay_s = self._engine.config.fqdn.proxy_response_max_delay_s
        saved = asyncio.create_task(self._save()) if self._engine.names.urgent else None
        enforced = await self._engine.enforced(delay_s)
        if saved is not None:
            await asyncio.wait({saved}, timeout=delay_s)
        if lesson.token:
            try:
                await worker.channel.send(Settled(lesson.token, enforced))
            except (ChannelClosedError, OSError):
                log.debug("worker is gone", extra=fields(worker=worker.spec.name))

    async def _save(self) -> None:
        engine = self._engine
        try:
            await engine.names.save()
        except OSError as error:
            engine.problems["names"] = f"not persisted: {error}"
        else:
            engine.problems.pop("names", None)

    async def run(self) -> None:
        """Forget what has expired, at intervals, until cancelled."""
        if self._engine.names.problem:
            self._engine.problems["names restored"] = self._engine.names.problem
        while True:
            await asyncio.sleep(self._engine.config.fqdn.gc_interval_s)
            await self.collect()

    async def collect(self) -> None:
        """Forget what has expired and has no connection."""
        names, now = self._engine.names, time.time()
        doubtful = names.cache.doubtful(now)
        if not doubtful:
            await self._save()
            return
        alive = await self._connections(doubtful)
        if alive is None:
            return
        names.collect(alive, now)
        if names.cache.changed:
            self._engine.publish()
        await self._save()

    async def _connections(self, doubtful: set[Connection]) -> set[Connection] | None:
        """Return which connections live, None if a worker does not say."""
        engine = self._engine
        running = [w for w in engine.workers if w.state is WorkerState.RUNNING]
        if len(running) < len(engine.workers):
            return None
        answers = await ask_each(running, "connections", ASK_TIMEOUT_S)
        if len(answers) < len(running):
            return None
        owners = engine.addresses.owners()
        alive: set[Connection] = set()
        for row in (row for answer in answers.values() for row in answer):
            owner = owners.get(parse_address(str(row["source"])))
            if owner is not None:
                alive.add((owner, parse_address(str(row["destination"]))))
        return alive & doubtful

    async def close(self) -> None:
        """Write down what is not written yet."""
        await self._save()
