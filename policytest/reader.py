"""Test files to cases, with every problem of a file at once.

Two passes: the first reads each part by itself, the second (`policytest.rehearsal`) walks through
the steps and checks that every name exists when it is used. Policies are read by the readers that
the daemon uses, so what is refused there is refused here, with the same words.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from firewall.identities.labels import K8S, RESERVED, Label, LabelError, LabelSet, parse_label
from firewall.policy.files import files_of, read_file
from firewall.policy.model import ObjectKey
from firewall.policy.name_match import normalise
from firewall.policy.problem import Problem, did_you_mean
from firewall.policy.readers import CAPABILITIES, ENFORCED, ReaderSettings, ReadResult, merge, read
from firewall.policy.readers.composition import Mark, compose
from firewall.policy.readers.document import Report, Value, shorten
from firewall.policy.readers.kinds import KINDS
from firewall.policy.readers.ports import is_port_name
from firewall.policy.readers.selectors import is_label_key
from firewall.policy.snapshot import NamedPortRow
from policytest.case import PROTOCOLS, Case, Check, Endpoint, OutsideHost, Settings, Source, Step
from policytest.naming import AddressBook, is_name
from policytest.placing import text_of
from policytest.rehearsal import rehearse
from policytest.tables import entity, read_expectations, read_matrices

_DNS_NAME = re.compile(r"[-a-zA-Z0-9_]{1,63}([.][-a-zA-Z0-9_]{1,63})*[.]?")
"""What toFQDNs can mean (Cilium pkg/policy/api/fqdn.go)."""

API_VERSION = "bartizan.dev/v1"
KIND = "PolicyTest"

FILE_FIELDS = (
    "apiVersion", "kind", "settings", "node", "namespaces", "endpoints", "hosts", "resolver",
    "policies", "steps", "expect", "matrix",
)  # fmt: skip
SETTINGS_FIELDS = (
    "enforcement", "allowLocalhost", "audit", "clusterName", "hostFirewall", "assume",
)  # fmt: skip
NODE_FIELDS = ("ip", "ips", "labels")
NAMESPACE_FIELDS = ("labels",)
ENDPOINT_FIELDS = ("namespace", "name", "labels", "ip", "ips", "ports", "audit")
PORT_FIELDS = ("name", "port", "protocol")
HOST_FIELDS = ("name", "ip", "ips", "nodeLabels", "names")
STEP_FIELDS = (
    "name", "remove", "add", "namespaces", "label", "delete", "apply", "expect", "matrix",
)  # fmt: skip


class CaseRead(NamedTuple):
    """A test file as read; `case` None: `problems` has errors."""

    case: Case | None
    problems: tuple[Problem, ...]

    @property
    def errors(self) -> tuple[Problem, ...]:
        """The problems that refuse the file."""
        return tuple(problem for problem in self.problems if problem.severity == "error")


def read_case(path: Path) -> CaseRead:
    """Read a test file; what keeps it from being read is a problem like any other."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        problem = Problem.error(str(path), 0, 0, "", f"cannot be read: {error.strerror or error}")
        return CaseRead(None, (problem,))
    except UnicodeDecodeError as error:
        problem = Problem.error(str(path), 0, 0, "", f"not UTF-8 text: {error.reason}")
        return CaseRead(None, (problem,))
    return read_case_text(text, str(path), path.parent)


def read_case_text(text: str, file: str, folder: Path) -> CaseRead:
    """Read the text of a test file.

    Args:
        text: one YAML document.
        file: the name that problems carry.
        folder: where relative names of policy files begin.
    """
    report = Report(file, as_written=True)
    told: list[Problem] = []
    roots = [Value(one.root, "", report) for one in compose(text, file, report.problems)]
    case = None
    if len(roots) == 1:
        reader = _Reader(report, folder, told)
        case = reader.case(roots[0])
        rehearse(case, report, reader.marks)
    elif not report.problems:
        message = f"holds {len(roots)} documents; a test file is one"
        report.problems.append(Problem.error(file, 1, 1, "", message))
    problems = tuple(
        sorted(dict.fromkeys((*report.problems, *told)), key=lambda p: (p.line, p.column))
    )
    refused = any(problem.severity == "error" for problem in problems)
    return CaseRead(None if refused else case, problems)


