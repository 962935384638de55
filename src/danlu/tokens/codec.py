"""Text to ids with exact character offsets, and nothing that the caller did not ask for.

`Codec` keeps private copies of a tokenizer's Rust backend, one that reads special tokens in the text and one that reads
them as ordinary text. The copies have no post-processor (it would add a BOS, and byte-level ones cut the space off the
offsets), no truncation and no padding: special tokens have one owner, the template or the encoder of documents.

    codec = Codec(tokenizer)
    [row] = codec.encode([[Segment(0, "<|user|>hi<|end|>")]])
    row.ids, row.offsets          # int32 [n], int64 [n, 2]
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer, processors

from danlu.core.artifact import digest
from danlu.core.errors import ConfigError

CHUNK = 1 << 16  # characters of running text that are encoded at once


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
        special = [token.content for token in added if token.special]
        self._pattern = re.compile("|".join(map(re.escape, special))) if special else None

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
        flat = iter(self.plain.encode_batch_fast([chunk for row in chunks for chunk in row], add_special_tokens=False))
        rows = [[np.array(next(flat).ids, dtype=np.int32) for _ in row] for row in chunks]
        return [np.concatenate(row) if row else np.zeros(0, np.int32) for row in rows]

    def _chunks(self, text: str) -> Iterable[str]:
        return chunks_of(text) if self.can_cut else [text] if text else []


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
