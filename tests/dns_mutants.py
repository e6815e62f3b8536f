"""Hostile DNS made from a seed, and a reader of it that shares nothing with the proxy.

Questions and answers are made by dnspython and mutated. The reader finds every question that a
server could find, and the addresses that a name leads to in any order of following.
"""

import dns.message
import dns.name
import dns.rrset

NAMES = (
    "api.example.", "x.cdn.example.", "API.example.", "evil.org.", "cdn.example.", r"api\.example.",
    "a.b.cdn.example.", r"x\.y.cdn.example.", r"api\000.example.", r"\009x.cdn.example.", ".",
    "api.example.evil.org.", r"x\032.cdn.example.", "y-_9.cdn.example.",
)  # fmt: skip
KINDS = ("A", "A", "A", "AAAA", "CNAME", "TXT", "ANY", "HTTPS")


def allowed(labels: tuple[bytes, ...]) -> bool:
    """What `dns_realm.POLICY` says, apart from it, to labels in lower case."""
    if labels == (b"api", b"example"):
        return True
    plain = set(b"abcdefghijklmnopqrstuvwxyz0123456789-_")
    return len(labels) == 3 and labels[1:] == (b"cdn", b"example") and plain.issuperset(labels[0])


def _mutated(data: bytes, dice) -> bytes:
    at = dice.randrange(len(data))
    match dice.randrange(6):
        case 0:
            return data[:at] + bytes((data[at] ^ (1 << dice.randrange(8)),)) + data[at + 1 :]
        case 1:
            return data[:at] + data[at + 1 :]
        case 2:
            return data[:at] + bytes((dice.choice((0, 1, 3, 0xC0, 12, 63, 64)),)) + data[at:]
        case 3:  # another number of questions or records
            field = dice.choice((4, 6, 8, 10))
            return data[:field] + dice.choice((0, 1, 2)).to_bytes(2, "big") + data[field + 2 :]
        case 4:  # a name in the place of another, where it begins
            return data[:12] + dns.name.from_text(dice.choice(NAMES)).to_wire() + data[12:]
        case _:
            return data[:at]


def question(dice) -> bytes:
    made = dns.message.make_query(
        dice.choice(NAMES if dice.random() < 0.3 else NAMES[:3]),
        dice.choice(KINDS),
        id=7,
        use_edns=dice.random() < 0.3,
    )
    sent = made.to_wire()
    if dice.random() < 0.1:  # a second question, a compressed one
        name = dice.choice((b"\xc0\x0c", b"\x04evil\x03org\x00"))
        sent = sent[:4] + b"\x00\x02" + sent[6:] + name + b"\x00\x01\x00\x01"
    for _ in range(dice.choice((0, 0, 0, 1, 2))):
        sent = _mutated(sent, dice) or b"\x00"
    return sent


def answer(query: bytes, dice) -> bytes:
    """What a server says, which may be about anything."""
    try:
        made = dns.message.make_response(dns.message.from_wire(query))
    except Exception:  # noqa: BLE001 - the proxy takes what dnspython does not
        return query[:2] + b"\x81\x80" + query[4:]
    name = made.question[0].name
    names = [
        *[name] * 4,
        *map(dns.name.from_text, ("api.example.", "evil.org.", "cdn.example.", "alias.net.")),
    ]
    for _ in range(dice.randrange(5)):
        owner = dice.choice(names)
        kind, data = dice.choice((
            ("A", f"192.0.2.{dice.randrange(9)}"), ("AAAA", f"2001:db8::{dice.randrange(9)}"),
            ("CNAME", str(dice.choice(names))), ("TXT", "x"),
        ))  # fmt: skip
        section = made.answer if dice.random() < 0.8 else made.additional
        section.append(dns.rrset.from_text(owner, dice.randrange(300), "IN", kind, data))
    dice.shuffle(made.answer)
    if dice.random() < 0.1:
        made.set_rcode(dice.choice((2, 3, 5)))
    said = made.to_wire()
    for _ in range(dice.choice((0, 0, 1, 2))):
        said = _mutated(said, dice) or b"\x00"
    return said


def reply(asked: bytes, dice) -> bytes:
    """What comes back for a question: an answer, or one that answers something else."""
    said = answer(asked, dice)
    match dice.randrange(12):
        case 0:
            return bytes((said[0] ^ 1,)) + said[1:]
        case 1:
            return asked[:2] + answer(question(dice), dice)[2:]
        case 2:
            return said.replace(b"example", b"examp1e", 1)
    return said


def _labels(data: bytes, at: int) -> tuple[tuple[bytes, ...], int]:
    """Follow pointers anywhere, a hundred at most: whatever some reader would."""
    labels, end = [], 0
    for _ in range(100):
        size = data[at] if at < len(data) else 0
        if size >= 0xC0 and at + 1 < len(data):
            end = end or at + 2
            at = (size & 0x3F) << 8 | data[at + 1]
        elif size:
            labels.append(data[at + 1 : at + 1 + (size & 0x3F)].lower())
            at += 1 + (size & 0x3F)
        else:
            break
    return tuple(labels), end or at + 1


def questions(data: bytes) -> list[tuple[bytes, ...]]:
    """Return the name of every question, and of what could be one."""
    found, at = [], 12
    for _ in range(int.from_bytes(data[4:6], "big")):
        name, at = _labels(data, at)
        found.append(name)
        at += 4
        if at > len(data):  # the number says more than there is
            break
    return found


def addresses(data: bytes, name: tuple[bytes, ...]) -> set[bytes]:
    """Return every address in the answer section to which a name leads in any number of steps."""
    at = 12
    for _ in questions(data):
        at = _labels(data, at)[1] + 4
    records = []
    for _ in range(int.from_bytes(data[6:8], "big")):
        if at >= len(data):
            break
        owner, at = _labels(data, at)
        kind, kind_class = int.from_bytes(data[at : at + 2], "big"), data[at + 2 : at + 4]
        size = int.from_bytes(data[at + 8 : at + 10], "big")
        records.append((owner, kind, kind_class, at + 10, data[at + 10 : at + 10 + size]))
        at += 10 + size
    reached = {name}
    for _ in records:
        for owner, kind, _, start, _ in records:
            if owner in reached and kind == 5:
                reached.add(_labels(data, start)[0])
    if data[3] & 15:  # an error has no addresses
        return set()
    return {
        value
        for owner, kind, kind_class, _, value in records
        if owner in reached and kind_class == b"\x00\x01" and kind in (1, 28)
    }
