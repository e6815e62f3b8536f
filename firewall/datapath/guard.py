"""What the kernel's own tracker must not see, as text: packets under a forged source. Pure.

Theory of operation. The kernel tracks a packet before any worker sees it, so one that a worker will
drop has moved the kernel's entry already. Two of them, a SYN and the SYN/ACK that answers it, make
the kernel take a living connection for a new one (nf_conntrack_proto_tcp.c: it "is in sync again"),
and what the ends really say is INVALID from then on: a connection that the kernel carries would
break, and a liar needs to know no number for it. One of the two bears an endpoint's address. An
endpoint that is bound to an interface is believed there only, so whatever comes with its address
from elsewhere and has SYN is exempt from tracking (raw comes before conntrack). It is queued and
dropped like any other forged packet, and reported. Of other segments the kernel compares the
numbers; they are not looked at here, since every packet of every carried flow would pay for it.

Not guarded: addresses behind a bridge, whose ports no ipset can tell apart.
"""

from firewall.datapath.sets import Family, bound_set, routed_set

CHAIN = "BARTIZAN-RAW"
_JUMP = f"PREROUTING -p tcp -m tcp --tcp-flags SYN SYN -j {CHAIN}"


def install_text(family: Family, saved: str) -> str:
    """Return the input of `iptables-restore --noflush` that installs or updates the rules.

    Args:
        family: IPv4 or IPv6.
        saved: what `iptables-save -t raw` (or ip6tables-save) printed.
    """
    lines = [
        "*raw",
        f":{CHAIN} - [0:0]",
        # What the proxy sends to a server of this node bears its client's address.
        f"-A {CHAIN} -i lo -j RETURN",
        f"-A {CHAIN} -m set --match-set {bound_set(family)} src,src -j RETURN",
        f"-A {CHAIN} -m set --match-set {routed_set(family)} src -j CT --notrack",
    ]
    if not is_installed(saved):
        lines += [f"-D {_JUMP}"] * _jump_count(saved) + [f"-I {_JUMP}"]
    return "\n".join([*lines, "COMMIT", ""])


def remove_text(saved: str) -> str:
    """Return the input of `iptables-restore --noflush` that takes the rules away; "" if none."""
    if f":{CHAIN} " not in saved:
        return ""
    jumps = [f"-D {_JUMP}"] * _jump_count(saved)
    return "\n".join(["*raw", *jumps, f"-F {CHAIN}", f"-X {CHAIN}", "COMMIT", ""])


def is_installed(saved: str) -> bool:
    """Say whether the jump is there, once and at the front."""
    rules = [line for line in saved.splitlines() if line.startswith("-A PREROUTING ")]
    return _jump_count(saved) == 1 and rules[0] == f"-A {_JUMP}"


def _jump_count(saved: str) -> int:
    return saved.splitlines().count(f"-A {_JUMP}")
