"""Examples on disk: flat arrays that training maps into memory, so that opening is instant and seeking free.

    tokens.bin      every segment after the other: stem, branch, branch, stem, branch, …   (uint16 or uint32)
    weights.bin     one weight per token, 0 in stems                                       (uint8, or float32)
    segments.bin    where each segment begins, and the end                                 (int64)
    examples.bin    which segment each example begins with, and the end                    (int64)
    labels.bin      source and category of each example, as indices                        (uint32 [n, 2])
    targets.bin     learned tokens of each example                                         (uint32)
    column_X.bin    per-token columns such as reference log-probabilities                  (float32)
    ids.txt         the provenance of each example, one line each
    ids_ends.bin    where each of these lines ends, in bytes                               (int64)
    store.json      dtypes, counts, names of sources, categories and columns

The token dtype follows from the vocabulary and every write asserts that it fits; sizes are checked at opening.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from danlu.core.errors import DataError
from danlu.core.examples import Branch, Example


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """What was written."""

    num_examples: int
    num_tokens: int
    num_targets: int


class _Writer:
    """Appends to the store's files and remembers counts only: its memory does not grow with the examples."""

    def __init__(self, folder: Path, vocab_size: int, corrupted: bool) -> None:
        self.folder, self.corrupted = folder, corrupted
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.vocab_size = vocab_size
        self.num_tokens = self.num_segments = self.num_examples = self.targets = self.ids_end = 0
        self.sources: dict[str, int] = {}
        self.categories: dict[str, int] = {}
        self.columns: set[str] | None = None
        self.plain_weights = True  # only 0 and 1 so far: one byte each is enough

    def write(self, examples: Iterable[Example]) -> None:
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(self.folder / name, "wb")) for name in (
                "tokens.bin", "weights.tmp", "segments.bin", "examples.bin", "labels.bin", "targets.bin", "ids.txt",
                "ids_ends.bin")}
            # [0] is the end of nothing: the list of starts plus the end, which is what lookups need.
            files["segments.bin"].write(_int64(0))
            files["examples.bin"].write(_int64(0))
            for example in examples:
                self._check(example)
                self._write_tokens(example, files)
                self._write_columns(example)
                self._write_entry(example, files)

    def _write_tokens(self, example: Example, files: Mapping[str, BinaryIO]) -> None:
        nothing = np.zeros(len(example.stem), np.float32)
        for segment, weight in [(example.stem, nothing), *((b.tokens, b.weights) for b in example.branches)]:
            files["tokens.bin"].write(segment.astype(self.dtype).tobytes())
            files["weights.tmp"].write(weight.tobytes())
            self.plain_weights = self.plain_weights and bool(((weight == 0) | (weight == 1)).all())
            self.num_tokens += len(segment)
            self.num_segments += 1
            files["segments.bin"].write(_int64(self.num_tokens))

    def _write_entry(self, example: Example, files: Mapping[str, BinaryIO]) -> None:
        self.num_examples += 1
        targets = example.num_weighted if self.corrupted else example.num_targets
        self.targets += targets
        labels = (self.sources.setdefault(example.source, len(self.sources)),
                  self.categories.setdefault(example.category, len(self.categories)))
        line = (" ".join(example.id.splitlines()) + "\n").encode()
        self.ids_end += len(line)
        files["examples.bin"].write(_int64(self.num_segments))
        files["labels.bin"].write(np.array(labels, np.uint32).tobytes())
        files["targets.bin"].write(np.uint32(targets).tobytes())
        files["ids.txt"].write(line)
        files["ids_ends.bin"].write(_int64(self.ids_end))

    def _check(self, example: Example) -> None:
        for segment in (example.stem, *(branch.tokens for branch in example.branches)):
            if len(segment):
                assert int(segment.min()) >= 0 and int(segment.max()) < self.vocab_size, "token outside the vocabulary"
        names = set(example.branches[0].columns)
        self.columns = names if self.columns is None else self.columns
        assert all(set(branch.columns) == self.columns for branch in example.branches), "the same columns everywhere"

    def _write_columns(self, example: Example) -> None:
        for name in self.columns or ():
            with open(self.folder / f"column_{name}.bin", "ab") as file:
                file.write(np.zeros(len(example.stem), np.float32).tobytes())
                for branch in example.branches:
                    file.write(branch.columns[name].tobytes())

    def finish(self) -> StoreSummary:
        folder = self.folder
        weights = folder / "weights.tmp"
        if self.plain_weights:
            with open(folder / "weights.bin", "wb") as out, open(weights, "rb") as file:
                while block := file.read(1 << 22):
                    out.write(np.frombuffer(block, np.float32).astype(np.uint8).tobytes())
            weights.unlink()
        else:
            weights.rename(folder / "weights.bin")
        meta = {"tokens": self.dtype.name, "weights": "uint8" if self.plain_weights else "float32",
                "vocab_size": self.vocab_size, "num_tokens": self.num_tokens, "num_segments": self.num_segments,
                "num_examples": self.num_examples, "num_targets": self.targets, "sources": list(self.sources),
                "categories": list(self.categories), "columns": sorted(self.columns or ())}
        (folder / "store.json").write_text(json.dumps(meta, ensure_ascii=False, indent=1), encoding="utf-8")
        return StoreSummary(self.num_examples, self.num_tokens, self.targets)


