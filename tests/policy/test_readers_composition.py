"""Text to nodes: places, bounds, double keys, and what plain scalars mean."""

import pytest
from policy_reading import accept, cnp, read_text, refuse, refuse_ingress

from firewall.policy.readers import read
from firewall.policy.readers.composition import MAX_DEPTH, Mapping, Scalar, Sequence, compose


def one(text):
    problems = []
    documents = list(compose(text, "f", problems))
    return [one.root for one in documents if not one.spoiled], [
        str(problem) for problem in problems
    ]


def test_places_count_from_one():
    (root,), problems = one("a:\n  - b\n")
    assert problems == []
    item = root.pairs["a"].value.items[0]
    assert (root.mark, root.pairs["a"].mark, item.mark) == ((1, 1), (1, 1), (2, 5))


def test_json_is_read_as_yaml():
    (root,), problems = one('{"a": [1, "x\\u00e9"], "b": null}')
    assert problems == []
    assert [i.text for i in root.pairs["a"].value.items] == ["1", "xé"]
    assert root.pairs["b"].value.plain


def test_empty_documents_are_no_documents():
    assert one("---\n---\n# nothing\n---\n") == ([], [])


def test_double_keys_are_refused_where_the_second_stands():
    """YAML 1.2 section 3.2.1.3: keys of a mapping are unique; PyYAML keeps the last silently."""
    roots, problems = one("a: 1\nb:\n  c: 1\n  c: 2\n---\nd: 1\n")
    assert problems == ['f:4:3: key "c" given twice; first in line 3']
    assert len(roots) == 1


def test_other_faults_of_a_document_with_a_double_key_are_told_too():
    spec = "endpointSelector: {}\ningress: [{fromEntities: [wrold]}]\ningress: [{}]"
    result = read_text(cnp(spec))
    assert [str(problem).split(": ", 1)[1] for problem in result.errors] == [
        'spec.ingress[0].fromEntities[0]: unsupported entity: wrold; did you mean "world"?',
        'key "ingress" given twice; first in line 6',
    ]
    assert result.objects == ()


def test_a_bare_rule_with_a_double_key_is_no_rule():
    result = read_text("endpointSelector: {}\ningress: [{}]\ningress: [{frm: []}]\n")
    assert result.objects == ()
    assert [problem.line for problem in result.errors] == [3]


def test_a_double_key_spoils_its_own_document_only():
    result = read_text(cnp("endpointSelector: {}\ningress: [{}]") + "---\na: 1\na: 2\n")
    assert len(result.objects) == 1
    assert 'key "a" given twice; first in line 8' in str(result.errors[1])


def test_broken_syntax_keeps_what_came_before():
    result = read_text(cnp("endpointSelector: {}\ningress: [{}]") + "---\na: [1\nb: 2\n")
    assert len(result.objects) == 1
    assert [p.line for p in result.errors] == [9]
    assert "not YAML" in str(result.errors[0])


def test_aliases_share_their_node():
    (root,), _ = one("a: &x {k: 1}\nb: *x\n")
    assert root.pairs["a"].value is root.pairs["b"].value


def test_billions_of_aliases_are_refused_quickly():
    levels = ["a0: &a0 [x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    roots, problems = one("\n".join(levels))
    assert roots == []
    assert "values in one document" in problems[0]


def test_an_alias_inside_its_own_anchor_is_refused():
    roots, problems = one("a: &x\n  b: *x\n")
    assert roots == []
    assert problems == ['f:2:6: alias "*x" contains itself']


def test_an_unknown_alias_is_refused():
    assert one("a: *x\n")[1] == ['f:1:4: alias "*x" names no anchor before it']


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_depth_is_bounded(opening):
    roots, problems = one(opening * (MAX_DEPTH + 50))
    assert roots == []
    assert problems


def test_a_hundred_thousand_brackets_do_no_harm():
    roots, problems = one("[" * 100_000)
    assert roots == []
    assert "nested more than" in problems[0]


def test_keys_are_strings():
    assert "must be a string" in one("{[a]: 1}")[1][0]


def test_merge_keys_fill_in_what_is_missing():
    """https://yaml.org/type/merge.html, which kubectl understands."""
    (root,), problems = one("base: &b {x: 1, y: 1}\nuse: {<<: *b, y: 2}\n")
    assert problems == []
    use = root.pairs["use"].value
    assert {name: pair.value.text for name, pair in use.pairs.items()} == {"y": "2", "x": "1"}


def test_merge_keys_take_mappings_only():
    assert '"<<" takes a mapping' in one("{<<: 1}")[1][0]


def test_foreign_tags_are_refused():
    assert 'tag "!!python/object:x.Y"' in one("a: !!python/object:x.Y {}")[1][0]
    assert "has no meaning here" in one("a: !!binary aGk=")[1][0]


def test_string_tag_is_a_quote():
    (root,), _ = one("!!str 80")
    assert isinstance(root, Scalar)
    assert not root.plain


def test_kinds_of_nodes():
    (root,), _ = one("{a: [b]}")
    assert isinstance(root, Mapping)
    assert isinstance(root.pairs["a"].value, Sequence)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: \x00", "control characters are not allowed"),
        ("a: \ud800", "not Unicode text"),
        ("\tx: 1", "not YAML"),
        ("%YAML 9.9\n--- a\n", "not YAML"),
    ],
)
def test_what_is_no_yaml_is_a_problem(text, message):
    result = read(text, "f")
    assert result.objects == ()
    assert message in str(result.problems[0])


