"""Text to ids with exact character offsets, and nothing that the caller did not ask for.

`Codec` keeps private copies of a tokenizer's Rust backend, one that reads special tokens in the text and one that reads
them as ordinary text. The copies have no post-processor (it would add a BOS, and byte-level ones cut the space off the
offsets), no truncation and no padding: special tokens have one owner, the template or the encoder of documents.

Running text is encoded without offsets. Much of it is cut where that changes no id (`danlu.tokens.cuts`), and the ids of
the parts are remembered: most words of a text have been read before.

    codec = Codec(tokenizer)
    [row] = codec.encode([[Segment(0, "<|user|>hi<|end|>")]])
    row.ids, row.offsets          # int32 [n], int64 [n, 2]
    [ids] = codec.encode_plain(["running text"])

Much text is encoded by several processes (`spread`), each with a codec of its own.
"""

import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby, islice, pairwise, tee
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer, processors

from danlu.core.artifact import digest
from danlu.core.errors import ConfigError
from danlu.core.processes import in_order
from danlu.tokens.cuts import Cuts, cuts_of

CHUNK = 1 << 16  # characters of running text that are encoded at once
MUCH = 1 << 16  # characters in one call from which on parts are remembered
GROUP = 1 << 16  # characters that are cut at once: few enough for the cache
LONGEST = 64  # characters of a part that is remembered
LINES = 64  # parts that are encoded as one text
MOST = 1 << 19  # parts that are remembered, in some 100 MB
LARGE = 6_000_000  # characters from which on processes pay: in the time in which they start, this one reads 2 million
FEW_BATCHES = 64  # that wait for the answer to whether there are so many
HELD = 4_000_000  # characters for each process that are read and not encoded yet; of one longer text, that one
MOST_WORKERS = 16
PROBE = "The 3 foxes’ den, 12:30 —\n\n  人工智能，1998年。\tdef f(x): return x + 1  Ünïcode…"
Batch = TypeVar("Batch")
Rows = TypeVar("Rows", list[str], list[tuple[str, str]])
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a text that is tokenised by itself; `plain` reads special tokens in it as ordinary text."""

    start: int
    text: str
    plain: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """ids int32 [n]; offsets int64 [n, 2], characters of the whole text, start and end of each token."""

    ids: np.ndarray
    offsets: np.ndarray


def backend_of(tokenizer: Any) -> Tokenizer:
    """The Rust tokenizer behind a transformers tokenizer, or the Rust tokenizer itself. Raises ConfigError."""
    backend = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ConfigError(f"{type(tokenizer).__name__} has no fast backend, and danlu needs one for exact offsets",
                          hint="Use a checkpoint with a tokenizer.json.")
    return backend


def identity(tokenizer: Any) -> str:
    """A hash of all that decides which ids a record gets: the backend, the special tokens and the chat template."""
    return digest([backend_of(tokenizer).to_str(), {name: str(text) for name, text in tokenizer.special_tokens_map.items()},
                   tokenizer.chat_template])


def num_ids(tokenizer: Any) -> int:
    """One more than the highest id. Ids may have holes, so this can be more than the number of entries."""
    return max(backend_of(tokenizer).get_vocab().values()) + 1


def vocabulary_of(tokenizer: Any) -> dict[str, int]:
    """Every token's id."""
    return backend_of(tokenizer).get_vocab()


