"""Parquet, Arrow and compressed files: the same rows as plain JSON lines, or an error with the file's name."""

import bz2
import gzip
import json
import lzma
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from danlu.core.errors import DataError
from danlu.core.ledger import Ledger
from danlu.core.records import Message
from danlu.text.files import Located, locate, suffix_of
from danlu.text.formats import read_dialogues
from danlu.text.read import SourceConfig, read_documents
from danlu.text.rows import Gate, read_lines, read_values

ROWS = [{"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "好"}], "n": n}
        for n in range(600)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
PACK = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress,
        ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True)}


def said(folder: Path, name: str) -> tuple[list[tuple[Message, ...]], Ledger]:
    ledger = Ledger()
    found = [dialogue.messages for dialogue in read_dialogues(name, folder, ledger)]
    ledger.check()
    return found, ledger


EXPECTED = [(Message("user", f"q{n}"), Message("assistant", "好")) for n in range(600)]


def write(path: Path) -> None:
    """The rows in a file of the kind that its name says."""
    table = pa.Table.from_pylist(ROWS)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=100)
    elif path.name.startswith("stream"):
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)


@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
def test_tables_of_arrow(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    found, ledger = said(tmp_path, name)
    assert found == EXPECTED
    station = ledger.station(f"read:{name}")
    assert station.came.rows == 600 and station.notes["not read: n"] == 600
    ids = [value.where for value in read_values(Located(tmp_path / name, name), Gate("x", Ledger()))]
    assert ids == [f"{name}:{number}" for number in range(1, 601)]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
@pytest.mark.parametrize("data", [b"", b"nonsense" * 100, b"ARROW1\0\0" + b"\1" * 50])
def test_a_damaged_table_is_an_error_with_its_name(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=name):
        said(tmp_path, name)


def test_a_value_that_json_does_not_know_is_refused_not_fatal(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": [date(2024, 1, 2)], "response": ["a"]}), tmp_path / "a.parquet")
    found, ledger = said(tmp_path, "a.parquet")
    assert found == [] and ledger.quarantined[0].reason == "wrong type: “prompt” is not a text but date"


def test_a_text_of_a_table_that_is_not_utf8_costs_its_own_row(tmp_path: Path) -> None:
    texts = [b"q%d" % n for n in range(300)]
    texts[77] = b"bad \xff"
    prompts = pa.array(texts, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"prompt": prompts, "response": ["a"] * 300}), tmp_path / "a.parquet")
    found, ledger = said(tmp_path, "a.parquet")
    assert [messages[0].content for messages in found] == [f"q{n}" for n in range(300) if n != 77]
    assert [(item.where, item.reason) for item in ledger.quarantined] == [("a.parquet:78", "not UTF-8")]


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.yml"])
def test_compressed_files_are_read_as_what_they_hold(tmp_path: Path, name: str, packed: str) -> None:
    data = {"a.jsonl": LINES, "a.json": json.dumps(ROWS).encode(), "a.csv": b"prompt,response\nq,a\n",
            "a.tsv": b"prompt\tresponse\nq\ta\n", "a.yml": b"conversations:\n- [q, a]\n"}[name]
    (tmp_path / (name + packed)).write_bytes(PACK[packed](data))
    found, ledger = said(tmp_path, name + packed)
    assert found == (EXPECTED if name.startswith("a.json") else [(Message("user", "q"), Message("assistant", "a"))])
    assert ledger.station(f"read:{name}{packed}").came.bytes == len(data)


