"""Sources of running text into Documents."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from danlu.core.errors import ConfigError, DataError
from danlu.core.ledger import Ledger
from danlu.core.records import Document
from danlu.text.read import SourceConfig, group_of, read_documents


def read(tmp_path: Path, name: str, data: bytes | str, **keys) -> tuple[list[Document], Ledger]:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    ledger = Ledger()
    documents = list(read_documents(SourceConfig(path=name, **keys), tmp_path, ledger))
    ledger.check()
    station = ledger.station(f"read:{name}")
    assert station.came.bytes == path.stat().st_size
    assert station.went.rows == len(documents)
    assert station.went.bytes == sum(len(document.text.encode()) for document in documents)
    return documents, ledger


TEXT = "one\r\ntwo\n\n \nthree\n"


def test_a_file_is_one_document_as_it_stands(tmp_path: Path) -> None:
    documents, _ = read(tmp_path, "a.txt", TEXT, category="en")
    assert documents == [Document(TEXT, "a.txt", "a.txt", "en")]


def test_paragraphs_and_lines(tmp_path: Path) -> None:
    documents, _ = read(tmp_path, "a.md", TEXT, document="paragraph")
    assert [(document.text, document.id) for document in documents] == [("one\r\ntwo", "a.md:1"), ("three", "a.md:5")]
    documents, ledger = read(tmp_path, "a.md", TEXT, document="line")
    assert [(document.text, document.id) for document in documents] == [
        ("one", "a.md:1"), ("two", "a.md:2"), ("three", "a.md:5")]
    assert ledger.station("read:a.md").dropped["blank line"].rows == 2


def test_a_file_or_paragraph_that_is_too_large_for_one_document(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("danlu.text.read.MAX_DOCUMENT_BYTES", 20)
    with pytest.raises(DataError, match=r"a.txt:1: the file has more than 20 bytes[^$]*: paragraph or document: line"):
        read(tmp_path, "a.txt", "short\n\n" * 3)
    assert len(read(tmp_path, "a.txt", "short\n\n" * 3, document="paragraph")[0]) == 3
    with pytest.raises(DataError, match=r"a.txt:3: the paragraph has more than 20 bytes[^$]*Set document: line"):
        read(tmp_path, "a.txt", "one\n\n" + "short\n" * 4, document="paragraph")
    assert len(read(tmp_path, "a.txt", "short\n" * 4 + "long " * 9, document="line")[0]) == 5


def test_a_bad_line_is_lost_alone(tmp_path: Path) -> None:
    documents, ledger = read(tmp_path, "a.txt", b"one\na \xff \nthree\n")
    assert documents[0].text == "one\nthree\n"
    assert ledger.quarantined[0].where == "a.txt:2"
    assert ledger.station("read:a.txt").dropped["not UTF-8"].bytes == 5


def test_a_file_in_an_unknown_encoding_is_refused_as_a_whole(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"30 of 30 rows[^$]*a.txt:1: not UTF-8[^$]*UTF-8\?"):
        read(tmp_path, "a.txt", "Привет\n".encode("cp1251") * 30)


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf"])
def test_an_empty_file_gives_nothing(tmp_path: Path, data: bytes) -> None:
    assert read(tmp_path, "a.txt", data)[0] == []


def test_rows_with_a_field(tmp_path: Path) -> None:
    rows = [{"text": "甲"}, {"body": "x"}, {"text": 3}, ["no"], {"text": ["a", "b"]}, {"text": ""}]
    documents, ledger = read(tmp_path, "a.jsonl", "\n".join(json.dumps(row) for row in rows))
    assert [(document.text, document.id) for document in documents] == [
        ("甲", "a.jsonl:1"), ("a\nb", "a.jsonl:5"), ("", "a.jsonl:6")]
    assert [(item.where, item.reason) for item in ledger.quarantined] == [
        ("a.jsonl:2", "no field “text” (fields found: body)"), ("a.jsonl:3", "“text” is not a text but a number"),
        ("a.jsonl:4", "not an object but a list")]


def test_a_path_through_lists(tmp_path: Path) -> None:
    data = {"version": "1", "data": [{"paragraphs": [{"context": "one"}, {"context": "two"}]},
                                     {"paragraphs": "no"}, {"paragraphs": [{}, {"context": "three"}]}]}
    documents, ledger = read(tmp_path, "a.json", json.dumps(data, indent=1), field="data[].paragraphs[].context")
    assert [(document.text, document.id) for document in documents] == [
        ("one", "a.json:1#1"), ("two", "a.json:1#2"), ("three", "a.json:1#3")]
    assert [(item.where, item.reason) for item in ledger.quarantined] == [
        ("a.json:1 data[1].paragraphs", "“data[1].paragraphs” is not a list but a string"),
        ("a.json:1 data[2].paragraphs[0].context", "no field “data[2].paragraphs[0].context” (fields found: none)")]


def test_a_name_with_a_dot(tmp_path: Path) -> None:
    """A flattened table's column is meant before a path of the same letters."""
    assert [item.text for item in read(tmp_path, "a.csv", "id,doc.text\n1,here\n", field="doc.text")[0]] == ["here"]
    rows = [{"doc.text": "here", "doc": {"text": "there"}}, {"doc": {"text": "there"}}, {"doc": {}}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    documents, ledger = read(tmp_path, "a.jsonl", text, field="doc.text")
    assert [item.text for item in documents] == ["here", "there"]
    assert ledger.quarantined[0].reason == "no field “doc.text” (fields found: none)"
    nested = json.dumps({"data": [{"a.b": "one"}, {"a": {"b": "two"}}]})
    assert [item.text for item in read(tmp_path, "b.json", nested, field="data[].a.b")[0]] == ["one", "two"]


def test_nothing_at_the_end_of_a_path(tmp_path: Path) -> None:
    documents, ledger = read(tmp_path, "a.json", '{"data": []}', field="data[].text")
    assert documents == []
    assert ledger.station("read:a.json").dropped["no text in the row"].rows == 1


def test_lists_of_strings_and_objects_of_titles(tmp_path: Path) -> None:
    documents, _ = read(tmp_path, "a.json", json.dumps(["第一回", "第二回"]))
    assert [document.text for document in documents] == ["第一回", "第二回"]
    assert len({document.id for document in documents}) == 2
    documents, ledger = read(tmp_path, "b.json", json.dumps({"一": "甲", "二": ["乙", "丙"], "三": 3}, indent=1))
    assert [(document.id, document.text) for document in documents] == [("b.json#一", "甲"), ("b.json#二", "乙\n丙")]
    assert ledger.quarantined[0].where == "b.json#三"


def test_an_object_that_is_no_title_map_is_told_what_it_lacks(tmp_path: Path) -> None:
    documents, ledger = read(tmp_path, "a.json", '{"version": "1", "data": [{"x": 1}]}')
    assert documents == []
    assert ledger.quarantined[0].reason == "no field “text” (fields found: version, data)"


def test_the_first_bad_row_can_be_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n{"txt": "y"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: no field “text”"):
        list(read_documents(SourceConfig(path="a.jsonl", max_refused=0), tmp_path, Ledger()))


def test_max_refused_is_a_setting(tmp_path: Path) -> None:
    data = "".join(f'{{"text": "{n}"}}\n' if n % 2 else "{}\n" for n in range(30))
    with pytest.raises(DataError, match="15 of 30"):
        read(tmp_path, "a.jsonl", data)
    assert len(read(tmp_path, "a.jsonl", data, max_refused=0.5)[0]) == 15


def test_a_folder_is_read_in_sorted_order(tmp_path: Path) -> None:
    files = {"d/b.jsonl": '{"text": "B"}', "d/a.txt": "A", "d/z/c.csv": "text\nC\n", "d/n.yml": "x: 1"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    documents = list(read_documents(SourceConfig(path="d"), tmp_path, Ledger()))
    assert [(document.text, document.source) for document in documents] == [
        ("A", "d/a.txt"), ("B", "d/b.jsonl"), ("C", "d/z/c.csv")]


def test_files_in_packages_carry_what_the_user_wrote(package: Path, ledger: Ledger) -> None:
    documents = list(read_documents(SourceConfig(path="package:tinypackage/data/zh"), Path(), ledger))
    assert [document.source for document in documents] == [
        "package:tinypackage/data/zh/a.txt", "package:tinypackage/data/zh/b.jsonl"]
    with pytest.raises(ConfigError):
        list(read_documents(SourceConfig(path="package:tinypackage/nothing"), Path(), ledger))


def test_groups() -> None:
    module = Document("x", "docstrings:email", "email.mime.text")
    assert [group_of(module, kind) for kind in ("document", "file", "package")] == [
        "docstrings:email email.mime.text", "email.mime.text", "docstrings:email"]
    inside = Document("x", "package:p/a/b.json", "package:p/a/b.json:1#2")
    assert [group_of(inside, kind) for kind in ("file", "package")] == ["package:p/a/b.json", "package:p"]
    assert group_of(Document("x", "texts/a/b.txt", "i"), "package") == "texts/a"


@pytest.mark.parametrize("keys", [{"field": ".a"}, {"field": "a..b"}, {"field": "a[0]"}, {"field": ""}, {"path": ""},
                                  {"document": "word"}, {"unknown": 1}])
def test_settings_that_cannot_be_meant(keys: dict) -> None:
    with pytest.raises(ValidationError):
        SourceConfig(**{"path": "x", **keys})


ROW = st.one_of(
    st.binary(max_size=20).map(lambda data: data.replace(b"\n", b"")),
    st.dictionaries(st.sampled_from(["text", "a"]), st.one_of(
        st.text(max_size=10), st.integers(), st.lists(st.text(max_size=3), max_size=3), st.none()), max_size=2).map(
            lambda row: json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass")))


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(ROW, max_size=15), end=st.sampled_from([b"\n", b"\r\n"]),
       name=st.sampled_from(["r.jsonl", "r.json", "r.csv", "r.txt"]),
       document=st.sampled_from(["file", "paragraph", "line"]), field=st.sampled_from([None, "text", "a[]", "text.a"]))
def test_random_dirty_files_balance(tmp_path_factory, rows, end, name, document, field) -> None:
    rows = [b"text,a", *rows] if name == "r.csv" else rows
    read(tmp_path_factory.getbasetemp(), name, end.join(rows), document=document, field=field, max_refused=1.0)
