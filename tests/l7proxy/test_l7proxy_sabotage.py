"""The fuzzer notices when a check is missing: each is taken away once, and must be missed.

A check that another one repeats (h11 behind our grammar, the h2 library before our rules) is taken
away together with the other.
"""

import re

import pytest
from http_mutants import case
from http_world import World, policy

from l7proxy import (
    downstream,
    exchange,
    framing,
    grammar,
    heads,
    multiplex,
    reply,
    request,
    stream_head,
    target,
    tunnel,
)
from l7proxy.framing import CHUNKED, ChunkedReader
from l7proxy.heads import Heads
from l7proxy.limits import Limits
from l7proxy.tunnel import Tunnel

CASES = 3000
NEVER = re.compile(rb"(?!)")


def no_reference(patch):
    """Without h11's opinion."""
    patch(request, "check_request", lambda _head, _framing: None)
    for place in (reply, tunnel):
        patch(place, "check_response", lambda *_, **__: None)


def no_library(patch):
    """Without the checks of field lists in the h2 library."""
    made = downstream._codec

    def lenient(limits):
        codec = made(limits)
        codec.config.validate_inbound_headers = False
        return codec

    patch(downstream, "_codec", lenient)


# --- what each check is, taken away --------------------------------------------------------------


def merged_slashes(patch):
    patch(target, "_SLASHES", NEVER)


def dot_segments(patch):
    patch(target, "_remove_dot_segments", lambda path: path)


def escaped_slashes(patch):
    patch(target, "_ESCAPED_SLASH", re.compile(rb"(?!)"))


def escaped_twice(patch):
    patch(target, "_ESCAPED_TWICE", NEVER)


def overlong_characters(patch):
    patch(target, "_OVERLONG", NEVER)
    patch(target, "_NEVER_UTF8", frozenset())


def dot_parameters(patch):
    patch(target, "_DOT_PARAMETERS", NEVER)


def one_host(patch):
    patch(request, "_single_host", lambda values: values[-1])


def host_syntax(patch):
    patch(request, "check_host", lambda _value: None)
    patch(target, "check_host", lambda _value: None)


def host_of_the_target(patch):
    patch(
        target, "_without_authority", lambda raw, _host: re.sub(rb"^[^/]*//[^/]*", b"", raw) or b"/"
    )


def one_length(patch):
    def last(lengths, codings, minor):
        return framing.request_framing(lengths[-1:], codings, minor)

    patch(request, "request_framing", last)


def length_or_chunks(patch):
    def chunks_win(lengths, codings, minor):
        return framing.request_framing([] if codings else lengths, codings, minor)

    patch(request, "request_framing", chunks_win)


def length_syntax(patch):
    def sloppy(lengths, codings, minor):
        digits = [re.sub(rb"[^0-9]", b"", value) for value in lengths]
        return framing.request_framing([value or b"0" for value in digits], codings, minor)

    patch(request, "request_framing", sloppy)


def coding_syntax(patch):
    def sloppy(lengths, codings, minor):
        return CHUNKED if codings else framing.request_framing(lengths, codings, minor)

    no_reference(patch)
    patch(request, "request_framing", sloppy)


def coding_of_http_10(patch):
    def always(lengths, codings, _minor):
        return framing.request_framing(lengths, codings, 1)

    no_reference(patch)
    patch(request, "request_framing", always)


def _loosened(patch, *changes):
    no_reference(patch)
    pattern = grammar.request_head.pattern
    line = grammar.FIELD_LINE
    for before, after in changes:
        assert before in pattern
        pattern, line = pattern.replace(before, after), line.replace(before, after)
    patch(grammar, "request_head", re.compile(pattern))
    patch(grammar, "field_line", re.compile(line))
    patch(grammar, "lean_request_head", NEVER)
    patch(grammar, "fields", re.compile(rb"([^:\n]*):([^\r\n]*)\r?\n"))


def control_bytes(patch):
    _loosened(patch, (grammar.VALUE, rb"[^\r\n]"))


def bare_line_feeds(patch):
    _loosened(patch, (rb"\r\n", rb"\r?\n"), (grammar.VALUE + b"*+", grammar.VALUE + b"*"))


def names_of_fields(patch):
    _loosened(patch, (grammar.TOKEN + rb"++:", rb"[^\n:]*:"))


def every_value_of_a_header(patch):
    def last(self):
        return [
            (b"host", self.target.authority),
            *{name: value for name, _, value in self.fields}.items(),
        ]

    patch(request.Request, "headers", property(last))


def first_value_of_a_header(patch):
    def first(self):
        return [*{name: value for name, _, value in reversed(self.fields)}.items()]

    patch(request.Request, "headers", property(first))


def underscores(patch):
    patch(exchange, "has_mistakable_name", lambda _fields: False)
    patch(multiplex, "has_mistakable_name", lambda _fields: False)


