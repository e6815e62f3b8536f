"""One run of the daemon: from taking the network namespace to giving it back.

Start: namespace taken, state restored, files of the watched directories read, rules installed,
workers adopted or started, first snapshot enforced, API open, READY. The order keeps an endpoint
that was isolated before a restart isolated throughout: the rules and sets of the earlier life stay
as they are until the new ones replace them in one transaction, and the workers of the earlier life
decide by its last snapshot until they get ours.

End, by SIGTERM: the proxy drains, rules and sets go, the datapath workers answer what is queued and
end. By SIGQUIT, rules and workers stay for the next start. By SIGUSR2 that follows at once: this
process begins anew with the program as it is on disk now, and all workers are replaced, while
packets wait (`succession`). Any other end is no decision of the operator to be without a
firewall: after an error of ours, a second SIGTERM or `kill -9`, rules and workers stay, the next
start takes them over, and `bartizan cleanup` removes them. A start that fails takes away what it
installed, unless it found the rules of an earlier life.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from firewall.agent import standing, succession
from firewall.agent.api import Api
from firewall.agent.bypass import Bypass, Kernel
from firewall.agent.collector import Collector
from firewall.agent.config import Config
from firewall.agent.document import DocumentError
from firewall.agent.engine import Engine, make_directories
from firewall.agent.following import Following
from firewall.agent.lineup import ruleset_config, specs
from firewall.agent.loading import Loaded, load, needs_restart
from firewall.agent.neighbours import Neighbours
from firewall.agent.node import AddressMonitor, local_addresses
from firewall.agent.orphans import end_orphans
from firewall.agent.proxyadmin import ProxyAdmin
from firewall.agent.publisher import Publisher
from firewall.agent.resolving import Resolving
from firewall.agent.rules import RuleMonitor
from firewall.agent.statefile import StateError
from firewall.agent.status import Status
from firewall.agent.succession import Plan
from firewall.agent.supervisor import Supervisor
from firewall.agent.worker import VERSION, Worker
from firewall.control import journal
from firewall.control.journal import fields
from firewall.control.messages import Acknowledged, Events, FromWorker, Hello, Learnt
from firewall.control.unix import ChannelError
from firewall.datapath import kernel
from firewall.datapath.kernel import KernelError
from firewall.datapath.ruleset import RulesetConfig
from firewall.identities.registry import IdentityError, IdentityRegistry, KvStoreError
from firewall.kvstore.sqlite import SqliteStore

READY_S = 30.0
"""Time for the workers to start and enforce the first snapshot; imports take about 0.5 s each."""

PROXY_DRAIN_S = 2.0
"""What open HTTP exchanges get to end."""

DATAPATH_DRAIN_S = 1.0
"""What queued packets get to be answered."""

UPKEEP_S = 10.0
"""Pause between two looks at the rules, the store and the identities nobody uses."""

SAME_SIGNAL_S = 1.0
"""A second SIGTERM this soon is the first one over again: `timeout` and a terminal's ^C send one to
the process and one to its group. Nobody loses patience in this time."""

SIGNALS = frozenset({signal.SIGHUP, signal.SIGUSR2})
"""Held back while one run gives way to the next in the same process, whose handlers are not there
yet: the default of these is to end it."""

RETRY_S = 1.0
"""Pause after links and addresses could not be listed."""

REPAIR_PAUSE_S = 1.0
"""Between two looks at the rules because somebody deletes some: we do not race with others."""

SETTLE_S = 0.1
"""Links come in bursts; this long after the first message they are looked at once."""

log = logging.getLogger(__name__)


class UnableError(Exception):
    """This machine cannot run the daemon now; the text says why and what would help."""


class Daemon:
    """One run.

    Args:
        loaded: the configuration.
        path: its file, read again on SIGHUP; None = there is none.
        overrides: flags, which count again on SIGHUP.
        renew: replace the workers that run, even those that could go on.

    Attributes:
        renews: the run ended to be followed by another one, of the program as it is now.
    """

    def __init__(
        self,
        loaded: Loaded,
        path: Path | None,
        overrides: Mapping[str, str],
        *,
        renew: bool = False,
    ) -> None:
        self.renews = False
        self._loaded = loaded
        self._path = path
        self._overrides = overrides
        self._renew = renew
        config = loaded.config
        self._publisher = Publisher(config.snapshot_path)
        self._stop = asyncio.Event()
        self._stopped_at = 0.0
        self._reload = asyncio.Event()
        self._links_changed = asyncio.Event()
        self._rules_deleted = asyncio.Event()
        self._checking = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self._dumps: set[asyncio.Task[None]] = set()
        self._undo = self._stays = False
        self._plan: Plan
        self._supervisor: Supervisor
        self._bypass: Bypass
        self._neighbours: Neighbours
        self._engine: Engine
        self._resolving: Resolving
        self._collector: Collector
        self._status: Status
        self._following: Following

    @property
    def _config(self) -> Config:
        return self._loaded.config

    async def run(self) -> None:
        """Serve until SIGTERM.

        Raises:
            OccupiedError: another daemon has this network namespace.
            UnableError, KernelError, KvStoreError, StateError, ChannelError: it cannot start.
            InvalidPolicyError: a policy of the directory is invalid and was never valid here.
        """
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(standing.occupy())
            self._catch_signals()
            make_directories(self._config)
            store = await SqliteStore.open(self._config.kvstore_path)
            stack.push_async_callback(store.close)
            await self._compose()
            await self._restore(store)
            monitor = AddressMonitor()
            stack.callback(monitor.close)
            self._watch_rules(stack)
            api = Api(self._engine, self._collector, self._status, lambda: self._loaded)
            admin = ProxyAdmin(self._engine, self._supervisor)
            stack.push_async_callback(admin.stop)
            try:
                await self._begin(monitor)
                await self._start_api(api)
                await self._start_admin(admin)
                await self._await_enforcement()
                self._undo = False
                standing.tell_systemd("READY=1", f"STATUS={self._status.summary()}")
                log.info("ready", extra=fields(status=self._status.summary()))
                await self._serve()
                self._undo = not self._stays
            finally:
                await self._end(api)

    # --- start --------------------------------------------------------------------------------

    async def _compose(self) -> None:
        """Decide who runs, and make what looks after them."""
        config = self._config
        queue = await asyncio.to_thread(kernel.first_queue)
        self._plan = await succession.plan(config, queue, renew=self._renew)
        self._supervisor = Supervisor(
            specs(config, self._plan.bank),
            VERSION,
            self._received,
            self._publisher.wake,
            self._plan.outdated,
        )
        self._bypass = Bypass(
            ruleset_config(config, self._plan.bank),
            enabled=config.bypass,
            publisher=self._publisher,
            workers=self._supervisor.workers,
            kernel=Kernel(kernel.install, kernel.set_generation),
        )

    async def _restore(self, store: SqliteStore) -> None:
        """Make the engine, with everything that was in force before and what the files say."""
        config = self._config
        registry = IdentityRegistry(store, node=config.node, grace_s=config.identity.grace_period_s)
        self._neighbours = Neighbours(store, registry, config)
        await self._neighbours.join()
        self._publisher.restore()
        self._engine = Engine(
            config,
            registry,
            self._publisher,
            self._supervisor.workers,
            kernel.update_endpoints,
            bypass=self._bypass,
            neighbours=self._neighbours,
        )
        self._resolving = Resolving(self._engine)
        self._collector = Collector(self._engine, config.flows)
        self._status = Status(self._engine, self._collector)
        await self._engine.restore()
        self._engine.addresses.local = await asyncio.to_thread(local_addresses)
        await self._engine.sync_endpoints(config.endpoints, "config")
        self._following = Following(self._engine, config, self._status.problems)
        await self._following.look(first=True)

    async def _begin(self, monitor: AddressMonitor) -> None:
        """Install the rules, start or adopt the workers, begin to publish."""
        config = self._config
        self._undo = not await asyncio.to_thread(kernel.is_installed)
        keep = [spec.socket_path for spec in specs(config, self._plan.bank)]
        asyncio.get_running_loop().add_reader(monitor.fileno(), self._on_link, monitor)
        if self._plan.follows:
            log.info("workers follow others", extra=fields(bank=self._plan.bank))
            self._supervisor.start()
            self._engine.publish()
            self._do(self._engine.run())
            install = partial(self._bypass.install, keep=True)
            ended = await succession.follow(
                self._supervisor.workers, self._publisher, install, config.run_dir, keep
            )
        else:
            await self._bypass.install()
            ended = await end_orphans(config.run_dir, keep)
            self._supervisor.start()
            self._engine.publish()
            self._do(self._engine.run())
        if ended:
            log.info("earlier workers ended", extra=fields(pids=",".join(map(str, ended))))
        for work in (self._bypass.run(), self._collector.run(), self._resolving.run(),
                     self._following.run(), self._neighbours.run(self._engine.publish),
                     self._keep_links(), self._keep_rules(), self._keep_up()):  # fmt: skip
            self._do(work)

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin a task of the daemon."""
        self._tasks.append(asyncio.create_task(_forever(work)))

    async def _start_api(self, api: Api) -> None:
        try:
            await api.start(self._config.api_path, self._config.api.group)
        except LookupError:
            raise UnableError(f"api.group: no group {self._config.api.group!r}") from None
        except OSError as error:
            raise UnableError(f"{self._config.api_path}: {error.strerror}") from error

    async def _start_admin(self, admin: ProxyAdmin) -> None:
        where = self._config.proxy.admin
        if self._config.proxy.workers:
            try:
                await admin.start(self._config.run_dir, where)
            except OSError as error:
                raise UnableError(f"proxy.admin: {where}: {error.strerror}") from error

    async def _await_enforcement(self) -> None:
        """Wait for the first snapshot to be enforced.

        Raises:
            UnableError: no datapath worker enforces it, or, where nothing was enforced before, one
                of them cannot start: a share of the traffic would have no way.
        """
        enforced = asyncio.create_task(self._engine.enforced(READY_S))
        in_vain = asyncio.create_task(self._supervisor.in_vain("datapath"))
        await self._wait_for(enforced, in_vain)
        failed = in_vain.result() if in_vain.done() else []
        whole = enforced.done() and enforced.result()
        for task in (enforced, in_vain):
            task.cancel()
        if whole or self._stop.is_set():
            return
        datapath = [w for w in self._supervisor.workers if w.spec.kind == "datapath"]
        if not any(worker.revision for worker in datapath) or (failed and self._undo):
            raise UnableError(self._why_not(failed or datapath))
        log.warning("not everything is enforced", extra=fields(errors=self._status.errors()))

    def _why_not(self, failed: "list[Worker]") -> str:
        """Say why these workers do not enforce anything, and what would help."""
        names = ", ".join(worker.spec.name for worker in failed)
        reasons = {worker.error for worker in failed if worker.error} or {"no snapshot enforced"}
        text = f"{names}: {'; '.join(sorted(reasons))}"
        base = self._bypass.rules.first_queue
        ours = {worker.pid for worker in self._supervisor.workers}
        numbers = {base + worker.spec.number for worker in failed}
        with contextlib.suppress(KernelError):
            for queue in kernel.read_queues():
                if queue.queue in numbers and queue.reader not in ours:
                    return (
                        f"{text}: queue {queue.queue} is read by {_process(queue.reader)}: "
                        "stop that, or set queue_base to another number"
                    )
        return f"{text}; its own words are in the log; see `bartizan doctor`"

    def _catch_signals(self) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._on_term)
        loop.add_signal_handler(signal.SIGINT, self._on_term)
        loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        loop.add_signal_handler(signal.SIGUSR1, self._on_dump)
        loop.add_signal_handler(signal.SIGUSR2, self._on_leave, True)
        loop.add_signal_handler(signal.SIGQUIT, self._on_leave, False)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    # --- service ------------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Wait for SIGTERM, reloading on SIGHUP."""
        while not self._stop.is_set():
            reload = asyncio.create_task(self._reload.wait())
            await self._wait_for(reload)
            reload.cancel()
            if self._reload.is_set() and not self._stop.is_set():
                self._reload.clear()
                await self._do_reload()

    async def _wait_for(self, *tasks: "asyncio.Task[Any]") -> None:
        """Wait until a task is done, or SIGTERM came; a failed task of ours is raised."""
        stop = asyncio.create_task(self._stop.wait())
        done, _ = await asyncio.wait(
            {*tasks, stop, *self._tasks}, return_when=asyncio.FIRST_COMPLETED
        )
        stop.cancel()
        for ended in done & set(self._tasks):
            ended.result()  # a task of ours never ends but by an error: let it be seen

    async def _received(self, worker: Worker, message: FromWorker) -> None:
        """Take what a worker says."""
        match message:
            case Events():
                await self._collector.take(worker, message)
            case Acknowledged():
                await self._engine.acknowledged(worker, message)
            case Hello():
                await self._engine.greeted(worker, message)
            case Learnt():
                self._resolving.learnt(worker, message)
            case _:
                log.warning("message without a reader", extra=fields(worker=worker.spec.name))

    async def _do_reload(self) -> None:
        """Read configuration and directories again; what is invalid changes nothing."""
        standing.tell_systemd("RELOADING=1", standing.monotonic_usec())
        try:
            loaded = load(self._path, self._overrides, os.environ)
        except DocumentError as error:
            self._status.problems["configuration"] = f"not reloaded: {error}"
            log.error("configuration not reloaded", extra=fields(problems=str(error)))  # noqa: TRY400 - the user's mistake, and the text names it
        else:
            self._status.problems.pop("configuration", None)
            await self._apply_config(loaded)
        await self._following.follow()
        standing.tell_systemd("READY=1", f"STATUS={self._status.summary()}")

    async def _apply_config(self, loaded: Loaded) -> None:
        """Let the live settings take effect."""
        old, new = self._config, loaded.config
        waiting = needs_restart(old, new)
        if waiting:
            log.warning("settings need a restart", extra=fields(settings=",".join(waiting)))
        self._loaded = loaded
        logging.getLogger().setLevel(new.log.level.upper())
        self._following.reconfigure(new)
        try:
            await self._engine.sync_endpoints(new.endpoints, "config")
        except OSError as error:
            self._status.problems["configuration"] = f"endpoints not persisted: {error}"
            log.error("endpoints not persisted", extra=fields(error=error))  # noqa: TRY400 - the disk's
        self._engine.reconfigure(new)
        # The proxy takes most of its settings by handing over to a process that has them.
        applied = replace(
            old, proxy=replace(new.proxy, workers=old.proxy.workers, port=old.proxy.port)
        )
        for spec in specs(applied, self._plan.bank):
            if spec.kind == "l7proxy":
                self._supervisor.renew(spec)
        log.info("configuration reloaded", extra=fields(path=self._path))

    # --- the machine --------------------------------------------------------------------------

    def _on_link(self, monitor: AddressMonitor) -> None:
        monitor.drain()
        self._links_changed.set()

    async def _keep_links(self) -> None:
        """Follow links and addresses of the node."""
        while True:
            await self._links_changed.wait()
            await asyncio.sleep(SETTLE_S)
            self._links_changed.clear()
            try:
                found = await asyncio.to_thread(local_addresses)
                if found != self._engine.addresses.local:
                    self._engine.addresses.local = found
                    self._engine.publish()
                await self._engine.find_links()
                self._status.problems.pop("links", None)
            except OSError as error:
                if "links" not in self._status.problems:
                    log.warning("links not followed", extra=fields(error=error))
                self._status.problems["links"] = f"not followed: {error}"
                self._links_changed.set()
                await asyncio.sleep(RETRY_S)

    async def _keep_up(self) -> None:
        """Keep rules, store and identities in order."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(UPKEEP_S)
            async with self._checking:
                await self._check_rules()
            registry, problems = self._engine.registry, self._engine.problems
            try:
                await self._engine.keep_identities()
                if await registry.collect(loop.time()):
                    self._engine.publish()
                await self._engine.retry_identities()
                problems.pop("kvstore", None)
            except (KvStoreError, IdentityError) as error:
                problems["kvstore"] = str(error)
            standing.tell_systemd(f"STATUS={self._status.summary()}")

    def _watch_rules(self, stack: contextlib.AsyncExitStack) -> None:
        """Hear at once when somebody deletes rules; without it they are looked at now and then."""
        try:
            monitor = RuleMonitor()
        except OSError as error:
            log.info("no events of nftables", extra=fields(error=error))
            return
        stack.callback(monitor.close)
        loop = asyncio.get_running_loop()
        loop.add_reader(monitor.fileno(), self._on_rules, monitor)
        stack.callback(loop.remove_reader, monitor.fileno())

    def _on_rules(self, monitor: RuleMonitor) -> None:
        if monitor.drain():
            self._rules_deleted.set()

    async def _keep_rules(self) -> None:
        """Look at the rules when somebody has deleted some; we do so, too."""
        while True:
            await self._rules_deleted.wait()
            await asyncio.sleep(SETTLE_S)
            self._rules_deleted.clear()
            async with self._checking:
                await self._check_rules()
            await asyncio.sleep(REPAIR_PAUSE_S)

    async def _check_rules(self) -> None:
        """Put the rules back if somebody took them away."""
        try:
            if await asyncio.to_thread(kernel.is_installed):
                self._status.problems.pop("rules", None)
                return
            log.error("our rules were removed or are not first any more: installed again")
            await self._bypass.install()
        except KernelError as error:
            self._status.problems["rules"] = str(error)

    # --- end ----------------------------------------------------------------------------------

    def _on_term(self) -> None:
        now = asyncio.get_running_loop().time()
        if not self._stop.is_set():
            self._stop.set()
            self._stopped_at = now
        elif now - self._stopped_at >= SAME_SIGNAL_S:
            log.warning("second signal: ended at once; rules and workers stay as they are")
            _exit_now()

    def _on_leave(self, renews: bool) -> None:
        """End, and leave rules and workers as they are, for another one."""
        if not self._stop.is_set():
            self._stays, self.renews = True, renews
            self._stop.set()

    def _on_dump(self) -> None:
        dump = asyncio.create_task(self._dump())
        self._dumps.add(dump)
        dump.add_done_callback(self._dumps.discard)

    async def _dump(self) -> None:
        try:
            log.info("state: %s", json.dumps(await self._status.document()))
        except Exception:  # told now: nobody awaits this task
            log.exception("the state cannot be told")

    async def _end(self, api: Api) -> None:
        """Let go of everything, and give it back if that is what is meant."""
        standing.tell_systemd("RELOADING=1" if self.renews else "STOPPING=1")
        log.info("ending")
        await api.stop()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._resolving.close()
        if self._undo:
            await self._give_back()
        else:
            log.warning("rules and workers stay: the next start takes them over")
        await self._supervisor.release()
        await self._collector.close()
        log.info("ended")

    async def _give_back(self) -> None:
        """End the workers and remove the rules, in the order that breaks least."""
        await self._supervisor.stop(PROXY_DRAIN_S, "l7proxy")
        await self._remove(kernel.remove, self._bypass.rules)
        await self._supervisor.stop(DATAPATH_DRAIN_S)
        await self._remove(kernel.remove_tables)

    async def _remove(self, remove: Callable[..., None], *arguments: RulesetConfig) -> None:
        """Take some of our rules away, or say who else must."""
        try:
            await asyncio.to_thread(remove, *arguments)
        except KernelError as error:
            log.error("rules not removed: run `bartizan cleanup`", extra=fields(error=error))  # noqa: TRY400 - the text says it all


def configure_log(config: Config) -> None:
    """Set the log up as configured."""
    journal.configure(config.log.format, config.log.level)


def start_errors() -> tuple[type[Exception], ...]:
    """Return the errors that mean: this machine, as it is, cannot run the daemon."""
    return (
        UnableError,
        standing.OccupiedError,
        KernelError,
        KvStoreError,
        StateError,
        ChannelError,
    )


def _process(number: int) -> str:
    """Name the process whose number a netlink port probably is."""
    try:
        name = Path(f"/proc/{number}/comm").read_text(encoding="utf-8").strip()
    except OSError:
        return f"netlink port {number}"
    return f"process {number} ({name})"


async def _forever(work: Coroutine[Any, Any, None]) -> None:
    """Run a task of the daemon; an error in it is logged, and ends the daemon."""
    try:
        await work
    except Exception:
        log.exception("a task of the agent failed")
        raise


def _exit_now() -> NoReturn:
    """Leave without any of Python's farewells."""
    logging.shutdown()
    os._exit(1)
