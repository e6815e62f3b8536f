"""Makes and removes the tables behind the nat table (`translated`), in this network namespace.

Theory of operation. The one rule that `nft` cannot write, the target NFQUEUE of x_tables in a table
of nftables, is made by netlink; so are questions and removals, which then take microseconds. A
batch of messages is one transaction. The tables' base chains are made once, and deleted only by
`remove`: deleting one makes the kernel drop every packet that waits in any queue of the namespace.

Sources: linux/netfilter/nf_tables.h, nf_tables_compat.h; linux/netfilter/xt_NFQUEUE.h.
"""

import errno
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from contextlib import closing

from firewall.datapath import netlink
from firewall.datapath.netlink import ACK, ERROR, NESTED, NETFILTER, REQUEST, error_code
from firewall.datapath.ruleset import RulesetConfig
from firewall.datapath.sets import Family
from firewall.datapath.translated import ASKING, BASE_CHAIN, TABLE

_SUBSYSTEM = 10  # NFNL_SUBSYS_NFTABLES
_BEGIN, _END = 0x10, 0x11  # NFNL_MSG_BATCH_BEGIN, _END
_NEW_TABLE, _DELETE_TABLE, _NEW_CHAIN, _GET_CHAIN, _NEW_RULE, _DELETE_RULE = 0, 2, 3, 4, 6, 8
_TABLE_NAME, _CHAIN_TABLE, _CHAIN_NAME = 1, 1, 3  # NFTA_TABLE_..., NFTA_CHAIN_...
_RULE_TABLE, _RULE_CHAIN, _RULE_EXPRESSIONS = 1, 2, 4  # NFTA_RULE_...
_ELEMENT, _EXPRESSION_NAME, _EXPRESSION_DATA = 1, 1, 2  # NFTA_LIST_ELEM, NFTA_EXPR_...
_TARGET_NAME, _TARGET_REVISION, _TARGET_INFO = 1, 2, 3  # NFTA_TARGET_...
_QUEUES = struct.Struct("=HH4x")  # struct xt_NFQ_info_v1, aligned to 8: first queue, how many
_QUEUES_REVISION = 1
_CREATE, _APPEND = 0x400, 0x800  # NLM_F_...
_NUMBER = {Family.IPV4: 2, Family.IPV6: 10}  # NFPROTO_IPV4, NFPROTO_IPV6
_RECEIVE_BYTES = 1 << 16
_ABSENT = (errno.ENOENT, errno.EINVAL, errno.EOPNOTSUPP)  # no such table, or no nftables


def make_asking(config: RulesetConfig, families: Iterable[Family]) -> None:
    """Make the tables, if they are not there, and the chain in each that queues.

    Raises:
        OSError: the kernel has no nftables, or not the targets of x_tables in it; or no permission.
    """
    info = _QUEUES.pack(config.first_queue, config.queue_count)
    target = (
        netlink.attribute(_TARGET_NAME, b"NFQUEUE\0")
        + netlink.attribute(_TARGET_REVISION, struct.pack(">I", _QUEUES_REVISION))
        + netlink.attribute(_TARGET_INFO, info)
    )
    expression = netlink.attribute(_EXPRESSION_NAME, b"target\0") + netlink.attribute(
        _EXPRESSION_DATA | NESTED, target
    )
    expressions = netlink.attribute(
        _RULE_EXPRESSIONS | NESTED, netlink.attribute(_ELEMENT | NESTED, expression)
    )
    rules = _text(_RULE_TABLE, TABLE) + _text(_RULE_CHAIN, ASKING)
    changes: list[tuple[int, int, Family, bytes]] = []
    for family in families:
        changes += [
            (_NEW_TABLE, _CREATE, family, _text(_TABLE_NAME, TABLE)),
            (_NEW_CHAIN, _CREATE, family, _chain(ASKING)),
            (_DELETE_RULE, 0, family, rules),
            (_NEW_RULE, _CREATE | _APPEND, family, rules + expressions),
        ]
    _change(changes)


def is_made(family: Family) -> bool:
    """Say whether a family's table is there, with its base chain.

    Raises:
        OSError: no permission, or the kernel does not answer.
    """
    with closing(_connection()) as asking:
        asking.send(_message(_GET_CHAIN, 0, family, _chain(BASE_CHAIN), 1))
        (code,) = _codes(asking.recv(_RECEIVE_BYTES))
    if code not in (0, *_ABSENT):
        raise OSError(code, f"nftables does not say what is there: {os.strerror(code)}")
    return not code


def remove(families: Iterable[Family]) -> None:
    """Delete the tables; what is not there is no error. Packets that wait in queues are lost.

    Raises:
        OSError: no permission.
    """
    for family in families:
        try:
            _change([(_DELETE_TABLE, 0, family, _text(_TABLE_NAME, TABLE))])
        except OSError as error:
            if error.errno not in _ABSENT:
                raise


def _change(changes: list[tuple[int, int, Family, bytes]]) -> None:
    """Carry out messages (type, flags, family, attributes), all or none."""
    batch = _edge(_BEGIN)
    for number, (kind, flags, family, body) in enumerate(changes, 1):
        batch += _message(kind, ACK | flags, family, body, number)
    with closing(_connection()) as changing:
        changing.send(batch + _edge(_END))
        answered = 0
        while answered < len(changes):
            # The kernel has answered before send() returns.
            for code in _codes(changing.recv(_RECEIVE_BYTES, socket.MSG_DONTWAIT)):
                if code:
                    raise OSError(code, f"nftables: {os.strerror(code)}")
                answered += 1


def _codes(data: bytes) -> Iterator[int]:
    """Yield the error number of each answer, 0 where there is no error."""
    for kind, at, _ in netlink.messages(data):
        yield -error_code(data, at) if kind == ERROR else 0


def _connection() -> socket.socket:
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETFILTER)


def _edge(kind: int) -> bytes:
    """Return the message that begins or ends a transaction."""
    return netlink.message(kind, REQUEST, struct.pack(">BBH", 0, 0, _SUBSYSTEM))


def _message(kind: int, flags: int, family: Family, body: bytes, number: int) -> bytes:
    head = struct.pack(">BBH", _NUMBER[family], 0, 0)
    return netlink.message(_SUBSYSTEM << 8 | kind, REQUEST | flags, head + body, number)


def _chain(name: str) -> bytes:
    return _text(_CHAIN_TABLE, TABLE) + _text(_CHAIN_NAME, name)


def _text(kind: int, text: str) -> bytes:
    return netlink.attribute(kind, text.encode() + b"\0")