def fields_of_one_hop(patch):
    kept = {b"te", b"trailer", b"keep-alive", b"proxy-connection", b"http2-settings"}
    patch(request, "_SPECIAL", request._SPECIAL - kept)


def nominated_fields(patch):
    patch(request, "_NEVER_NOMINATED", frozenset())


def the_end_that_a_client_announces(patch):
    admit = request.admit
    patch(heads, "admit", lambda *given: admit(*given)._replace(keep_alive=True))


def bodies_of_denied_requests(patch):
    def none(self, now):
        self._next_request(now)
        return True

    patch(exchange.Exchange, "_discard_body", none)


def chunk_sizes(patch):
    no_reference(patch)
    patch(grammar, "chunk_line", re.compile(rb"(?:0x|\+)?([0-9A-Fa-f]{1,9})_?([^\n]*)\n"))


def ends_of_chunks(patch):
    def any_end(self, line, read=ChunkedReader._read_line):
        read(self, b"\r\n" if self._part == 2 else line)

    def keep(self, line):
        self._line = line

    no_reference(patch)
    patch(ChunkedReader, "_read_line", any_end)
    patch(ChunkedReader, "_keep_line", keep)


def trailers(patch):
    no_reference(patch)
    patch(grammar, "field_line", re.compile(rb"[^\n]*\n"))


def whole_handshakes(patch):
    patch(exchange, "is_websocket", lambda _request: True)
    patch(tunnel, "_accept", lambda _request: ANY)


class _Any(bytes):
    __hash__ = None

    def __eq__(self, other):
        return True


ANY = _Any()


def proofs_of_servers(patch):
    patch(tunnel, "_accept", lambda _request: ANY)


def the_status_of_a_switch(patch):
    parse = tunnel.parse_response

    def always(self, data, now):
        end = data.find(b"\r\n\r\n") + 4
        self._switch(parse(data[:end], self._limits), data[end:], now)

    patch(Tunnel, "_read_answer", always)


def early_bytes(patch):
    def client_data(self, data, now, take=Tunnel.client_data):
        self._tunnelled, before = True, self._tunnelled
        asked = take(self, data, now)
        self._tunnelled = before
        return asked

    def start(self, head, now, start=Tunnel.start):
        early, self._early = self._early, b""
        return start(self, head, now) + (client_data(self, early, now) if early else [])

    patch(Tunnel, "start", start)
    patch(Tunnel, "client_data", client_data)


def fields_of_http_2(patch):
    no_library(patch)
    patch(stream_head, "_check_field", lambda _name, _value: None)


def connection_specific_fields(patch):
    no_library(patch)
    patch(stream_head, "_CONNECTION_SPECIFIC", frozenset())


def pseudo_fields(patch):
    def split(received):
        pseudo = dict(field for field in received if field[0][:1] == b":")
        return pseudo, [(name, name, value) for name, value in received if name[:1] != b":"]

    no_library(patch)
    patch(stream_head, "_split", split)


def one_authority(patch):
    def merge(authority, fields):
        return [(b"host", b"Host", authority), *(f for f in fields if f[0] != b"host")]

    no_library(patch)
    patch(stream_head, "_merge_authority", merge)


def visible_paths(patch):
    patch(stream_head, "grammar", _Grammar())


class _Grammar:
    visible = re.compile(rb"(?s).*")

    def __getattr__(self, name):
        return getattr(grammar, name)


def values_in_answers(patch):
    loose = grammar.response_head.pattern.replace(grammar.VALUE, rb"[^\r\n]")
    no_reference(patch)
    patch(grammar, "response_head", re.compile(loose))
    patch(grammar, "fields", re.compile(rb"([^:\n]*):([^\r\n]*)\r?\n"))


CHECKS = [
    merged_slashes, dot_segments, escaped_slashes, escaped_twice, overlong_characters,
    dot_parameters, one_host, host_syntax, host_of_the_target, one_length, length_or_chunks,
    length_syntax, coding_syntax, coding_of_http_10, control_bytes, bare_line_feeds,
    names_of_fields, every_value_of_a_header, first_value_of_a_header, underscores,
    fields_of_one_hop, nominated_fields, the_end_that_a_client_announces, bodies_of_denied_requests,
    chunk_sizes, ends_of_chunks, trailers, whole_handshakes, proofs_of_servers,
    the_status_of_a_switch, early_bytes, fields_of_http_2, connection_specific_fields,
    pseudo_fields, one_authority, visible_paths, values_in_answers,
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_check_that_is_missing_is_missed(check, monkeypatch):
    check(monkeypatch.setattr)
    known, rules = Heads(Limits()), policy()
    assert any(World(case(seed), known, rules).faults for seed in range(1, CASES)), "not missed"


def test_our_rules_for_fields_do_without_those_of_the_library(monkeypatch):
    no_library(monkeypatch.setattr)
    cases = (case(seed) for seed in range(1, CASES))
    assert not [faults for one in cases if one.sent[:3] == b"PRI" and (faults := World(one).faults)]