class _Reader:
    """Reads one file; its problems go to the report, those of policies to `told`."""

    def __init__(self, report: Report, folder: Path, told: list[Problem]) -> None:
        self._report = report
        self._told = told
        self._folder = folder
        self._book = AddressBook()
        self._settings = ReaderSettings()
        self.marks: dict[tuple[int, str, str], Mark] = {}

    def case(self, root: Value) -> Case:
        fields = root.fields(FILE_FIELDS)
        if root.is_mapping:
            _check_type(root, fields)
        settings = self._case_settings(fields.get("settings"))
        self._settings = ReaderSettings(
            cluster_name=settings.cluster_name,
            enforceable=ENFORCED.union(settings.assume, ["host-policy"] * settings.host_firewall),
        )
        node, node_labels = self._node(fields.get("node"))
        steps = [dict(step.fields(STEP_FIELDS)) for step in _items(fields.get("steps"))]
        # Given addresses first, so that none of those that we choose is one of them.
        for listed in (
            fields.get("endpoints"),
            fields.get("hosts"),
            *(s.get("add") for s in steps),
        ):
            for item in _items(listed):
                self._book.reserve(item)
        if not node:
            node = (self._book.node_address(),)
        endpoints = tuple(self._endpoints(fields.get("endpoints")))
        hosts = tuple(self._hosts(fields.get("hosts")))
        resolver = self._resolver(fields, endpoints, hosts)
        namespaces = self._namespaces(fields.get("namespaces"))
        sources = tuple(self._sources(fields.get("policies")))
        made = []
        if not steps or "expect" in fields or "matrix" in fields:
            made.append(self._checks(Step(name="", line=root.mark.line), fields, hosts))
        for value, step in zip(_items(fields.get("steps")), steps, strict=True):
            made.append(self._step(value, step, len(made), hosts))
        return Case(
            file=self._report.file,
            settings=settings,
            node=node,
            node_labels=node_labels,
            namespaces=namespaces,
            endpoints=endpoints,
            hosts=hosts,
            sources=sources,
            steps=tuple(made),
            resolver=resolver,
        )

    # --- the world ----------------------------------------------------------------------------

    def _case_settings(self, value: Value | None) -> Settings:
        if value is None:
            return Settings()
        fields = value.fields(SETTINGS_FIELDS)
        found = Settings()
        if "enforcement" in fields:
            word = fields["enforcement"].word(("default", "always", "never"))
            found = replace(found, enforcement=word or "default")
        if "allowLocalhost" in fields:
            word = fields["allowLocalhost"].word(("always", "policy"))
            found = replace(found, allow_localhost=word or "always")
        if "audit" in fields:
            found = replace(found, audit=bool(fields["audit"].boolean()))
        if "clusterName" in fields:
            found = replace(found, cluster_name=fields["clusterName"].text() or "default")
        if "hostFirewall" in fields:
            found = replace(found, host_firewall=bool(fields["hostFirewall"].boolean()))
        words = tuple(item.word(CAPABILITIES) or "" for item in _items(fields.get("assume")))
        return replace(found, assume=tuple(w for w in words if w in CAPABILITIES.keys() - ENFORCED))

    def _node(self, value: Value | None) -> tuple[tuple[bytes, ...], tuple[tuple[str, str], ...]]:
        """Read the node's addresses, () = to be chosen, and its labels."""
        if value is None:
            return (), ()
        fields = value.fields(NODE_FIELDS)
        labels = _node_labels(fields.get("labels"), K8S)
        self._book.reserve(value)
        if not {"ip", "ips"} & fields.keys():
            return (), labels
        return self._book.addresses(fields, "node"), labels

    def _namespaces(self, value: Value | None) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        for name, item in (value.pairs() if value is not None else {}).items():
            if not is_name(name):
                item.error(f'"{shorten(name)}" is no namespace name')
            labels = None if item.is_null else item.fields(NAMESPACE_FIELDS).get("labels")
            found[name] = {
                key: text or "" for key, text in _changes(labels, "").items() if text is not None
            }
        return found

    def _endpoints(self, value: Value | None) -> list[Endpoint]:
        read = [self._endpoint(item) for item in _items(value)]
        return [endpoint for endpoint in read if endpoint is not None]

    def _endpoint(self, value: Value) -> Endpoint | None:
        fields = value.fields(ENDPOINT_FIELDS)
        if not value.is_mapping:
            return None
        namespace = _name_of(fields.get("namespace"), "default")
        if "name" not in fields:
            value.error("needs a name")
            return None
        name = _name_of(fields["name"], "")
        title = f"{namespace}/{name}"
        return Endpoint(
            namespace=namespace,
            name=name,
            labels=_labels(fields.get("labels")),
            addresses=self._book.addresses(fields, title),
            ports=tuple(_ports(fields.get("ports"))),
            audit=bool(fields["audit"].boolean()) if "audit" in fields else False,
            place=value.mark,
        )

    def _hosts(self, value: Value | None) -> list[OutsideHost]:
        found: list[OutsideHost] = []
        for item in _items(value):
            fields = item.fields(HOST_FIELDS)
            if "name" not in fields:
                item.error("needs a name")
                continue
            name = _name_of(fields["name"], "")
            labels = fields.get("nodeLabels")
            pairs = None if labels is None else _node_labels(labels, "node")
            if any(name == other.name for other in found):
                fields["name"].error(f'host "{name}" is given twice')
            addresses = self._book.addresses(fields, f"host:{name}")
            names = tuple(self._dns_names(fields.get("names")))
            found.append(
                OutsideHost(name=name, addresses=addresses, node_labels=pairs, names=names)
            )
        return found

    def _dns_names(self, value: Value | None) -> Iterator[str]:
        for item in _items(value):
            name = item.text()
            if name is None:
                continue
            if not _DNS_NAME.fullmatch(name):
                item.error(f'"{shorten(name)}" is no DNS name')
            yield normalise(name)

    def _resolver(
        self,
        fields: dict[str, Value],
        endpoints: Iterable[Endpoint],
        hosts: Iterable[OutsideHost],
    ) -> str:
        """Read who answers DNS; names mean nothing without."""
        if "resolver" not in fields:
            if any(host.names for host in hosts):
                fields["hosts"].error(
                    "names need a resolver: write beside hosts which end answers DNS for them, "
                    "namespace/name or host:NAME"
                )
            return ""
        title = fields["resolver"].text() or ""
        titles = {one.title for one in endpoints} | {one.title for one in hosts}
        if title and title not in titles:
            hint = did_you_mean(title, titles)
            fields["resolver"].error(f'no endpoint or host "{shorten(title)}"{hint}')
        return title

    # --- policies -----------------------------------------------------------------------------

    def _sources(self, value: Value | None) -> list[Source]:
        sources: list[Source] = []
        results: list[ReadResult] = []
        for item in _items(value):
            found = [self._inline(item)] if item.is_mapping else self._named(item)
            for file, text, result in found:
                results.append(result)
                sources.append(
                    Source(file=file, text=text, objects=result.objects, resources=result.resources)
                )
                self._told += result.problems
        self._told += merge(replace(result, problems=()) for result in results).problems
        return sources

    def _inline(self, value: Value) -> tuple[str, str, ReadResult]:
        text = text_of(value.node)
        return self._report.file, text, read(text, self._report.file, settings=self._settings)

    def _named(self, value: Value) -> list[tuple[str, str, ReadResult]]:
        name = value.text()
        if name is None:
            return []
        path = self._folder / name
        if not path.exists():
            value.error(f'"{shorten(name)}" is not there (looked for {path})')
            return []
        files = list(files_of(path))
        if not files:
            value.error(f"{path} holds no *.yaml, *.yml or *.json file")
        found = []
        for file in files:
            result = read_file(file, settings=self._settings)
            # What cannot be decoded is an error of the result already.
            text = file.read_bytes().decode("utf-8-sig", errors="replace")
            found.append((str(file), text, result))
        return found

    # --- steps --------------------------------------------------------------------------------

    def _step(
        self, value: Value, fields: dict[str, Value], number: int, hosts: tuple[OutsideHost, ...]
    ) -> Step:
        name = (fields["name"].text() or "") if "name" in fields else f"step {number + 1}"
        made = Step(
            name=name,
            line=value.mark.line,
            remove=tuple(self._removed(item, number) for item in _items(fields.get("remove"))),
            add=tuple(self._endpoints(fields.get("add"))),
            namespaces={
                self._used(item, number, "namespaces", key): _changes(
                    item.fields(NAMESPACE_FIELDS).get("labels"), ""
                )
                for key, item in _pairs(fields.get("namespaces")).items()
            },
            labels={
                self._used(item, number, "label", entity(key)): _changes(item, K8S)
                for key, item in _pairs(fields.get("label")).items()
            },
            delete=tuple(self._keys(fields.get("delete"), number)),
            apply=tuple(self._sources(fields.get("apply"))),
        )
        return self._checks(made, fields, hosts, number)

    def _used(self, value: Value, step: int, word: str, name: str) -> str:
        """Remember where a step uses a name; return the name."""
        self.marks[step, word, name] = value.mark
        return name

    def _removed(self, value: Value, step: int) -> str:
        return self._used(value, step, "remove", entity(value.text() or ""))

    def _keys(self, value: Value | None, step: int) -> list[ObjectKey]:
        """Read `Kind/namespace/name` or, for cluster-wide kinds, `Kind/name`."""
        found = []
        for item in _items(value):
            key = _key(item)
            if key is not None:
                self._used(item, step, "delete", str(key))
                found.append(key)
        return found

    def _checks(
        self,
        step: Step,
        fields: dict[str, Value],
        hosts: tuple[OutsideHost, ...],
        number: int = 0,
    ) -> Step:
        checks: list[Check] = []
        if "expect" in fields:
            checks += read_expectations(fields["expect"], number)
        matrices = []
        if "matrix" in fields:
            titles = tuple(host.title for host in hosts)
            for matrix, cells in read_matrices(fields["matrix"], number, titles):
                matrices.append(matrix)
                checks += cells
        return replace(step, checks=tuple(checks), matrices=tuple(matrices))


