"""Bytes to lines to values: everything bad is refused with its place, and every station balances."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.core.errors import DataError
from danlu.core.ledger import Ledger, Station
from danlu.text import rows
from danlu.text.files import Located
from danlu.text.rows import Gate, read_lines, read_rows, read_values


def dropped(station: Station) -> dict[str, int]:
    """Reason → rows."""
    return {reason: count.rows for reason, count in station.dropped.items()}


def values_of(tmp_path: Path, name: str, data: bytes, strict: bool = False):
    """([(place, value)], ledger) of a file with these bytes; every value is given on."""
    path = tmp_path / name
    path.write_bytes(data)
    ledger = Ledger()
    gate = Gate("read:x", ledger, strict)
    found = []
    for value in read_values(Located(path, name), gate):
        gate.give(value.bytes, value.bytes)
        found.append((value.where, value.value))
    ledger.check()
    assert ledger.station("read:x").came.bytes == len(data), "every byte of the file was counted"
    return found, ledger


def test_lines_survive_bad_bytes_and_keep_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo \xff\xfe\n\nfo\x00ur")
    ledger = Ledger()
    gate = Gate("read:a", ledger)
    lines = [(line.number, line.text) for line in read_lines(Located(path, "a.txt"), gate)]
    assert lines == [(1, "one\r\n"), (3, "\n"), (4, "fo\x00ur")]
    assert [(item.where, item.reason) for item in ledger.quarantined] == [("a.txt:2", "not UTF-8 (byte 5 of the line)")]
    assert dropped(ledger.station("read:a")) == {"not UTF-8": 1, "byte order mark": 0}


def test_a_line_without_end_is_bounded(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 100)
    found, ledger = values_of(tmp_path, "a.jsonl", b'{"a": 1}\n{"a": "' + b"x" * 5000 + b'"}\n{"a": 2}\n')
    assert [value for _, value in found] == [{"a": 1}, {"a": 2}]
    assert ledger.quarantined[0].where == "a.jsonl:2"
    assert len(ledger.quarantined[0].excerpt) <= 160


def test_json_lines_with_every_sort_of_dirt(tmp_path: Path) -> None:
    lines = [b'{"text": "\xe7\x94\xb2"}', b"", b"{broken", b'{"text": "\xff"}', b"[" * 100_000, b'{"a": "\\ud800"}',
             b'{"a": "\\ud83d\\ude00"}', b"   ", b'{"a": ' + b"9" * 5000 + b"}", b'{"a": "x\x00y"}', b"null"]
    found, ledger = values_of(tmp_path, "a.jsonl", b"\r\n".join(lines))
    assert found == [("a.jsonl:1", {"text": "甲"}), ("a.jsonl:7", {"a": "😀"}), ("a.jsonl:11", None)]
    assert dropped(ledger.station("read:x")) == {
        "blank line": 2, "bad JSON": 4, "not UTF-8": 1, "half of a surrogate pair": 1}
    assert [item.where for item in ledger.quarantined] == [f"a.jsonl:{n}" for n in (3, 4, 5, 6, 9, 10)]


ROWS = [{"a": 1}, {"a": "好\n"}, {"a": [1, {"b": 2}]}]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("text", [
    json.dumps(ROWS), json.dumps(ROWS, indent=2), json.dumps(ROWS)[:-1] + ",\n]\n",
    "\n\n" + "\n".join(map(json.dumps, ROWS)), "\n".join(json.dumps(row, indent=1) for row in ROWS),
    "\ufeff" + json.dumps(ROWS, ensure_ascii=False)], ids=["list", "pretty list", "trailing comma", "lines", "objects",
                                                           "byte order mark"])
def test_json_is_told_by_its_content_not_by_its_name(tmp_path: Path, name: str, text: str) -> None:
    found, _ = values_of(tmp_path, name, text.encode())
    assert [value for _, value in found] == ROWS


def test_one_object_in_a_file(tmp_path: Path) -> None:
    for text in ('{"a": {"b": 1}}', '{\n "a": {"b": 1}\n}', '{"a":\n {"b": 1}}'):
        assert [value for _, value in values_of(tmp_path, "a.json", text.encode())[0]] == [{"a": {"b": 1}}]


def test_a_broken_element_of_a_list_is_refused_alone(tmp_path: Path) -> None:
    text = '[\n{"a": 1},\n{"a": oops, "n": 2},\n{"a": 3},\n{"a": "\ud800"},\n{"a": "cut'
    found, ledger = values_of(tmp_path, "a.json", text.encode("utf-8", "surrogatepass"))
    assert found == [("a.json:2", {"a": 1}), ("a.json:4", {"a": 3})]
    assert [(item.where, item.reason.partition(":")[0]) for item in ledger.quarantined] == [
        ("a.json:3", "bad JSON"), ("a.json:5", "not UTF-8"), ("a.json:6", "bad JSON"),
        ("a.json:6", "the list is not closed")]


def test_elements_on_one_line_are_told_apart(tmp_path: Path) -> None:
    found, _ = values_of(tmp_path, "a.json", b'["x", "y",\n"z", "w"]')
    assert found == [("a.json:1", "x"), ("a.json:1#2", "y"), ("a.json:2", "z"), ("a.json:2#4", "w")]


@pytest.mark.parametrize("data", [b"", b"\n\n", b"[]", b" [ ] \n", b"\xef\xbb\xbf"])
def test_empty_files_give_nothing(tmp_path: Path, data: bytes) -> None:
    found, ledger = values_of(tmp_path, "a.json", data)
    assert found == [] and ledger.quarantined == []


def test_csv(tmp_path: Path) -> None:
    data = ('text,label\n"two\nlines, ""quoted""",1\n\nshort\n' + "好,2\n").encode() + b"bad \xff,3\n" + b'"open'
    found, ledger = values_of(tmp_path, "a.csv", data)
    assert found == [("a.csv:2", {"text": 'two\nlines, "quoted"', "label": "1"}),
                     ("a.csv:6", {"text": "好", "label": "2"})]
    assert [item.where for item in ledger.quarantined] == ["a.csv:5", "a.csv:7", "a.csv:8"]


