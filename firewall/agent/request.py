"""What a request of the API says: body, wait, selection; what it cannot say is refused."""

import dataclasses
import json
from typing import Any, TypeVar

import msgspec
from aiohttp import web

from firewall.agent.declaration import Declaration, in_namespace, parse_labels
from firewall.agent.policies import Key
from firewall.identities.labels import ANY, K8S, POD_NAMESPACE, parse_label

MAX_WAIT_S = 600.0
"""Longest `?wait=`."""

DEFAULT_WAIT_S = 5.0
"""How long a change waits for the workers if the request does not say."""

T = TypeVar("T")


class RequestError(Exception):
    """The request itself is wrong; the text says how."""


async def body_text(request: web.Request) -> str:
    """Return the body as text.

    Raises:
        RequestError: it is not UTF-8.
    """
    try:
        return (await request.read()).decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"the body is not UTF-8: {error.reason}") from error


async def body_object(request: web.Request) -> dict[str, Any]:
    """Return the body as a JSON object.

    Raises:
        RequestError: it is none.
    """
    try:
        document = json.loads(await body_text(request))
    except ValueError as error:
        raise RequestError(f"the body is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise RequestError("the body is no JSON object")
    return document


async def body_as(request: web.Request, kind: type[T]) -> T:
    """Return what the body, which is JSON, says.

    Raises:
        RequestError: it is nothing of this kind.
    """
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except msgspec.MsgspecError as error:
        raise RequestError(f"the body is not what is asked for here: {error}") from error


def wait_of(request: web.Request) -> float:
    """Return how long a change shall wait.

    Raises:
        RequestError: `wait` is no number of seconds.
    """
    text = request.query.get("wait")
    if text is None:
        return DEFAULT_WAIT_S
    try:
        wait_s = float(text)
    except ValueError:
        wait_s = -1.0
    if not 0 <= wait_s <= MAX_WAIT_S:
        raise RequestError(f"wait={text}: expected seconds, 0-{MAX_WAIT_S:g}")
    return wait_s


def is_set(request: web.Request, name: str) -> bool:
    """Say whether a query asks for something that is off by default: `?all=1`."""
    return request.query.get(name, "") in ("1", "true", "yes")


def selection_of(request: web.Request) -> dict[str, Any]:
    """Return what `Repository.select` needs to find the objects of a query."""
    chosen: dict[str, Any] = {
        name: request.query[name] for name in ("kind", "namespace", "name") if name in request.query
    }
    labels = [
        str(parse_label(text, ANY))
        for given in request.query.getall("labels", [])
        for text in given.split(",")
        if text
    ]
    if labels:
        chosen["labels"] = labels
    return chosen


def fits(key: Key, selection: dict[str, Any]) -> bool:
    """Say whether kind, namespace and name of an object are those that a query selects."""
    wanted = (selection.get("kind"), selection.get("namespace"), selection.get("name"))
    return all(want in (None, have) for want, have in zip(wanted, key, strict=True))


def relabelled(declaration: Declaration, document: dict[str, Any]) -> Declaration:
    """Return a declaration with labels set and removed as `{"set": ..., "remove": [...]}` says.

    Raises:
        RequestError: the document has another shape. LabelError: a label is wrong.
    """
    unknown = set(document) - {"set", "remove"}
    if unknown:
        raise RequestError(f"unknown key {unknown.pop()!r}; expected set and remove")
    given = document.get("set", [])
    if isinstance(given, dict):
        given = [f"{key}={text}" for key, text in given.items()]
    removed = document.get("remove", [])
    if not isinstance(given, list) or not isinstance(removed, list):
        raise RequestError("set is a list or an object of labels, remove a list of keys")
    names = [parse_label(str(key), K8S).name for key in removed]
    protected = f"{K8S}:{POD_NAMESPACE}"
    added = parse_labels(map(str, given))
    if protected in names or added.get(K8S, POD_NAMESPACE) not in (None, declaration.namespace):
        raise RequestError("the namespace of an endpoint cannot change; delete it and add it again")
    labels = declaration.labels.without(names).with_labels(added)
    return dataclasses.replace(declaration, labels=in_namespace(labels, declaration.namespace))