def _int64(number: int) -> bytes:
    return np.int64(number).tobytes()


def write_examples(folder: Path, examples: Iterable[Example], vocab_size: int, *, corrupted: bool = False) -> StoreSummary:
    """Writes the examples into a folder that holds no store yet; ids must be below `vocab_size`.

    corrupted  they are corrupted when they are drawn, and every token with a weight may have to be mended: the first, too
    """
    writer = _Writer(folder, vocab_size, corrupted)
    writer.write(examples)
    return writer.finish()


class ExampleStore:
    """A folder of Examples, opened for reading.

    lengths  int64 [n]: tokens of each example with its stem counted once, as a packed forward pass computes them
    targets  uint32 [n]: learned tokens of each example
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        meta = self.meta
        self._tokens = self._open("tokens.bin", meta["tokens"], meta["num_tokens"])
        self._weights = self._open("weights.bin", meta["weights"], meta["num_tokens"])
        self._segments = self._open("segments.bin", "int64", meta["num_segments"] + 1)
        self._examples = self._open("examples.bin", "int64", meta["num_examples"] + 1)
        self._labels = self._open("labels.bin", "uint32", 2 * meta["num_examples"]).reshape(-1, 2)
        self.targets = self._open("targets.bin", "uint32", meta["num_examples"])
        self._columns = {name: self._open(f"column_{name}.bin", "float32", meta["num_tokens"])
                         for name in meta["columns"]}
        self._ids, self._ids_ends = self._open_ids()
        self.lengths: np.ndarray = np.diff(np.asarray(self._segments)[np.asarray(self._examples)])

    def _open(self, name: str, dtype: str, count: int) -> np.ndarray:
        path = self.folder / name
        size = path.stat().st_size
        expected = count * np.dtype(dtype).itemsize
        if size != expected:
            raise DataError(f"has {size} bytes instead of {expected}", where=str(path))
        return np.memmap(path, dtype=dtype, mode="r", shape=(count,)) if count else np.zeros(0, dtype)

    def with_column(self, name: str, path: Path) -> "ExampleStore":
        """The same examples with a column from a file of its own: float32, one value per token of the store."""
        other = copy(self)
        column = self._open(str(path.absolute()), "float32", self.num_tokens)
        other._columns = {**self._columns, name: column}
        return other

    def column(self, name: str) -> np.ndarray:
        """A column of all tokens, float32 [num_tokens], stems included."""
        return self._columns[name]

    def place(self, index: int) -> list[slice]:
        """Where the stem and the branches of an example lie among the tokens of the store."""
        return [self._segment(segment) for segment in range(int(self._examples[index]), int(self._examples[index + 1]))]

    def _open_ids(self) -> tuple[np.ndarray, np.ndarray]:
        ends = self._open("ids_ends.bin", "int64", len(self))
        return self._open("ids.txt", "uint8", int(ends[-1]) if len(self) else 0), ends

    def __len__(self) -> int:
        return self.meta["num_examples"]

    @property
    def num_tokens(self) -> int:
        return self.meta["num_tokens"]

    @property
    def num_targets(self) -> int:
        return self.meta["num_targets"]

    @property
    def vocab_size(self) -> int:
        return self.meta["vocab_size"]

    @property
    def categories(self) -> list[str]:
        return self.meta["categories"]

    def labels(self, label: Literal["category", "source"]) -> list[str]:
        """The categories or sources that there are."""
        return self.meta["categories" if label == "category" else "sources"]

    def label_indices(self, label: Literal["category", "source"]) -> np.ndarray:
        """Which of `labels` each example has, uint32 [n]."""
        return self._labels[:, int(label == "category")]

    def id(self, index: int) -> str:
        """Where an example came from, as the record said."""
        index = range(len(self))[index]  # so that -1 is the last, and too large an index an IndexError
        start = int(self._ids_ends[index - 1]) if index else 0
        return self._ids[start:int(self._ids_ends[index]) - 1].tobytes().decode("utf-8")

    def _segment(self, index: int) -> slice:
        return slice(int(self._segments[index]), int(self._segments[index + 1]))

    def __getitem__(self, index: int) -> Example:
        first, last = int(self._examples[index]), int(self._examples[index + 1])
        branches = []
        for segment in range(first + 1, last):
            where = self._segment(segment)
            branches.append(Branch(self._tokens[where].astype(np.int32), self._weights[where].astype(np.float32),
                                   {name: np.array(column[where]) for name, column in self._columns.items()}))
        source, category = self._labels[index]
        return Example(self._tokens[self._segment(first)].astype(np.int32), tuple(branches),
                       self.meta["sources"][source], self.meta["categories"][category], self.id(index))

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))
