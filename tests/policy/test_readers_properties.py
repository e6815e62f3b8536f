"""What must hold for any text: no exception, bounded problems, no meaning in the order."""

import json

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_reading import EVERY_CAPABILITY

from firewall.policy.readers import ReadResult, read
from firewall.policy.readers.kinds import KINDS

FIELDS = """
    apiVersion kind metadata name namespace labels spec specs items status description
    endpointSelector nodeSelector ingress egress ingressDeny egressDeny matchLabels
    matchExpressions key operator values fromEndpoints toEndpoints fromCIDR toCIDRSet cidr
    except cidrGroupRef fromEntities toFQDNs matchName matchPattern toServices toPorts
    ports port endPort protocol rules http dns path method headers headerMatches icmps
    fields type family listener serverNames terminatingTLS secret authentication mode
    enableDefaultDeny log value podSelector namespaceSelector ipBlock policyTypes from to
    tier priority subject namespaces pods action networks domainNames protocols tcp
    externalCIDRs endpoints subsets addresses <<
"""
WORDS = """
    In Exists TCP ANY 80 0 web GET /v1 10.0.0.0/8 ::/0 all world Ingress Accept Deny
    Admin cilium.io/v2 networking.k8s.io/v1 v1 List * ** a.com true IPv6 8
"""
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from([*WORDS.split(), *KINDS]),
    st.text(max_size=9),
)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(FIELDS.split()), inner, max_size=6),
    ),
    max_leaves=25,
)


def dump(document):
    return yaml.dump(document, Dumper=yaml.CSafeDumper)


def policies():
    """Yield objects of a known kind whose spec is anything."""
    return st.builds(
        lambda kind, spec, name: {
            "apiVersion": KINDS[kind].versions[0],
            "kind": kind,
            "metadata": {"name": name},
            "spec": spec,
        },
        st.sampled_from(sorted(KINDS)),
        DOCUMENTS,
        st.sampled_from(["a", "b", "c"]),
    )


def check(result):
    assert isinstance(result, ReadResult)
    for problem in result.problems:
        assert str(problem).startswith("f:")


@given(st.text())
def test_any_text_gives_a_result(text):
    check(read(text, "f", settings=EVERY_CAPABILITY))


@given(st.text(alphabet="[]{}:,-&*!?|>'\"%@#\n ab<~", max_size=60))
def test_any_punctuation_gives_a_result(text):
    check(read(text, "f", settings=EVERY_CAPABILITY))


@settings(max_examples=300)
@given(st.one_of(DOCUMENTS, policies()))
def test_any_document_gives_a_result(document):
    check(read(dump(document), "f", settings=EVERY_CAPABILITY))
    check(read(json.dumps(document), "f", settings=EVERY_CAPABILITY))


def rule(words):
    return {
        "endpointSelector": {"matchLabels": {"app": words[0]}},
        "egress": [{"toEntities": words}],
    }


@given(
    st.lists(st.sampled_from(["all", "world", "host", "moon"]), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
)
def test_the_order_of_documents_has_no_meaning(words, random):
    texts = [
        dump(
            {
                "apiVersion": "cilium.io/v2",
                "kind": "CiliumNetworkPolicy",
                "metadata": {"name": f"p{at % 3}"},
                "spec": rule([word]),
            }
        )
        for at, word in enumerate(words)
    ]
    shuffled = texts.copy()
    random.shuffle(shuffled)

    def shape(parts):
        result = read("---\n".join(parts), "f", settings=EVERY_CAPABILITY)
        kept = {(str(one.key), repr(one.document)) for one in result.objects}
        return kept, sorted(p.message.partition(";")[0] for p in result.errors)

    assert shape(texts) == shape(shuffled)


@given(DOCUMENTS)
def test_reading_is_a_function_of_the_text(document):
    text = dump(document)
    assert read(text, "f") == read(text, "f")
