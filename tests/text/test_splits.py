"""Splits: however a source is cut, the documents are the same."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.core.errors import DataError
from danlu.core.ledger import Ledger
from danlu.core.records import Document
from danlu.text import splits
from danlu.text.lines import Gate
from danlu.text.read import SourceConfig, read_documents
from danlu.text.splits import plan_splits, read_split

LINES = [b'{"text": "one"}', b"", b"{oops", '{"text": "二"}'.encode(), b'{"text": "' + b"x" * 90 + b'"}']


def read_by_splits(source: SourceConfig, base: Path, size: int) -> tuple[list[Document], Ledger, int]:
    """The documents of all splits, each read with a ledger of its own, and the ledgers together."""
    ledger, documents = Ledger(), []
    planned = plan_splits([source], base, size)
    for split in planned:
        own = Ledger()
        documents += read_split(split, source, Gate(f"read:{source.path}", own, source.max_refused))
        ledger.merge(Ledger.of_state(json.loads(json.dumps(own.state()))))
    ledger.check()
    return documents, ledger, len(planned)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(LINES), max_size=30),
       st.integers(1, 200), st.sampled_from([1, 7, 64, 1 << 20]), st.booleans())
def test_json_lines_in_any_pieces(tmp_path_factory, lines: list[bytes], size: int, chunk: int, ends: bool) -> None:
    folder = tmp_path_factory.mktemp("splits")
    (folder / "a.jsonl").write_bytes(b'{"text": "first"}\n' + b"\n".join(lines) + (b"\n" if ends else b""))
    source, ledger = SourceConfig(path="a.jsonl", max_refused=1), Ledger()
    expected = list(read_documents(source, folder, ledger))
    original, splits.CHUNK = splits.CHUNK, chunk
    try:
        documents, merged, _ = read_by_splits(source, folder, size)
    finally:
        splits.CHUNK = original
    assert documents == expected
    assert merged.to_json() == ledger.to_json() and merged.quarantined == ledger.quarantined


@pytest.mark.parametrize("size", [1, 700, 3000, 1 << 20])
def test_parquet_at_its_row_groups(tmp_path: Path, size: int) -> None:
    rows = [f"row {n} " + "x" * (n % 7) for n in range(100)] + [None]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=9)
    source, ledger = SourceConfig(path="a.parquet", max_refused=1), Ledger()
    expected = list(read_documents(source, tmp_path, ledger))
    documents, merged, number = read_by_splits(source, tmp_path, size)
    assert documents == expected and documents[99].id == "a.parquet:100"
    assert merged.to_json() == ledger.to_json() and merged.quarantined == ledger.quarantined
    assert number == {1: 12, 1 << 20: 1}.get(size, number) and (size != 700 or 1 < number < 12)


@pytest.mark.parametrize("size", [1, 500, 1 << 20])
def test_archives_and_dumps_in_any_splits(tmp_path: Path, size: int) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    record = b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Type: text/plain\r\nContent-Length: 4\r\n\r\ntext\r\n\r\n"
    (folder / "a.wet.gz").write_bytes(gzip.compress(record) * 3 + gzip.compress(b"garbage\n"))
    (folder / "b.xml").write_text("<mediawiki>" + "".join(
        f"<page><title>t{n}</title><ns>{n % 2}</ns><revision><text>{{{{x}}}} text {n}</text></revision></page>"
        for n in range(9)))
    with tarfile.open(folder / "c.tar.gz", "w:gz") as archive:
        for n in range(5):
            info = tarfile.TarInfo(f"{n}.jsonl")
            info.size = len(rows := f'{{"text": "member {n}"}}\n{{oops\n'.encode())
            archive.addfile(info, io.BytesIO(rows))
        link = tarfile.TarInfo("link.txt")
        link.type = tarfile.SYMTYPE
        archive.addfile(link)
    source, ledger = SourceConfig(path="in", max_refused=1), Ledger()
    expected = list(read_documents(source, tmp_path, ledger))
    documents, merged, number = read_by_splits(source, tmp_path, size)
    assert documents == expected and len(documents) == 3 + 5 + 5 and number == {1: 3, 1 << 20: 1}.get(size, number)
    assert merged.to_json() == ledger.to_json() and merged.quarantined == ledger.quarantined
    assert len(merged.quarantined) == 1 + 1 + 6


def test_an_empty_or_damaged_large_parquet_file(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    assert read_by_splits(SourceConfig(path="a.parquet"), tmp_path, 1)[0] == []
    (tmp_path / "b.parquet").write_bytes(b"PAR1" * 9)
    with pytest.raises(DataError, match=r"b\.parquet: is no Parquet file"):
        plan_splits([SourceConfig(path="b.parquet")], tmp_path, 1)


def test_what_is_cut_and_what_is_not(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(100)).encode()
    (tmp_path / "a.jsonl").write_bytes(rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows))
    (tmp_path / "c.txt").write_bytes(b"one line\n" * 100)
    (tmp_path / "d.txt").write_bytes("中文的一行\n".encode("gb18030") * 100)
    (tmp_path / "e.jsonl").write_text(json.dumps([{"text": "a list", "n": n} for n in range(50)], indent=1))
    numbers = {}
    for name in ("a.jsonl", "b.jsonl.gz", "c.txt", "d.txt", "e.jsonl"):
        for document in ("file", "line"):
            source = SourceConfig(path=name, document=document)
            documents, _, numbers[name, document] = read_by_splits(source, tmp_path, 300)
            assert documents == list(read_documents(source, tmp_path, Ledger()))
    assert numbers["a.jsonl", "file"] == 7 and numbers["c.txt", "line"] == 3
    assert {name for (name, document), number in numbers.items() if number > 1 and document == "file"} == {"a.jsonl"}
    assert numbers["b.jsonl.gz", "line"] == numbers["d.txt", "line"] == numbers["e.jsonl", "line"] == 1


def test_small_files_go_together_and_counts_are_not_split(tmp_path: Path) -> None:
    for n in range(10):
        (tmp_path / f"{n}.jsonl").write_text('{"text": "x"}\n' * 10)
    documents, _, number = read_by_splits(SourceConfig(path=str(tmp_path)), tmp_path, 450)
    assert number == 4 and len(documents) == 100
    documents, _, number = read_by_splits(SourceConfig(path=f"{tmp_path}#23"), tmp_path, 450)
    assert number == 1 and len(documents) == 23


def test_packages_are_split_by_name(package: Path) -> None:
    source = SourceConfig(path="docstrings:tinypackage,json,email", group="package")
    documents, _, number = read_by_splits(source, package, 1)
    assert number == 3
    assert documents == list(read_documents(source, package, Ledger()))


@pytest.mark.parametrize("many", [3, 12_000])
def test_ledgers_of_parts_are_the_ledger_of_the_whole(many: int) -> None:
    whole, parts = Ledger(), Ledger()
    for part in range(3):
        own = Ledger()
        for ledger in (whole, own):
            ledger.station("read").take(rows=many, bytes=7)
            ledger.station("read").drop("bad", rows=many, bytes=7)
            ledger.station("read").note("seen", 2)
            for n in range(many):
                ledger.quarantine(f"{part}:{n}", "bad" if n % 2 else "worse")
        parts.merge(Ledger.of_state(own.state()))
    assert parts.to_json() == whole.to_json() and parts.quarantined == whole.quarantined
