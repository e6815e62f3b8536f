"""Answers of DNS that are known before anybody asks: `fqdn.pre_cache`, Cilium's tofqdns-pre-cache.

The file holds what `bartizan fqdn cache list -o json` prints, or `cilium-dbg fqdn cache list -o
json`: a list of objects with `fqdn`, `ips`, and `expiration_time` or `ttl`. What has expired is
left out. The answers are nobody's own: they count for every endpoint whose policy means the name,
and for none where `fqdn.visibility` is endpoint.
"""

import json
from typing import Any

from conntrack.address import parse_address
from firewall.flows.flow import parse_time
from firewall.fqdn.cache import Entry
from firewall.policy.name_match import normalise

NOBODY = 0
"""Who learnt them; endpoints have numbers from 1."""


class PrecacheError(ValueError):
    """The text is no such list; says which row is wrong, how, and what would be right."""


def read_precache(text: str, now: float) -> list[Entry]:
    """Return the answers that still count.

    Args:
        text: of the file.
        now: wall clock, seconds.

    Raises:
        PrecacheError: a row is wrong; nothing is taken then.
    """
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise PrecacheError(f"no JSON: {error}") from None
    if not isinstance(rows, list):
        raise PrecacheError("not a list of objects with fqdn, ips, and expiration_time or ttl")
    found: list[Entry] = []
    for at, row in enumerate(rows):
        try:
            found += _entries(row, now)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise PrecacheError(f"[{at}]: {reason}") from None
    return found


def _entries(row: dict[str, Any], now: float) -> list[Entry]:
    fields = {key.replace("-", "_"): value for key, value in row.items()}
    name, addresses = fields["fqdn"], [parse_address(text) for text in fields["ips"]]
    ttl_s = int(fields.get("ttl", 0))
    if not isinstance(name, str) or not name or "*" in name:
        raise ValueError(f"fqdn {name!r} is no name")
    if "expiration_time" in fields:
        expires_at = parse_time(fields["expiration_time"]) / 1e9
    elif ttl_s > 0:
        expires_at = now + ttl_s
    else:
        raise KeyError("expiration_time or ttl")
    if expires_at <= now:
        return []
    return [Entry(NOBODY, normalise(name), address, ttl_s, expires_at) for address in addresses]
