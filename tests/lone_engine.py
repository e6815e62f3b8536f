"""An engine without a daemon around it, and without workers: what it publishes is in force."""

from firewall.agent.bypass import Bypass, Kernel
from firewall.agent.engine import Engine
from firewall.agent.neighbours import Neighbours
from firewall.agent.publisher import Publisher
from firewall.datapath.ruleset import RulesetConfig
from firewall.identities.registry import IdentityRegistry


def lone_engine(config, store, manage=lambda links: None):
    """Make one; `manage` takes the place of the kernel's sets."""
    publisher = Publisher(config.snapshot_path)
    kernel = Kernel(lambda *_, **__: None, lambda *_, **__: None)
    bypass = Bypass(RulesetConfig(), enabled=False, publisher=publisher, workers=[], kernel=kernel)
    registry = IdentityRegistry(store, node="n1", grace_s=10.0)
    neighbours = Neighbours(store, registry, config)
    return Engine(config, registry, publisher, [], manage, bypass=bypass, neighbours=neighbours)