def test_rows_are_objects_only(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n[1]\n"x"\ntrue\n3\nnull\n')
    ledger = Ledger()
    assert list(read_rows(path, Gate("read:a", ledger))) == [("a.jsonl:1", {"a": 1})]
    assert [item.reason for item in ledger.quarantined] == [
        "not an object but a list", "not an object but a string", "not an object but a truth value",
        "not an object but a number", "not an object but nothing"]
    ledger.check()


def test_too_many_refusals_and_strict(tmp_path: Path) -> None:
    ledger = Ledger()
    gate = Gate("read:a.jsonl", ledger, max_refused=0.2)
    gate.take(rows=19)
    for number in range(10):
        gate.refuse(f"a.jsonl:{number}", "bad")
    gate.finish()  # fewer than 20 rows
    gate.take(rows=1)
    with pytest.raises(DataError, match=r"10 of 20 rows.*20%[^$]*a.jsonl:0: bad[^$]*a.jsonl:2: bad"):
        gate.finish()
    with pytest.raises(DataError, match=r"a.jsonl:2"):
        values_of(tmp_path, "a.jsonl", b'{"a": 1}\n{oops\n', strict=True)


MARKS = [b"{", b"}", b"[", b"]", b",", b"\n", b"\r\n", b'"', b"\xff", b"\xef\xbb\xbf"]
PIECES = st.one_of(
    st.binary(max_size=30), st.sampled_from(MARKS),
    st.dictionaries(st.text(max_size=4), st.one_of(st.text(max_size=8), st.integers(), st.none()), max_size=3).map(
        lambda row: json.dumps(row).encode() + b"\n"))


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(PIECES, max_size=12), suffix=st.sampled_from(["json", "jsonl", "csv"]))
def test_every_station_balances_on_random_dirt(tmp_path_factory, pieces: list[bytes], suffix: str) -> None:
    values_of(tmp_path_factory.getbasetemp(), f"dirt.{suffix}", b"".join(pieces))