def _check_type(root: Value, fields: dict[str, Value]) -> None:
    for name, wanted in (("apiVersion", API_VERSION), ("kind", KIND)):
        if name not in fields:
            root.error(f"needs {name}: {wanted}")
        elif (fields[name].text() or wanted) != wanted:
            fields[name].error(f"must be {wanted}")


def _items(value: Value | None) -> list[Value]:
    return [] if value is None else value.items()


def _pairs(value: Value | None) -> dict[str, Value]:
    return {} if value is None else value.pairs()


def _name_of(value: Value | None, default: str) -> str:
    text = default if value is None else value.text()
    if value is not None and text is not None and not is_name(text):
        value.error(f'"{shorten(text)}" is no name: at most 63 lower-case letters, digits and "-"')
    return text or default


def _node_labels(value: Value | None, source: str) -> tuple[tuple[str, str], ...]:
    """Read the labels of a node as (key, value); a null is the empty text."""
    found = []
    for key, item in _pairs(value).items():
        text = "" if item.is_null else item.text()
        if text is None:
            continue
        try:
            parse_label(f"{key}={text}", source)
        except LabelError as error:
            item.error(str(error))
        found.append((key, text))
    return tuple(found)


def _changes(value: Value | None, default_source: str) -> dict[str, str | None]:
    """Return label changes: null = the label goes. Without a source they are a namespace's."""
    found: dict[str, str | None] = {}
    for key, item in _pairs(value).items():
        text = None if item.is_null else item.text()
        if not default_source and not is_label_key(key):
            item.error(f'"{shorten(key)}" is no Kubernetes label key')
            continue
        if _label(item, f"{key}={text or ''}") is None:
            continue
        found[key] = text
    return found


