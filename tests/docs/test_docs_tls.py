"""The example of docs/tls.md is accepted and means what the page says."""

import re
from pathlib import Path

from firewall.policy.compile import make_l7_row
from firewall.policy.course import CLEAR, Course, Form, Restriction, plan
from firewall.policy.readers import read
from firewall.policy.snapshot import TlsContextRow

TEXT = (Path(__file__).resolve().parents[2] / "docs/tls.md").read_text()
(EXAMPLE,) = re.findall(r"^```yaml\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
INSIDE = TlsContextRow("kube-system", "api-inside")
OUTSIDE = TlsContextRow("kube-system", "api-outside")


def test_the_example_is_accepted_and_means_what_the_page_says():
    result = read(EXAMPLE, "tls.yaml")
    assert [str(problem) for problem in result.problems] == []
    names, inside = (
        [Restriction((make_l7_row(entry),), unrestricted=False)]
        for entry in result.objects[0].entries
    )
    for name, passes in (
        ("one.one.one.one", True),
        ("de.wikipedia.org", True),
        ("wikipedia.org", False),
        ("a.b.wikipedia.org", False),
        ("", False),
    ):
        assert (plan(names, Form(tls=True, server_name=name))[0] == Course(False)) is passes, name
    assert plan(names, CLEAR)[0] is None
    assert plan(inside, Form(tls=True, server_name="x"))[0] == Course(True, INSIDE, OUTSIDE)
    assert plan(inside, CLEAR)[0] is None