class Codec:
    """Encodes and decodes with private copies of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._source = backend_of(tokenizer).to_str()
        self.special = self._copy(plain=False)
        added = sorted(self.special.get_added_tokens_decoder().values(), key=lambda x: (-len(x.content), x.content))
        self.added_texts = [token.content for token in added]  # the longest first
        self._pattern = _any_of([token.content for token in added if token.special])
        self._ordinary = _any_of([token.content for token in added if not token.special])  # found in running text, too
        self._ids: dict[str, bytes] = {}  # of parts of running texts, int32
        self._tried = False  # whether cutting has been compared with not cutting

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process: what is remembered stays here, but not whether cutting does."""
        if not self._tried and self._cuts is not None:
            self._cut_or_whole([PROBE])
        return _again, (self._source, self._cuts is None)

    def _copy(self, plain: bool) -> Tokenizer:
        made = Tokenizer.from_str(self._source)
        made.post_processor = processors.Sequence([])
        made.no_truncation()
        made.no_padding()
        made.encode_special_tokens = plain
        return made

    @cached_property
    def plain(self) -> Tokenizer:
        """The copy that reads special tokens as ordinary text."""
        return self._copy(plain=True)

    @cached_property
    def can_cut(self) -> bool:
        """Whether parts that were tokenised apart decode to the whole (not where each text gets a leading space)."""
        ids = [token for text in ("x", "y") for token in self.special.encode(text, add_special_tokens=False).ids]
        return self.decode(ids) == "xy"

    @cached_property
    def _cuts(self) -> Cuts | None:
        return cuts_of(self._source) if self.can_cut else None

    def holds_special(self, text: str) -> bool:
        """Whether the text spells a special token."""
        return self._pattern is not None and self._pattern.search(text) is not None

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens included."""
        return self.special.decode([int(token) for token in ids], skip_special_tokens=False)

    def encode(self, rows: Sequence[Sequence[Segment]]) -> list[Encoded]:
        """One Encoded a row; every segment is tokenised by itself and the ids are joined. One call for many rows."""
        found: dict[bool, Any] = {}
        for plain, backend in ((False, "special"), (True, "plain")):
            texts = [segment.text for row in rows for segment in row if segment.plain is plain]
            if texts:
                encodings = getattr(self, backend).encode_batch(texts, add_special_tokens=False)
                found[plain] = iter(encodings)
        return [_join([(segment.start, next(found[segment.plain])) for segment in row]) for row in rows]

    def encode_plain(self, texts: Sequence[str]) -> list[np.ndarray]:
        """ids int32 [n] of running texts. Long texts are cut, for speed and memory, where it changes no token."""
        chunks = [list(self._chunks(text)) for text in texts]
        flat = self._encode_chunks([chunk for row in chunks for chunk in row])
        rows = [[next(flat) for _ in row] for row in chunks]
        return [np.concatenate(row) if row else np.zeros(0, np.int32) for row in rows]

    def _encode_chunks(self, chunks: Sequence[str]) -> Iterator[np.ndarray]:
        if sum(map(len, chunks)) < MUCH or self._cuts is None:
            yield from (np.array(ids, np.int32) for ids in self._encode_whole(chunks))
            return
        for uncut, run in groupby(chunks, lambda chunk: self._ordinary is not None and bool(self._ordinary.search(chunk))):
            if uncut:
                yield from (np.array(ids, np.int32) for ids in self._encode_whole(list(run)))
                continue
            for group in _groups(run):
                yield from self._cut_or_whole(group)

    def _cut_or_whole(self, texts: Sequence[str]) -> Iterable[np.ndarray]:
        """The ids of each text by its parts; the first texts also as a whole: where that differs, nothing is cut again."""
        found = None if self._cuts is None else self._recall(texts, self._cuts)
        if found is not None and self._tried:
            return found
        whole = [np.array(ids, np.int32) for ids in self._encode_whole(texts)]
        if found is not None and not all(map(np.array_equal, found, whole)):
            self._cuts = None  # a splitter that does not do what its pattern says
        self._tried = True
        return whole

    def _encode_whole(self, texts: Sequence[str]) -> Iterator[list[int]]:
        return (encoding.ids for encoding in self.plain.encode_batch_fast(texts, add_special_tokens=False))

    def _recall(self, texts: Sequence[str], cuts: Cuts) -> list[np.ndarray]:
        """The ids of each text, joined from those of its parts, of which only new ones are encoded."""
        units, places = cuts.units(texts)
        known = list(map(self._ids.get, units))
        new = self._learn(list(dict.fromkeys(unit for unit, ids in zip(units, known, strict=True) if ids is None)), cuts)
        parts = [new[unit] if ids is None else ids for unit, ids in zip(units, known, strict=True)]
        if len(self._ids) + len(new) > MOST:
            self._ids.clear()
        self._ids.update((unit, ids) for unit, ids in new.items() if len(unit) <= LONGEST)
        return [np.frombuffer(b"".join(parts[place]), np.int32) for place in places]

    def _learn(self, units: Sequence[str], cuts: Cuts) -> dict[str, bytes]:
        """The ids of each unit. Where that gives the same ids, many are encoded as lines of one text, in half the time."""
        if not units:
            return {}
        fit = cuts.fit_in_lines(units)
        lines = [unit for unit, fits in zip(units, fit, strict=True) if fits]
        others = [unit for unit, fits in zip(units, fit, strict=True) if not fits]
        learned = {unit: array("i", ids).tobytes() for unit, ids in zip(others, self._encode_whole(others), strict=True)}
        blocks = [lines[start:start + LINES] for start in range(0, len(lines), LINES)]
        [[line_end], *encoded] = self._encode_whole(["\n", *map("\n".join, blocks)])
        for block, row in zip(blocks, encoded, strict=True):
            ids = np.array(row, np.int32)
            ends = [-1, *np.flatnonzero(ids == line_end).tolist(), len(ids)]
            learned.update(zip(block, (ids[end + 1:following].tobytes() for end, following in pairwise(ends)), strict=True))
        return learned

    def _chunks(self, text: str) -> Iterable[str]:
        return chunks_of(text) if self.can_cut else [text] if text else []


def _again(source: str, never_cut: bool) -> Codec:
    made = Codec(Tokenizer.from_str(source))
    made._tried = True
    if never_cut:
        made._cuts = None
    return made


def spread(do: Callable[[Rows], T], batches: Iterable[Batch], rows_of: Callable[[Batch], Rows], workers: int
           ) -> Iterator[tuple[Batch, T]]:
    """Each batch with do(its rows), in order; of much text only the first is done here, the others by so many processes.

    rows_of  the texts of a batch, or tuples of texts: what is sent to another process
    """
    found, again = tee(batches)
    yield from zip(found, _spread(do, map(rows_of, again), workers), strict=True)


def _spread(do: Callable[[Rows], T], batches: Iterator[Rows], workers: int) -> Iterator[T]:
    if workers > 1:
        yield from map(do, islice(batches, 1))
        ahead, total = list[Rows](), 0
        while total <= LARGE and len(ahead) < FEW_BATCHES and (more := list(islice(batches, 1))):
            ahead += more
            total += _size(more[0])
        batches = chain(ahead, batches)
        if total > LARGE or len(ahead) == FEW_BATCHES:
            workers = min(workers, MOST_WORKERS)
            yield from in_order(do, batches, workers, room=HELD * workers, weigh=_size)
            return
    yield from map(do, batches)


def _size(rows: Sequence[str | tuple[str, ...]]) -> int:
    """The characters of texts, or of tuples of them."""
    return sum(len(row) if isinstance(row, str) else sum(map(len, row)) for row in rows)


def _any_of(texts: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(re.escape, texts))) if texts else None


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts of about GROUP characters."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def chunks_of(text: str, size: int = CHUNK) -> Iterable[str]:
    """Cuts a text after single line ends between visible characters, where byte-level splitters cut anyway."""
    start = 0
    while len(text) - start > size:
        found = _BREAK.search(text, start + size)
        if found is None:
            break
        yield text[start:found.end()]
        start = found.end()
    if start < len(text):
        yield text[start:]


_BREAK = re.compile(r"(?<=\S)\n(?=\S)")


def _join(parts: Sequence[tuple[int, Any]]) -> Encoded:
    ids = [np.array(encoding.ids, dtype=np.int32) for _, encoding in parts]
    offsets = [np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) + start for start, encoding in parts]
    if len(parts) == 1:
        return Encoded(ids[0], offsets[0])
    if not parts:
        return Encoded(np.zeros(0, np.int32), np.zeros((0, 2), np.int64))
    return Encoded(np.concatenate(ids), np.concatenate(offsets))
