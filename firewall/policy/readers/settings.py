"""What the readers must know from outside, and what this version can enforce.

A policy that is accepted but not enforced is worse than a refused one: its author believes in it.
So every field that needs more than label, CIDR and port decisions names a capability, and a
capability that is not in `ReaderSettings.enforceable` makes the field an error. Teaching the
datapath something new is then one word in `ENFORCED`.
"""

from dataclasses import dataclass

from firewall.policy.readers.document import Value

CAPABILITIES: dict[str, str] = {
    "http": "HTTP rules need the layer-7 proxy",
    "header-matches": "HTTP headerMatches need the layer-7 proxy",
    "header-mismatch-actions": "changing requests (LOG, ADD, DELETE, REPLACE) is up to the proxy",
    "secrets": "values from Kubernetes secrets need a source of secrets",
    "dns": "DNS rules need the DNS proxy",
    "fqdn": "addresses by name need the DNS proxy",
    "server-names": "TLS server names need the TLS inspector",
    "tls": "terminating and originating TLS need the TLS proxy",
    "listener": "custom listeners need an Envoy that provides them",
    "authentication": "mutual authentication needs a handshake between nodes",
    "nodes": (
        "peers by node labels need known nodes "
        '(Cilium: only when the "enable-node-selector-labels" flag is set)'
    ),
    "host-policy": "policies for nodes need the host firewall (Cilium: enable-host-firewall)",
    "services": "toServices needs known services",
    "namespaces": "labels of namespaces need known namespaces",
    "cidr-groups": "CIDR groups need known CiliumCIDRGroups",
    "extended-protocols": (
        "protocols without ports are told apart on request (Cilium: enable-extended-ip-protocols)"
    ),
}
"""Every capability that a field of some format can need, with the reason."""

ENFORCED = frozenset(
    {
        "http",
        "header-matches",
        "header-mismatch-actions",
        "secrets",
        "dns",
        "fqdn",
        "server-names",
        "tls",
        "services",
        "cidr-groups",
        "namespaces",
        "nodes",
    }
)
"""What this version enforces."""

SWITCHED: dict[str, str] = {
    "host-policy": "host_firewall",
    "extended-protocols": "policy.extended_protocols",
}
"""What this version enforces once a setting of the configuration is on: capability -> setting."""

UNSUPPORTED: dict[str, str] = {
    "toGroups": "is not supported: no cloud provider is asked for its groups; write toCIDRSet",
    "fromGroups": "is not supported: no cloud provider is asked for its groups; write fromCIDRSet",
}
"""Fields of current formats that no capability will bring, with the reason."""

REMOVED: dict[str, str] = {
    "fromRequires": (
        "was removed in Cilium 1.19; add the labels to every fromEndpoints item instead"
    ),
    "toRequires": "was removed in Cilium 1.19; add the labels to every toEndpoints item instead",
    "kafka": "Kafka rules were removed in Cilium 1.20; write ports without rules",
    "l7proto": "generic layer-7 rules were removed in Cilium 1.20; write http rules or ports only",
    "l7": "generic layer-7 rules were removed in Cilium 1.20; write http rules or ports only",
}
"""Fields that older Cilium versions had, with the version that took them away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReaderSettings:
    """What reading depends on besides the text.

    `default_namespace`: of namespaced objects that give none. `cluster_name`: value of
    `io.cilium.k8s.policy.cluster` that peers are confined to while `default_local_cluster` (Cilium:
    policy-default-local-cluster). `ip_block_matches_endpoints`: whether CIDRs of Kubernetes' own
    formats also match endpoints' addresses, as Kubernetes wants and Cilium does not (issue 9209).
    `enforceable`: the capabilities at hand. `assumed`: those of which the reader cannot know it,
    because no daemon is asked; they are accepted with a warning.
    """

    default_namespace: str = "default"
    cluster_name: str = "default"
    default_local_cluster: bool = True
    ip_block_matches_endpoints: bool = True
    enforceable: frozenset[str] = ENFORCED
    assumed: frozenset[str] = frozenset()

    def require(self, capability: str, value: Value) -> None:
        """Refuse `value`, and so its object, if its capability is not enforced here."""
        if capability in self.enforceable:
            return
        reason, setting = CAPABILITIES[capability], SWITCHED.get(capability)
        if setting is None:
            value.error(f"is not enforced by this version: {reason} [{capability}]")
        elif capability in self.assumed:
            value.warning(f"is refused by a daemon without `{setting}: on` [{capability}]")
        else:
            value.error(f"needs `{setting}: on` in the configuration: {reason} [{capability}]")
