r"""The productions of RFC 9110 and RFC 9112 that this proxy accepts, as compiled patterns.

Every pattern is used with `fullmatch`. Quantifiers of one character are possessive (`*+`, `++`),
those of groups stand in atomic groups (`(?>(?:...)*)`): no input can make one of them backtrack, so
the time to match is linear in the length of the input. A possessive quantifier of a group would say
the same, but before CPython 3.11.5 (Debian 12 has 3.11.2) it keeps what a failed repetition had
consumed, and so accepts what does not match (gh-106052). Where the RFC leaves room, the narrower
reading is taken; the comment at the pattern says which.
"""

import re

TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]"
"""RFC 9110 5.6.2, `tchar`."""

VALUE = rb"[\t\x20-\x7e\x80-\xff]"
r"""RFC 9110 5.5: visible, obs-text, SP and HTAB. No NUL, CR, LF, and no other control byte either,
which the RFC lets a recipient keep: no sender has a use for them, log viewers and terminals have.
"""

FIELD_LINE = TOKEN + rb"++:" + VALUE + rb"*+\r\n"
"""RFC 9112 5: no space before the colon, no obs-fold (a line that begins with a space)."""

field_line = re.compile(FIELD_LINE)

fields = re.compile(rb"(" + TOKEN + rb"++):(" + VALUE + rb"*+)\r\n")
"""For `findall` over a block that already matched; values come with their surrounding spaces."""

request_line = re.compile(rb"(" + TOKEN + rb"++) ([\x21-\x7e]++) HTTP/1\.([01])\r\n")
"""RFC 9112 3: exactly one SP between the parts; the target is visible ASCII."""

request_head = re.compile(
    rb"(" + TOKEN + rb"++) ([\x21-\x7e]++) HTTP/1\.([01])\r\n((?>(?:" + FIELD_LINE + rb")*))\r\n"
)
"""A whole request head up to and including the empty line."""

_LEAN_LINE = rb"[0-9A-Za-z_-]++:[\x20-\x7e]*+\r\n"

lean_request_head = re.compile(
    rb"([A-Z]++) (/[\x21\x22\x24-\x7e]*+) HTTP/1\.(1)\r\n((?>(?:"
    rb"(?![EeHhKkPpTtUu](?i:xpect|ttp2-settings|eep-alive|roxy-connection|e|railer"
    rb"|ransfer-encoding|pgrade):|(?i:connection):(?! ?+(?i:keep-alive|close)\r))"
    + _LEAN_LINE
    + rb")*))\r\n"
)
"""The heads that are read without h11, a strict subset of `request_head` with the same groups:
HTTP/1.1, upper case method, origin-form, printable ASCII, and of the fields that concern only this
hop none but Host, Content-Length, and `Connection` with one usual option. The first letter decides
whether a name is looked at, because that is cheaper than comparing names."""

lean_response_head = re.compile(
    rb"HTTP/1\.(1) ([2-5][0-9][0-9]) ([\x20-\x7e]*+)\r\n((?>(?:"
    rb"(?![KkPpTtUu](?i:eep-alive|roxy-connection|e|railer|ransfer-encoding|pgrade):"
    rb"|(?i:connection):(?! ?+(?i:keep-alive|close)\r))" + _LEAN_LINE + rb")*))\r\n"
)
"""The same for `response_head`: a final response without codings."""

response_head = re.compile(
    rb"HTTP/1\.([01]) ([1-9][0-9][0-9])(?>(?: ("
    + VALUE
    + rb"*+))?)\r\n((?>(?:"
    + FIELD_LINE
    + rb")*))\r\n"
)
"""RFC 9112 4. The space before an empty reason may be missing: servers in use leave it out."""

token = re.compile(TOKEN + rb"++")

version = re.compile(rb"HTTP/[0-9]\.[0-9]")
"""RFC 9112 2.3: one digit, dot, one digit, and upper case."""

visible = re.compile(rb"[\x21-\x7e]++")
"""A request target: visible ASCII."""

value = re.compile(VALUE + rb"*+")

status = re.compile(rb"[1-9][0-9][0-9]")
"""RFC 9110 15: three digits. 600 to 999 belong to no class, but servers in use send them, clients
take them for 5xx, and Envoy passes them on."""

content_length = re.compile(rb"[0-9]{1,18}")
"""RFC 9110 8.6: digits only; 18 of them stay below 2**63. No sign, prefix, list or underscore."""

host = re.compile(
    rb"(?:[0-9A-Za-z_.-]++|\[([0-9A-Fa-f.]*+:[0-9A-Fa-f:.]*+)\])(?>(?::([0-9]{1,5}+))?)",
)
"""RFC 9110 7.2 and RFC 3986 3.2.2 without userinfo, percent-encoding and sub-delims: names that DNS
can resolve, IPv4 and bracketed IPv6 addresses. Groups: what stands in brackets, the port."""

chunk_line = re.compile(
    rb"([0-9A-Fa-f]{1,8}+)"
    rb"((?>(?:;[ \t]*+" + TOKEN + rb"++(?>(?:=(?:" + TOKEN + rb'++|"'
    rb'(?>(?:[\t\x20\x21\x23-\x5b\x5d-\x7e]|\\[\t\x20-\x7e])*)"))?))*))\r\n'
)
"""RFC 9112 7.1 and 7.1.1: at most 8 hex digits (4 GiB - 1 in one chunk); extensions must follow
their grammar and are dropped. No space before `;` or at the end of the line."""
