"""Policy files on disk."""

from policy_reading import cnp

from firewall.policy import files
from firewall.policy.files import read_paths

GOOD = cnp("endpointSelector: {}\ningress: [{}]")


def named(name):
    return GOOD.replace("name: p,", f"name: {name},")


def test_a_directory_means_its_yaml_and_json_files_at_any_depth(tmp_path):
    (tmp_path / "a.yaml").write_text(named("a"))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/b.yml").write_text(named("b"))
    (tmp_path / "c.json").write_text("[]")
    (tmp_path / "notes.txt").write_text("no policy")
    (tmp_path / ".hidden.yaml").write_text("no policy")
    result = read_paths([tmp_path])
    assert [one.key.name for one in result.objects] == ["a", "b"]
    assert result.problems == ()


def test_a_file_may_have_any_name(tmp_path):
    (tmp_path / "policy").write_text(GOOD)
    assert len(read_paths([tmp_path / "policy"]).objects) == 1


def test_problems_carry_the_files_name(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(GOOD.replace("ingress", "ingres"))
    assert str(read_paths([file]).errors[0]).startswith(f"{file}:5:3: spec")


def test_what_cannot_be_read_is_a_problem(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"a: 1\nb: \xe9\n")
    missing, latin = tmp_path / "none.yaml", tmp_path / "latin.yaml"
    result = read_paths([missing, latin])
    assert [str(p) for p in result.errors] == [
        f"{missing}: cannot be read: No such file or directory",
        f"{latin}:2:1: not UTF-8 text: invalid continuation byte",
    ]


def test_an_empty_directory_is_worth_a_word(tmp_path):
    assert "holds no" in str(read_paths([tmp_path]).warnings[0])


def test_a_byte_order_mark_is_no_content(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert len(read_paths([tmp_path]).objects) == 1


def test_an_object_of_two_files_refuses_both(tmp_path):
    (tmp_path / "a.yaml").write_text(GOOD)
    (tmp_path / "b.yaml").write_text(GOOD.replace("ingress", "egress"))
    result = read_paths([tmp_path])
    assert result.objects == ()
    assert len(result.errors) == 2
    assert "is given more than once" in str(result.errors[0])


def test_a_file_named_twice_is_read_once(tmp_path):
    (tmp_path / "a.yaml").write_text(GOOD)
    assert len(read_paths([tmp_path, tmp_path / "a.yaml"]).objects) == 1


def test_size_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 10)
    (tmp_path / "a.yaml").write_text(GOOD)
    assert "is larger than 10 bytes" in str(read_paths([tmp_path]).errors[0])