def _label(value: Value, text: str) -> Label | None:
    try:
        label = parse_label(text, K8S)
    except LabelError as error:
        value.error(str(error))
        return None
    if label.source == RESERVED and label.key != "init":
        value.error(f"label {label} is reserved: only {RESERVED}:init can be given")
        return None
    return label


def _labels(value: Value | None) -> LabelSet:
    found = [
        label
        for key, item in _pairs(value).items()
        if (label := _label(item, f"{key}={'' if item.is_null else item.text() or ''}"))
    ]
    try:
        return LabelSet(found)
    except LabelError as error:
        if value is not None:
            value.error(str(error))
        return LabelSet()


def _ports(value: Value | None) -> list[NamedPortRow]:
    """Read named ports; ports without a name are allowed and mean nothing to policy."""
    found: dict[tuple[str, int], NamedPortRow] = {}
    for item in _items(value):
        fields = item.fields(PORT_FIELDS)
        number = fields["port"].integer(1, 65535) if "port" in fields else None
        if "port" not in fields and item.is_mapping:
            item.error("needs port")
        word = fields["protocol"].word(PROTOCOLS) if "protocol" in fields else "TCP"
        if "name" not in fields or number is None or word is None or word not in PROTOCOLS:
            continue
        name = fields["name"].text()
        if name is None:
            continue
        if not is_port_name(name):
            fields["name"].error(f'"{shorten(name)}" is no port name')
        row = NamedPortRow(name.lower(), PROTOCOLS[word], number)
        if (row.name, row.protocol) in found:
            fields["name"].error(f'port "{name}" is given twice')
        found[row.name, row.protocol] = row
    return list(found.values())


def _key(value: Value) -> ObjectKey | None:
    text = value.text()
    if text is None:
        return None
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        value.error(f'"{shorten(text)}" must be Kind/namespace/name, or Kind/name')
        return None
    if parts[0] not in KINDS:
        value.error(f'unknown kind "{shorten(parts[0])}"{did_you_mean(parts[0], KINDS)}')
        return None
    namespace = parts[1] if len(parts) == 3 else ""
    return ObjectKey(kind=parts[0], namespace=namespace, name=parts[-1])
