"""pytest plug-in: a lab from a policy test file, and the verdict of any packet as a value.

    @pytest.mark.bartizan("shop.yaml")
    def test_only_get_passes(lab):
        assert lab.send(IP(dst="10.0.1.2") / TCP(dport=80), from_="x/a").allowed
        assert lab.http("x/a", "PUT http://b.x/v1/x").status == 403

The file is a test file as `bartizan test` takes it: its endpoints, hosts and policies are what the
lab is made of. Packets are real ones, so pytest has to run inside an enclosure
(`python -m lab.enclosure -- pytest`); elsewhere tests that ask for the lab are skipped.

Loading the plug-in costs next to nothing: everything else is imported by the first test that uses
it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from policytest.packetlab import PacketLab

_INI = "bartizan_file"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the ini setting that names the file of tests without a mark."""
    parser.addini(_INI, "policy test file that the fixture `lab` is made from", default="")


def pytest_configure(config: pytest.Config) -> None:
    """Declare the mark."""
    config.addinivalue_line(
        "markers", "bartizan(file): the policy test file that the fixture `lab` is made from"
    )


@pytest.fixture
def lab(request: pytest.FixtureRequest) -> "Iterator[PacketLab]":
    """The lab of the file that the mark `bartizan` or the ini setting `bartizan_file` names."""
    from lab import enclosure  # noqa: PLC0415 (see the top of this file)
    from policytest.packetlab import PacketLab  # noqa: PLC0415

    path = _file(request)
    if enclosure.mode() is None:
        pytest.skip("packets need an enclosure: run `python -m lab.enclosure -- pytest ...`")
    with PacketLab(path) as made:
        yield made


def _file(request: pytest.FixtureRequest) -> Path:
    mark = request.node.get_closest_marker("bartizan")
    if mark is not None and mark.args:
        return request.path.parent / str(mark.args[0])
    named = str(request.config.getini(_INI))
    if not named:
        pytest.fail(
            'the fixture `lab` needs a file: @pytest.mark.bartizan("test.yaml") or the ini '
            f"setting {_INI}",
            pytrace=False,
        )
    return request.config.rootpath / named