LABEL = "endpointSelector: {{matchLabels: {{app: {}}}}}\ningress: [{{}}]"


@pytest.mark.parametrize(
    ("written", "kind"),
    [
        *((word, "true or false") for word in ("on", "yes", "No", "true", "FALSE")),
        *((word, "a number") for word in ("80", "0755", "08", "1.0", "1e3", "1_0", "0x1F")),
    ],
)
def test_a_string_that_kubectl_reads_otherwise_wants_quotes(written, kind):
    """The API server would answer that it must be a string."""
    (found,) = refuse(cnp(LABEL.format(written)))
    assert f'must be a string, and kubectl reads {written} as {kind}; write "{written}"' in found
    assert accept(cnp(LABEL.format(f'"{written}"')))


@pytest.mark.parametrize("written", ["v1", "web", "2026-01-01", "1.2.3", "0b", "e3", "_1", "1e"])
def test_a_plain_string_needs_no_quotes(written):
    result = read_text(cnp(LABEL.format(written)))
    assert [problem for problem in result.problems if "kubectl" in str(problem)] == []


@pytest.mark.parametrize("written", ["y", "N"])
def test_a_letter_that_kubectl_reads_as_truth_is_warned_of(written):
    """PyYAML writes labels so."""
    found = read_text(cnp(LABEL.format(written)))
    assert f"app={written}" in found.objects[0].entries[0].subject.describe()
    assert f'write "{written}"' in str(found.warnings[0])


@pytest.mark.parametrize("written", ["0x50", "0o17", "017", "1_000", "080", "1e3", "1.0"])
def test_numbers_are_plain_decimals(written):
    found = refuse_ingress(f"{{toPorts: [{{ports: [{{port: '1', endPort: {written}}}]}}]}}")
    assert f"write the number in plain decimal digits, not {written}" in found


def test_a_quoted_number_is_no_number():
    spec = 'endpointSelector: {}\ningress: [{toPorts: [{ports: [{port: "1", endPort: "2"}]}]}]'
    assert 'must be a number, not the string "2"' in refuse(cnp(spec))[0]


@pytest.mark.parametrize("word", ["true", "on", "Yes"])
def test_truth_has_the_words_of_yaml_1_1(word):
    spec = f"endpointSelector: {{}}\nenableDefaultDeny: {{ingress: {word}}}\ningress: [{{}}]"
    assert accept(cnp(spec)).entries[0].default_deny


def test_a_quoted_truth_is_no_truth():
    spec = 'endpointSelector: {}\nenableDefaultDeny: {ingress: "true"}\ningress: [{}]'
    assert "must be true or false" in refuse(cnp(spec))[0]


def test_null_is_missing():
    spec = "endpointSelector: {}\nnodeSelector: null\ningress: [{fromEndpoints: ~, toPorts: }, {}]"
    assert [e.peers for e in accept(cnp(spec)).entries] == [(), ()]


def test_a_null_item_is_an_error():
    spec = "endpointSelector: {}\ningress:\n- fromEndpoints:\n  -\n"
    assert "is empty; write {} if everything is meant" in refuse(cnp(spec))[0]