def test_two_compressed_parts_in_one_file(tmp_path: Path) -> None:
    half = LINES.index(b"\n", len(LINES) // 2) + 1
    for packed, pack in PACK.items():
        (tmp_path / f"a.jsonl{packed}").write_bytes(pack(LINES[:half]) + pack(LINES[half:]))
        assert said(tmp_path, f"a.jsonl{packed}")[0] == EXPECTED


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_cut_compressed_file_is_an_error_not_a_shorter_one(tmp_path: Path, name: str, packed: str, kept: float) -> None:
    data = PACK[packed](LINES if name == "a.jsonl" else json.dumps(ROWS).encode())
    (tmp_path / (name + packed)).write_bytes(data[:int(kept * len(data))] or b"\x00" * 20)
    with pytest.raises(DataError, match=rf"{name}{packed}: the compressed file is cut off or damaged"):
        said(tmp_path, name + packed)


def test_suffixes_and_folders(tmp_path: Path) -> None:
    assert [suffix_of(Path(name)) for name in ("a.JSONL", "a.jsonl.gz", "a.Json.ZST", "a.gz", "a")] == [
        ".jsonl", ".jsonl", ".json", ".gz", ""]
    for name in ("a.jsonl.gz", "b.gz", "c.txt.xz", "d.jsonl"):
        (tmp_path / name).write_bytes(b"")
    assert [item.label for item in locate(str(tmp_path), tmp_path, (".jsonl",))] == [
        f"{tmp_path}/a.jsonl.gz", f"{tmp_path}/d.jsonl"]


def test_a_corpus_is_read_from_the_same_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress("甲\n乙\n".encode()))
    (tmp_path / "b.jsonl.zst").write_bytes(PACK[".zst"](b'{"text": "one", "url": "x"}\n{"prompt": "two"}\n'))
    pq.write_table(pa.table({"text": ["three"]}), tmp_path / "c.parquet")
    ledger = Ledger()
    found = list(read_documents(SourceConfig(path=str(tmp_path)), tmp_path, ledger))
    assert [document.text for document in found] == ["甲\n乙\n", "one", "two", "three"]
    ledger.check()
    assert ledger.station(f"read:{tmp_path}").notes == {
        "read: text": 2, "read: prompt": 1, "not read: url": 1}


def test_json_lines_with_a_broken_first_line_are_still_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"messages": broken\n' + LINES)
    found, ledger = said(tmp_path, "a.jsonl")
    assert found == EXPECTED and ledger.quarantined[0].where == "a.jsonl:1"


def test_lines_of_a_compressed_file_are_streamed(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"x\n" * 10) [:-9])
    lines = read_lines(Located(tmp_path / "a.txt.gz", "a.txt.gz"), Gate("x", Ledger()))
    with pytest.raises(DataError, match=r"damaged after line \d+|damaged: "):
        list(lines)


def test_columns_that_share_a_name(tmp_path: Path) -> None:
    """The first keeps it; what is in the others is named as not read."""
    table = pa.table([["one", "two"], ["eins", "zwei"], ["uno", ""]], names=["text", "text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("text,text,text\none,eins,uno\ntwo,zwei,\n")
    (tmp_path / "a.tsv").write_text("text\ttext\ttext\none\teins\tuno\ntwo\tzwei\t\n")
    for name in ("a.parquet", "a.csv", "a.tsv"):
        ledger = Ledger()
        assert [item.text for item in read_documents(SourceConfig(path=name), tmp_path, ledger)] == ["one", "two"]
        ledger.check()
        assert ledger.station(f"read:{name}").notes == {"read: text": 2, "not read: text (2)": 2, "not read: text (3)": 1}


@pytest.mark.parametrize("header", ["id\ttext\t2020", "text\t2020", "id\ttext\tnan", "2019\t2020\ttext"])
def test_a_column_named_by_a_number(tmp_path: Path, header: str) -> None:
    cells = ["here" if name == "text" else "7" for name in header.split("\t")]
    (tmp_path / "a.tsv").write_text(header + "\n" + "\t".join(cells) + "\n")
    ledger = Ledger()
    assert [item.text for item in read_documents(SourceConfig(path="a.tsv"), tmp_path, ledger)] == ["here"]
    assert ledger.station("read:a.tsv").dropped["column names"].rows == 1
