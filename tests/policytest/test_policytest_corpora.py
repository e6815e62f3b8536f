"""Every case of the Kubernetes corpus and Cilium's connectivity tests, as policy tests."""

import policytest_connectivity
import policytest_corpus
import pytest
from policytest_reading import case_of, failures, text_of

_FILES = policytest_corpus.files()


@pytest.mark.skipif(not _FILES, reason=f"{policytest_corpus.CORPUS} is not there")
@pytest.mark.parametrize("file", _FILES, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_a_kubernetes_table_holds(file):
    assert failures(case_of(text_of(policytest_corpus.load(file)))) == []


@pytest.mark.skipif(
    not policytest_connectivity.CORPUS.exists(),
    reason=f"{policytest_connectivity.CORPUS} is not there",
)
@pytest.mark.parametrize("name", policytest_connectivity.TESTS)
def test_ciliums_connectivity_test_holds(name):
    assert failures(case_of(text_of(policytest_connectivity.as_policytest(name)))) == []
