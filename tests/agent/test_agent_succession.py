"""Which datapath workers an agent that starts adopts, which it replaces, and in which bank."""

from pathlib import Path

import pytest

from firewall.agent import succession
from firewall.agent.config import Config
from firewall.agent.lineup import BANK_SIZE, specs
from firewall.agent.succession import VERSION, Plan, Running

CONFIG = Config(run_dir=Path("/run/bartizan"), workers=2)
FIRST, SECOND = CONFIG.queue_base, CONFIG.queue_base + BANK_SIZE


def workers(bank: int, config: Config = CONFIG, version: str = VERSION) -> dict[Path, Running]:
    """Every worker of a configuration as it runs; pids by bank and place."""
    return {
        spec.socket_path: Running(100 * (bank + 1) + place, spec.arguments, version)
        for place, spec in enumerate(specs(config, bank))
    }


def datapath(bank: int, **changes) -> dict[Path, Running]:
    """Of them, those that decide packets."""
    found = workers(bank, **changes)
    return {path: one for path, one in found.items() if path.name.startswith("datapath-")}


def choose(running, queue, *, renew=False) -> Plan:
    return succession.choose(CONFIG, running, queue, renew=renew)


def test_nobody_runs_so_the_first_bank_begins() -> None:
    assert choose({}, None) == Plan(0, follows=False, outdated=frozenset())


@pytest.mark.parametrize("queue", [FIRST, SECOND])
def test_proxy_workers_alone_leave_the_first_bank_free(queue: int) -> None:
    """Nobody reads a queue, so there is nobody to follow, whatever the rules feed."""
    proxies = {path: one for path, one in workers(0).items() if "datapath" not in path.name}
    assert choose(proxies, queue) == Plan(0, follows=False, outdated=frozenset())


@pytest.mark.parametrize(("bank", "queue"), [(0, FIRST), (1, SECOND)])
def test_workers_that_fit_are_adopted_where_they_are(bank: int, queue: int) -> None:
    assert choose(workers(bank), queue) == Plan(bank, follows=False, outdated=frozenset())


def test_one_worker_that_fits_is_adopted_and_the_missing_one_is_started() -> None:
    path, one = next(iter(datapath(0).items()))
    assert choose({path: one}, FIRST) == Plan(0, follows=False, outdated=frozenset())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": "0.0.0"}, "another version"),
        ({"version": ""}, "it hangs"),
        ({"config": Config(run_dir=CONFIG.run_dir, workers=1)}, "other arguments"),
    ],
)
def test_workers_that_do_not_fit_are_followed_in_the_other_bank(change, why: str) -> None:
    assert choose(datapath(0, **change), FIRST) == Plan(1, True, frozenset()), why
    assert choose(datapath(1, **change), SECOND) == Plan(0, True, frozenset()), why


def test_one_worker_that_does_not_fit_is_reason_enough() -> None:
    """Half of the flows would be decided by each version."""
    running = datapath(0)
    path = next(iter(running))
    running[path] = running[path]._replace(version="0.0.0")
    assert choose(running, FIRST) == Plan(1, follows=True, outdated=frozenset())


@pytest.mark.parametrize(("queue", "bank"), [(FIRST, 0), (SECOND, 1)])
def test_after_an_interrupted_upgrade_those_stay_that_have_packets(queue: int, bank: int) -> None:
    """Both banks fit; the others have nothing in their queues, and end."""
    both = datapath(0) | datapath(1)
    assert choose(both, queue) == Plan(bank, follows=True, outdated=frozenset())


def test_of_two_banks_the_one_that_fits_stays_though_it_is_not_fed() -> None:
    """The upgrade was interrupted before the rules were turned: it goes on."""
    both = datapath(0, version="0.0.0") | datapath(1)
    assert choose(both, FIRST) == Plan(1, follows=True, outdated=frozenset())


def test_without_rules_the_first_bank_is_taken_for_fed() -> None:
    assert choose(datapath(1), None) == Plan(1, follows=False, outdated=frozenset())
    old = datapath(0, version="0.0.0")
    assert choose(old, None) == Plan(1, follows=True, outdated=frozenset())


def test_a_renewal_adopts_nobody() -> None:
    """Proxy workers neither: all of them are outdated."""
    running = workers(0)
    pids = frozenset(one.pid for one in running.values())
    assert choose(running, FIRST, renew=True) == Plan(1, follows=True, outdated=pids)
    assert choose(workers(1), SECOND, renew=True).bank == 0
