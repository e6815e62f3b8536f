"""A record made late says what was true when its event happened."""

import pytest
from flow_samples import ENDPOINTS, LABELS, Cast, allowed, packet, request, response

from conntrack.address import parse_address
from firewall.flows.metrics import FlowMetrics
from firewall.flows.note import Noter
from firewall.flows.record import EndpointName


class Changing(Cast):
    """Names that can change."""

    def __init__(self):
        self.named = dict(ENDPOINTS)
        self.labelled = dict(LABELS)

    def endpoint(self, number, address):
        return self.named.get(number or address)

    def labels(self, identity):
        return self.labelled.get(identity, ())


@pytest.mark.parametrize(
    "event",
    [
        packet(),
        packet(source=b"", destination=b""),
        packet(source=parse_address("1.1.1.1"), source_endpoint=0, source_identity=2),
        allowed(destination=parse_address("1.1.1.1")),
        request(),
        response(),
    ],
    ids=["dropped", "unreadable", "from the world", "to a known name", "request", "response"],
)
def test_a_late_record_is_the_one_that_was_due(event):
    names = Changing()
    noter = Noter(names)
    at_once = noter.note(event).flow
    note = noter.note(event)
    names.named.clear()
    names.labelled.clear()
    assert not note.written
    assert note.uuid == at_once.uuid
    assert note.flow == at_once
    assert note.written
    assert note.flow is note.flow


def test_a_new_name_counts_from_its_next_event_on():
    names = Changing()
    noter = Noter(names)
    before = noter.note(packet())
    names.named[3184] = EndpointName("ywing", "default")
    names.labelled[22654] = ("k8s:class=ywing",)
    after = noter.note(packet())
    assert (before.flow.source.pod_name, after.flow.source.pod_name) == ("xwing", "ywing")
    assert before.flow.source.labels == LABELS[22654]
    assert after.flow.source.labels == ("k8s:class=ywing",)


def test_an_endpoint_that_is_gone_has_no_name_any_more():
    names = Changing()
    noter = Noter(names)
    noter.note(packet())
    del names.named[3184]
    assert noter.note(packet()).flow.source.pod_name == ""


def test_an_endpoint_of_another_node_is_known_by_its_address():
    """Two of one identity are two."""
    names = Changing()
    noter = Noter(names)
    one, two = parse_address("10.9.0.1"), parse_address("10.9.0.2")
    names.named |= {one: EndpointName("one", "far"), two: EndpointName("two", "far")}
    for address, name in ((one, "one"), (two, "two"), (one, "one")):
        flow = noter.note(packet(source=address, source_endpoint=0)).flow
        assert (flow.source.id, flow.source.namespace, flow.source.pod_name) == (0, "far", name)
        assert flow.source.labels == LABELS[22654]
    del names.named[one]
    flow = noter.note(packet(source=one, source_endpoint=0)).flow
    assert flow.source.pod_name == ""


def test_alike_flows_are_counted_without_a_record_each():
    noter = Noter(Cast())
    notes = [noter.note(allowed(source_port=port)) for port in range(1000, 1100)]
    counts = FlowMetrics()
    for note in notes:
        counts.observe(note)
    assert (
        'hubble_flows_processed_total{subtype="",type="PolicyVerdict",verdict="FORWARDED"} 100.0'
        in (counts.text().decode())
    )
    assert sum(note.written for note in notes) == 1
