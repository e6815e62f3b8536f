"""Which generation of flows the kernel may carry past the workers, and from when on.

Theory of operation. A snapshot that takes a permission away has a higher generation. Once every
datapath worker enforces it, the rules get that generation too; then no flow that was marked before
bypasses the workers any more, and each is decided anew, by the new snapshot. `settled` is true from
then on, and not before: who waits for a change to be enforced waits for both.

A worker that is slow, or dead, must not hold a revocation up: after `SLOW_S` the rules get no
generation at all, every packet is queued, and what that worker would decide waits for it or is
dropped. When all workers have followed, the bypass is opened again. So while flows are carried, no
worker is more than one generation behind the rules, and the numbers of generations, which repeat
(`firewall.datapath.marks`), cannot be mistaken.

The first generation of a run trusts no mark of an earlier life: they are all cleared.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

from firewall.agent.publisher import Publisher
from firewall.agent.worker import Worker
from firewall.control.journal import fields
from firewall.datapath.kernel import KernelError
from firewall.datapath.ruleset import RulesetConfig

SLOW_S = 0.25
"""Time that workers get to follow before every packet is queued; they need some milliseconds."""

RETRY_S = 1.0
"""Pause after the rules could not be changed, and between two looks at workers that lag."""

log = logging.getLogger(__name__)


class Kernel(NamedTuple):
    """What changes the rules; both block and raise KernelError.

    Attributes:
        install: puts all rules in; `keep_generation`: but for those about generations. Returns
            why L7 rules cannot hold where a destination is translated, "" = they do.
        set_generation: changes the generation only; `fresh`: trusts no mark that is there.
    """

    install: Callable[..., str]
    set_generation: Callable[..., None]


class _Wish(NamedTuple):
    """The snapshot to follow."""

    generation: int
    revision: int


class Bypass:
    """Keeps the rules' generation in line with what the workers enforce.

    Args:
        rules: everything else that the rules depend on.
        enabled: False = every packet is queued, always.
        publisher: knows what the workers enforce.
        workers: all of them.
        kernel: carries it out.

    Attributes:
        enabled: as given.
        rules: what is installed, or is being installed.
        problem: why the rules could not be changed, "" = nothing is wrong.
    """

    def __init__(
        self,
        rules: RulesetConfig,
        *,
        enabled: bool,
        publisher: Publisher,
        workers: Iterable[Worker],
        kernel: Kernel,
    ) -> None:
        self.enabled = enabled
        self.rules = replace(rules, generation=None)
        self.problem = ""
        self._publisher = publisher
        self._workers = [worker for worker in workers if worker.spec.kind == "datapath"]
        self._kernel = kernel
        self._fresh = True
        self._kept = False
        self._wish: _Wish | None = None
        self._wished = asyncio.Event()
        self._moved = asyncio.Condition()
        self._changing = asyncio.Lock()

    @property
    def generation(self) -> int | None:
        """The generation of the flows that the kernel carries; None = it carries none."""
        return self.rules.generation

    async def install(self, *, keep: bool = False) -> None:
        """Install all rules, with the generation that is in force.

        Args:
            keep: what an earlier agent's rules let the kernel carry is carried until the first
                generation of this one.

        Raises:
            KernelError: a command failed.
        """
        async with self._changing:
            self._kept = keep and self.enabled
            lacking = await asyncio.to_thread(
                self._kernel.install, self.rules, keep_generation=self._kept
            )
        if lacking:
            log.warning(
                "L7 rules drop flows whose destination is translated on this node",
                extra=fields(reason=lacking),
            )

    def follow(self, generation: int, revision: int) -> None:
        """A snapshot has been published: bring its generation into force."""
        if self.enabled:
            self._wish = _Wish(generation, revision)
            if not self._is_settled():
                self._wished.set()

    def _is_settled(self) -> bool:
        """Say whether no flow is carried that was marked under an earlier generation."""
        return self._wish is None or self.generation == self._wish.generation

    def _is_safe(self) -> bool:
        return (self.generation is None and not self._kept) or self._is_settled()

    async def settled(self, timeout_s: float) -> bool:
        """Wait until the rules know of everything that was published; say whether they do."""
        try:
            async with asyncio.timeout(max(0.0, timeout_s)), self._moved:
                await self._moved.wait_for(self._is_safe)
        except TimeoutError:
            return self._is_safe()
        return True

    async def run(self) -> None:
        """Follow the snapshots, until cancelled."""
        while True:
            await self._wished.wait()
            self._wished.clear()
            while not self._is_settled():
                try:
                    await self._advance()
                except KernelError as error:
                    self.problem = str(error)
                    log.error("bypass not brought up to date", extra=fields(error=error))  # noqa: TRY400 - the text says it all
                    await asyncio.sleep(RETRY_S)

    async def _advance(self) -> None:
        """Bring the wished generation into force, or none while a worker lags."""
        wish = self._wish
        assert wish is not None
        patience_s = SLOW_S if self.generation is not None else RETRY_S
        followed = await self._publisher.enforced(wish.revision, self._workers, patience_s)
        if self._wish != wish:
            return
        if followed:
            await self._change(wish.generation)
        elif self.generation is not None:
            log.warning("a worker lags: every packet is queued until it follows")
            await self._change(None)

    async def _change(self, generation: int | None) -> None:
        """Give the rules another generation."""
        began = time.monotonic()
        async with self._changing:
            rules = replace(self.rules, generation=generation)
            await asyncio.to_thread(self._kernel.set_generation, rules, fresh=self._fresh)
            self.rules, self._fresh, self._kept, self.problem = rules, False, False, ""
        log.info(
            "bypass",
            extra=fields(
                generation="none" if generation is None else generation,
                ms=round(1000 * (time.monotonic() - began), 1),
            ),
        )
        async with self._moved:
            self._moved.notify_all()
