"""The build: pure Python, or with the packet path compiled where BARTIZAN_COMPILED=1 asks for it.

mypyc (part of mypy) compiles the modules below as they are, by their type annotations; a C compiler
and the Python headers are needed. Nothing else differs: no module knows whether it is compiled.

    make compiled                                            # into build/compiled
    BARTIZAN_COMPILED=1 pip install --no-build-isolation .   # mypy and setuptools are installed
"""

import os

from setuptools import setup

PACKET_PATH = (
    "conntrack/chain.py",
    "conntrack/datagram.py",
    "conntrack/entry.py",
    "conntrack/eviction.py",
    "conntrack/extensions.py",
    "conntrack/icmp_errors.py",
    "conntrack/keys.py",
    "conntrack/packet.py",
    "conntrack/profile.py",
    "conntrack/quote.py",
    "conntrack/sctp_chunks.py",
    "conntrack/sctp_linux.py",
    "conntrack/sctp_strict.py",
    "conntrack/table.py",
    "conntrack/tcp_learning.py",
    "conntrack/tcp_linux.py",
    "conntrack/tcp_opening.py",
    "conntrack/tcp_reset.py",
    "conntrack/tcp_strict.py",
    "conntrack/tcp_window.py",
    "conntrack/timeouts.py",
    "conntrack/tracker.py",
    "conntrack/flow.py",
    "firewall/datapath/admission.py",
    "firewall/datapath/doubts.py",
    "firewall/datapath/events.py",
    "firewall/datapath/marks.py",
    "firewall/datapath/nfqueue.py",
    "firewall/datapath/offload.py",
    "firewall/datapath/pipeline.py",
    "firewall/datapath/queued.py",
    "firewall/datapath/ruling.py",
    "firewall/datapath/verdict.py",
    "firewall/datapath/worker.py",
    "firewall/policy/policymap.py",
    "firewall/policy/view.py",
    "firewall/replay/play.py",
)


def extensions() -> list[object]:
    """What is to be compiled."""
    if os.environ.get("BARTIZAN_COMPILED") != "1":
        return []
    from mypyc.build import mypycify  # noqa: PLC0415 -- needed for this only

    return mypycify([*PACKET_PATH])


setup(ext_modules=extensions())
