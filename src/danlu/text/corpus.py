"""The corpus on disk: `train.parquet` and `heldout.parquet`, columns text, source, category and id.

The bytes depend on the documents alone: row groups have a fixed number of rows and the compression a fixed level.
"""

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from danlu.core.errors import DataError
from danlu.core.records import Document

SPLITS = ("train", "heldout")
COLUMNS = ("text", "source", "category", "id")
SCHEMA = pa.schema([pa.field(name, pa.large_string(), nullable=False) for name in COLUMNS])
ROW_GROUP = 1024  # documents
ROW_GROUP_BYTES = 32 << 20  # of text, so that large documents do not pile up in memory
ZSTD_LEVEL = 9


class CorpusWriter:
    """Writes Documents to one file; a context manager that holds at most one row group in memory."""

    def __init__(self, path: Path) -> None:
        self.writer = pq.ParquetWriter(path, SCHEMA, compression="zstd", compression_level=ZSTD_LEVEL)
        self.pending: list[Document] = []
        self.bytes = 0

    def write(self, document: Document) -> None:
        """Adds one document."""
        self.pending.append(document)
        self.bytes += len(document.text.encode())
        if len(self.pending) >= ROW_GROUP or self.bytes >= ROW_GROUP_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self.pending:
            columns = [[getattr(document, name) for document in self.pending] for name in COLUMNS]
            self.writer.write_table(pa.Table.from_arrays([pa.array(column, pa.large_string()) for column in columns],
                                                         schema=SCHEMA))
            self.pending, self.bytes = [], 0

    def __enter__(self) -> "CorpusWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is None:
            self._flush()
        self.writer.close()


def read_corpus(folder: Path, split: Literal["train", "heldout"]) -> Iterator[Document]:
    """The documents of one split, in their order. Raises DataError where the file is missing or damaged."""
    assert split in SPLITS, split
    yield from read_parquet(folder / f"{split}.parquet")


def read_parquet(path: Path) -> Iterator[Document]:
    """The documents of one file that a CorpusWriter wrote."""
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256, columns=list(COLUMNS)):
                for text, source, category, id in zip(*(batch.column(name).to_pylist() for name in COLUMNS),
                                                      strict=True):
                    yield Document(text, source, id, category)
    except FileNotFoundError:
        raise DataError("is missing: the folder holds no corpus", where=str(path)) from None
    except pa.ArrowException as error:
        raise DataError(f"is damaged: {error}", where=str(path)) from error
