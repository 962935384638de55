"""The corpus files."""

import hashlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from danlu.core.errors import DataError
from danlu.core.records import Document
from danlu.text import corpus
from danlu.text.corpus import CorpusWriter, Row, read_corpus, read_shard, shard_path

DOCUMENTS = [Document(f"文 {n}" * (n % 7), f"s{n % 3}", f"i{n}", "zh") for n in range(2500)]


def test_what_is_written_is_read_in_order_and_has_the_same_bytes(tmp_path: Path) -> None:
    hashes = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with CorpusWriter(tmp_path / name / "train-00000.parquet") as writer:
            for document in DOCUMENTS:
                writer.write(Row(document, "zh", {"chars": 3.0}))
        hashes.append(hashlib.sha256((tmp_path / name / "train-00000.parquet").read_bytes()).hexdigest())
        assert list(read_corpus(tmp_path / name, "train")) == DOCUMENTS
    assert hashes[0] == hashes[1]


def test_an_empty_split(tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "heldout-00000.parquet"):
        pass
    assert list(read_corpus(tmp_path, "heldout")) == []


def test_large_documents_do_not_pile_up(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(corpus, "ROW_GROUP_BYTES", 100)
    with CorpusWriter(tmp_path / "train-00000.parquet") as writer:
        for n in range(5):
            writer.write(Row(Document("x" * 90, "s", str(n))))
            assert writer.bytes < 100 + 90
    assert len(list(read_corpus(tmp_path, "train"))) == 5


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing"):
        list(read_corpus(tmp_path, "train"))
    (tmp_path / "train-00000.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="damaged"):
        list(read_corpus(tmp_path, "train"))


def test_shards_follow_each_other_and_none_may_be_missing(tmp_path: Path) -> None:
    for number in range(12):
        with CorpusWriter(shard_path(tmp_path, "train", number)) as writer:
            writer.write(Row(DOCUMENTS[number], "zh", {"chars": 1.0, "han_ratio": 0.5}))
    assert list(read_corpus(tmp_path, "train")) == DOCUMENTS[:12]
    row, = read_shard(shard_path(tmp_path, "train", 3))
    assert row.quality == {"chars": 1.0, "han_ratio": 0.5, "symbol_ratio": None, "language_score": None,
                           "perplexity": None}
    shard_path(tmp_path, "train", 4).unlink()
    with pytest.raises(DataError, match="no whole corpus"):
        list(read_corpus(tmp_path, "train"))


def test_a_corpus_of_an_earlier_version_has_fewer_columns(tmp_path: Path) -> None:
    path = shard_path(tmp_path, "train", 0)
    with CorpusWriter(path) as writer:
        writer.write(Row(DOCUMENTS[0], "zh", {"chars": 1.0, "perplexity": 9.0}))
    pq.write_table(pq.read_table(path).drop_columns(["perplexity"]), path)
    row, = read_shard(path)
    assert row.document == DOCUMENTS[0] and row.quality["chars"] == 1.0 and row.quality["perplexity"] is None
