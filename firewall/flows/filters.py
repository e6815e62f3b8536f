"""Which flows to show: Hubble's filter flags over flow records.

The same flag given again widens (OR); different flags narrow (AND); a negated term that matches
takes the flow out, whatever else matches. `pod`, `namespace`, `label`, `ip`, `port`, `identity` and
`fqdn` mean either side; with `from-` or `to-` before them the sending or the receiving one.

A filter is compiled once, every value is checked then, and a wrong one says which flag it was for.
Source: hubble/cmd/observe (flags), pkg/hubble/filters (meaning).
"""

from collections.abc import Iterable
from typing import NamedTuple

from firewall.flows.flow import Flow
from firewall.flows.sides import SIDES, one_side
from firewall.flows.traits import TRAITS, Predicate
from firewall.identities.labels import LabelError
from firewall.identities.selector import SelectorError


class FilterError(ValueError):
    """A filter's value cannot be used; the message names flag and value."""

    def __init__(self, flag: str, value: str, why: str) -> None:
        self.flag = flag
        self.value = value
        super().__init__(f"--{flag} {value!r}: {why}")


class Term(NamedTuple):
    """One flag with one value; `negated` by a `--not` before it."""

    flag: str
    value: str
    negated: bool = False


class Filter:
    """The compiled terms; call it with a flow.

    Args:
        terms: in any order.

    Raises:
        FilterError: an unknown flag or a value that the flag does not take.
    """

    def __init__(self, terms: Iterable[Term] = ()) -> None:
        wanted: dict[str, list[Predicate]] = {}
        self._unwanted: list[Predicate] = []
        for flag, value, negated in terms:
            predicate = compile_term(flag, value)
            if negated:
                self._unwanted.append(predicate)
            else:
                wanted.setdefault(flag, []).append(predicate)
        self._wanted = tuple(tuple(group) for group in wanted.values())

    def __call__(self, flow: Flow) -> bool:
        """Say whether the flow is to be shown."""
        for group in self._wanted:
            if not any(predicate(flow) for predicate in group):
                return False
        return not any(predicate(flow) for predicate in self._unwanted)

    def __bool__(self) -> bool:
        """Whether there is anything to check."""
        return bool(self._wanted or self._unwanted)


def compile_term(flag: str, value: str) -> Predicate:
    """Make the test for one flag and value.

    Raises:
        FilterError: an unknown flag or a value that the flag does not take.
    """
    try:
        if flag in TRAITS:
            return TRAITS[flag](value)
        side, dash, rest = flag.partition("-")
        if dash and side in ("from", "to") and rest in SIDES:
            return one_side(SIDES[rest](value), sender=side == "from")
        if flag in SIDES:
            test = SIDES[flag](value)
            sends, receives = one_side(test, sender=True), one_side(test, sender=False)
            return lambda flow: sends(flow) or receives(flow)
    except FilterError:
        raise
    except (ValueError, LabelError, SelectorError) as error:
        raise FilterError(flag, value, str(error)) from error
    raise FilterError(flag, value, f"no such filter; there are {', '.join(flags())}")


def flags() -> list[str]:
    """Return every flag there is, sorted, `from-` and `to-` forms included."""
    sided = [f"{prefix}{name}" for name in SIDES for prefix in ("", "from-", "to-")]
    return sorted((*TRAITS, *sided))
