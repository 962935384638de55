"""The last part of a corpus's road: what stays is cut into shards, and each is written by itself, by any process.

Shards are cut by the bytes of the documents that stay, in the corpus's order, so they are the same whoever writes them.

    jobs = plan_shards(spool, stays, held, sizes, paragraphs, work)
    write_shard(jobs[0])
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from danlu.core.artifact import write_atomic
from danlu.text.clean import measured
from danlu.text.corpus import SPLITS, CorpusWriter, Row, read_shard, shard_path
from danlu.text.dedup import keep_paragraphs
from danlu.text.spool import MARK, Spool, path_of

SHARD_BYTES = 128 << 20  # of text
GOES = -1


@dataclass(frozen=True, slots=True)
class ShardJob:
    """One shard. `parts`: (number of the spool's split, its first document, one behind its last, its first paragraph)."""

    split: str
    number: int
    spool: Path
    work: Path
    parts: tuple[tuple[int, int, int, int], ...]
    paragraphs: bool

    @property
    def code(self) -> int:
        """The shard's number in the file `shards`."""
        return 2 * self.number + SPLITS.index(self.split)


def plan_shards(spool: Spool, stays: np.ndarray, held: np.ndarray, sizes: np.ndarray, paragraphs: np.ndarray | None,
                work: Path) -> list[ShardJob]:
    """The shards of both splits, at least one of each, possibly empty; which document is where goes into files beside the
    spool."""
    codes = np.full(len(spool), GOES, np.int32)
    firsts = np.zeros(len(spool) + 1, np.int64)
    if paragraphs is not None:
        np.cumsum(spool.marks["paragraphs"], out=firsts[1:])
        write_atomic(spool.folder / "paragraphs", paragraphs.tobytes())
    jobs = []
    for place, split in enumerate(SPLITS):
        own = np.flatnonzero(stays & (held == bool(place)))
        numbers = (np.cumsum(sizes[own]) - sizes[own]) // SHARD_BYTES
        _, numbers = np.unique(numbers, return_inverse=True)  # a document that is larger than a shard leaves a gap
        codes[own] = 2 * numbers + place
        for number in range(int(numbers.max(initial=0)) + 1):
            inside = own[numbers == number]
            parts = sorted(set((np.searchsorted(spool.begins, inside, "right") - 1).tolist()))
            jobs.append(ShardJob(split, number, spool.folder, work, tuple(
                (part, int(spool.begins[part]), int(spool.begins[part + 1]), int(firsts[spool.begins[part]]))
                for part in parts), paragraphs is not None))
    write_atomic(spool.folder / "shards", codes.tobytes())
    return jobs


def write_shard(job: ShardJob) -> None:
    """Writes one shard from the spool."""
    with CorpusWriter(shard_path(job.work, job.split, job.number)) as writer:
        for part, begin, end, first in job.parts:
            codes = np.fromfile(job.spool / "shards", np.int32, end - begin, offset=4 * begin)
            rows = read_shard(path_of(job.spool, part, "parquet"))
            for code, left, row in zip(codes.tolist(), _paragraphs(job, part, first, len(codes)), rows, strict=True):
                if code == job.code:
                    writer.write(row if left is None else _shortened(row, left))


def _shortened(row: Row, left: list[bool]) -> Row:
    text = keep_paragraphs(row.document.text, left)
    return replace(row, document=replace(row.document, text=text), quality={**row.quality, **measured(text)})


def _paragraphs(job: ShardJob, part: int, first: int, num: int) -> list[list[bool] | None]:
    """For each document of one of the spool's splits which of its paragraphs stay; None where all do."""
    if not job.paragraphs:
        return [None] * num
    counts = np.fromfile(path_of(job.spool, part, "marks"), MARK)["paragraphs"]
    stays = np.fromfile(job.spool / "paragraphs", np.bool_, int(counts.sum()), offset=first)
    return [None if piece.all() else piece.tolist() for piece in np.split(stays, np.cumsum(counts)[:-1])]
