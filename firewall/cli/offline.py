"""Questions without a daemon: policies from files, endpoints from declarations.

Imported by a command only when it works offline: reading policies loads much.
"""

from collections.abc import Iterable
from dataclasses import replace
from itertools import count
from pathlib import Path

import click

from conntrack.address import parse_address
from firewall.agent.declaration import Declaration, check_unique, read_declarations
from firewall.agent.document import DocumentError, Reader
from firewall.cli.exits import ExitCode
from firewall.identities.labels import LabelFilter, LabelSet
from firewall.policy.files import files_of, read_paths
from firewall.policy.name_match import normalise
from firewall.policy.objects import NamespaceObject, Resource
from firewall.policy.readers import SWITCHED, ReaderSettings, ReadResult
from firewall.policy.realm import Actor, Realm, actor_labels, make_realm
from policytest.naming import chosen_address


class InvalidFileError(click.ClickException):
    """A file is invalid; the problems, one per line, come first."""

    exit_code = ExitCode.INVALID

    def __init__(self, problems: Iterable[object]) -> None:
        listed = list(map(str, problems))
        super().__init__("\n".join([*listed, f"{len(listed)} errors"]))


def read_policies(paths: Iterable[str], cluster: str = "default") -> ReadResult:
    """Read policy files and directories.

    Raises:
        InvalidFileError: one of them is invalid.
    """
    settings = ReaderSettings(cluster_name=cluster, assumed=frozenset(SWITCHED))
    result = read_paths(paths, settings=settings)
    if result.errors:
        raise InvalidFileError(result.errors)
    return result


def read_endpoints(paths: Iterable[str]) -> tuple[Declaration, ...]:
    """Read endpoint declarations: files of the endpoint directory, configurations, policy tests.

    Raises:
        InvalidFileError: one of them is invalid. UsageError: one cannot be read.
    """
    found: list[Declaration] = []
    for path in paths:
        for file in files_of(Path(path)):
            try:
                text = file.read_text(encoding="utf-8")
                found += read_declarations(text, str(file), parts=True)
            except DocumentError as error:
                raise InvalidFileError(error.problems) from error
            except (OSError, UnicodeDecodeError) as error:
                raise click.UsageError(f"{file}: {error}") from error
    reader = Reader()
    check_unique(reader, "endpoint", found, lambda one: f"{one.namespace}/{one.name}")
    if reader.problems:
        raise InvalidFileError(reader.problems)
    return _addressed(found)


def _addressed(declarations: Iterable[Declaration]) -> tuple[Declaration, ...]:
    """Give those without an address the one that a policy test would choose for them."""
    found: list[Declaration] = []
    listed = tuple(declarations)
    taken = {address for one in listed for address in one.addresses}
    numbers = count(1)
    for one in listed:
        addresses = one.addresses
        while not addresses:
            address = chosen_address(next(numbers))
            if address not in taken:
                addresses = (address,)
        found.append(replace(one, addresses=addresses))
    return tuple(found)


def labels_of(
    declaration: Declaration, resources: Iterable[Resource], cluster: str = "default"
) -> LabelSet:
    """Return the labels of the identity that an endpoint would get."""
    namespaces = (one for one in resources if isinstance(one, NamespaceObject))
    declared = next((one for one in namespaces if one.name == declaration.namespace), None)
    return actor_labels(declaration.labels, declaration.namespace, cluster, declared, LabelFilter())


def offline_realm(
    policies: Iterable[str],
    endpoints: Iterable[str],
    cluster: str = "default",
    names: Iterable[str] = (),
) -> Realm:
    """Return the realm that files describe; `names` say what DNS answered: NAME=ADDRESS,...

    Raises:
        InvalidFileError: a file is invalid. UsageError: one cannot be read, or a name is none.
    """
    result = read_policies(policies, cluster)
    actors = [
        Actor(
            name=one.name,
            namespace=one.namespace,
            labels=labels_of(one, result.resources, cluster),
            addresses=one.addresses,
            named_ports=one.ports,
            audit=one.audit,
        )
        for one in read_endpoints(endpoints)
    ]
    known = read_names(names)
    return make_realm(actors, result.objects, result.resources, cluster=cluster, names=known)


def read_names(texts: Iterable[str]) -> dict[str, tuple[bytes, ...]]:
    """Read NAME=ADDRESS,... each; return packed addresses by lower-case names with trailing dot.

    Raises:
        UsageError: one of them is not of this form.
    """
    found: dict[str, tuple[bytes, ...]] = {}
    for text in texts:
        name, _, listed = text.partition("=")
        try:
            addresses = tuple(map(parse_address, listed.split(",")))
        except ValueError as error:
            raise click.UsageError(f"--dns {text}: {error}; write NAME=ADDRESS,...") from error
        if not name or "*" in name:
            raise click.UsageError(f"--dns {text}: write NAME=ADDRESS,...; the name is no pattern")
        key = normalise(name)
        found[key] = (*found.get(key, ()), *addresses)
    return found
