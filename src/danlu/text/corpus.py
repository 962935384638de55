"""The corpus on disk: shards `train-00000.parquet`, … and `heldout-00000.parquet`, …, one row a document.

Columns: text, source, category, id, language as it was told when cleaning, and what was measured then: chars, han_ratio,
symbol_ratio (of the characters that are not blank), language_score and perplexity, null where no model told the language
and none of good text was asked. The bytes depend on the documents alone: row groups have a fixed number of rows and the
compression a fixed level.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from danlu.core.errors import DataError
from danlu.core.records import Document

SPLITS = ("train", "heldout")
COLUMNS = ("text", "source", "category", "id", "language")
QUALITY = ("chars", "han_ratio", "symbol_ratio", "language_score", "perplexity")
SCHEMA = pa.schema([*(pa.field(name, pa.large_string(), nullable=False) for name in COLUMNS),
                    *(pa.field(name, pa.float64()) for name in QUALITY)])
ROW_GROUP = 1024  # documents
ROW_GROUP_BYTES = 32 << 20  # of text, so that large documents do not pile up in memory
ZSTD_LEVEL, SPOOL_LEVEL = 9, 1  # of what stays, and of what is read once more and removed


@dataclass(frozen=True, slots=True)
class Row:
    """A document with its language and what was measured of it, by the names of QUALITY."""

    document: Document
    language: str = "other"
    quality: Mapping[str, float | None] = field(default_factory=dict)


class CorpusWriter:
    """Writes Rows to one file; a context manager that holds at most one row group in memory."""

    def __init__(self, path: Path, level: int = ZSTD_LEVEL) -> None:
        self.writer = pq.ParquetWriter(path, SCHEMA, compression="zstd", compression_level=level)
        self.pending: list[Row] = []
        self.bytes = 0

    def write(self, row: Row) -> None:
        """Adds one document."""
        self.pending.append(row)
        self.bytes += row.document.num_bytes
        if len(self.pending) >= ROW_GROUP or self.bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self.pending:
            columns = zip(*((row.document.text, row.document.source, row.document.category, row.document.id, row.language,
                             *(row.quality.get(name) for name in QUALITY)) for row in self.pending), strict=True)
            arrays = [pa.array(values, kind.type) for values, kind in zip(columns, SCHEMA, strict=True)]
            self.writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA))
            self.pending, self.bytes = [], 0

    def __enter__(self) -> "CorpusWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is None:
            self._flush()
        self.writer.close()


def shard_path(folder: Path, split: str, number: int) -> Path:
    """Where the shard of that number is, from 0."""
    return folder / f"{split}-{number:05}.parquet"


def read_corpus(folder: Path, split: Literal["train", "heldout"]) -> Iterator[Document]:
    """The documents of one split, in their order. Raises DataError where shards are missing or damaged."""
    assert split in SPLITS, split
    shards = sorted(folder.glob(f"{split}-*.parquet"))
    if not shards or shards[-1] != shard_path(folder, split, len(shards) - 1):
        raise DataError("is missing: the folder holds no whole corpus", where=str(shard_path(folder, split, len(shards))))
    for shard in shards:
        yield from (row.document for row in read_shard(shard))


def read_shard(path: Path) -> Iterator[Row]:
    """The rows of one file that a CorpusWriter wrote."""
    try:
        with pq.ParquetFile(path, buffer_size=1 << 20) as file:
            measured = [name for name in QUALITY if name in file.schema_arrow.names]  # earlier corpora have fewer
            for batch in file.iter_batches(batch_size=256, columns=[*COLUMNS, *measured]):
                for text, source, category, id, language, *quality in zip(
                        *(batch.column(name).to_pylist() for name in (*COLUMNS, *measured)), strict=True):
                    yield Row(Document(text, source, id, category), language,
                              {**dict.fromkeys(QUALITY), **dict(zip(measured, quality, strict=True))})
    except FileNotFoundError:
        raise DataError("is missing: the folder holds no corpus", where=str(path)) from None
    except pa.ArrowException as error:
        raise DataError(f"is damaged: {error}", where=str(path)) from error
