"""Compressed files that expand too far: what came before stays, the rest is one refused row."""

import bz2
import gzip
import json
from pathlib import Path

import pytest

from danlu.core.ledger import Ledger
from danlu.text import expansion
from danlu.text.expansion import TOO_LARGE, limit_of
from danlu.text.read import SourceConfig, read_documents
from danlu.text.rows import read_rows


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expansion, "FREE_BYTES", 100_000)
    monkeypatch.setattr(expansion, "MAX_RATIO", 50)


def test_how_far_a_file_may_expand() -> None:
    assert limit_of(1000) == 150_000 and limit_of(0) == 100_000
    assert limit_of(1000, 300_000) == 150_000 and limit_of(1000, 10) == 10


@pytest.mark.parametrize("pack", [gzip, bz2], ids=["gz", "bz2"])
def test_json_lines_before_the_bound_are_read(tmp_path: Path, ledger: Ledger, pack) -> None:
    row = json.dumps({"text": "abc " * 1000}) + "\n"
    path = tmp_path / f"a.jsonl.{pack.__name__.replace('gzip', 'gz')}"
    path.write_bytes(pack.compress((row * 500).encode()))
    limit = 100_000 + 50 * path.stat().st_size
    documents = list(read_documents(SourceConfig(path=path.name), tmp_path, ledger))
    ledger.check()
    assert limit // len(row) - 20 <= len(documents) <= limit // len(row) < 500, "up to the last buffer"
    assert {document.text for document in documents} == {"abc " * 1000}
    station = ledger.station(f"read:{path.name}")
    assert station.dropped[TOO_LARGE].rows == 1
    assert ledger.quarantined[0].where == f"{path.name}:{len(documents) + 1}"
    assert f"more than {limit:,} bytes" in ledger.quarantined[0].reason
    again = Ledger()
    assert list(read_documents(SourceConfig(path=path.name), tmp_path, again)) == documents
    assert again.to_json() == ledger.to_json()


@pytest.mark.parametrize("name,content", [
    ("a.txt.gz", b"line\n" * 200_000), ("a.json.gz", b"[" + b'{"text": "x"},\n' * 70_000),
    ("a.json.gz", b"[" + b" " * 1_000_000), ("a.csv.gz", b"text,n\n" + b'a,1\n' * 250_000),
    ("a.csv.gz", b'text,n\n"' + b'a,1\n' * 250_000), ("a.tsv.gz", b"text\tnote\n" + b"a\tb\n" * 250_000),
    ("a.json.gz", b'{"a":\n' + b"\n" * 1_000_000), ("a.jsonl.gz", b"\n" * 1_000_000),
    ("a.jsonl.gz", b"\0" * 1_000_000), ("a.jsonl.gz", b'{"text": "' + b"y" * 1_000_000)])
def test_every_reader_gives_up_and_balances(tmp_path: Path, ledger: Ledger, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(gzip.compress(content))
    documents = list(read_documents(SourceConfig(path=name, max_refused=1), tmp_path, ledger))
    ledger.check()
    assert ledger.station(f"read:{name}").dropped[TOO_LARGE].rows == 1
    assert sum(document.num_bytes for document in documents) <= limit_of((tmp_path / name).stat().st_size)


def test_the_bound_is_far_from_real_files(tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    rows = "".join(json.dumps({"instruction": f"What is {n} + {n}?", "output": str(2 * n)}) + "\n" for n in range(20_000))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(rows.encode()))
    assert sum(1 for _ in read_rows(path, expansion_gate(ledger))) == 20_000


def expansion_gate(ledger: Ledger):
    from danlu.text.lines import Gate
    return Gate("read:a", ledger)
