"""Documents to framed pieces, which are corrupted later: [CLS] piece [SEP], every token of a document in exactly one piece.

The frame is the tokenizer's own, that of a document ([bos] … [eos]) where it has none. A document that is longer than
`cutoff_len` is cut into pieces without overlap: a model that reads in both directions needs no context repeated. The
content has the weight 1, the frame 0. Columns tell words and sentences apart where the corruption needs them:

    word      from the tokenizer's own pre-tokenisation, where each token of Chinese text is one; with `jieba` the words
              that it finds in Chinese text
    sentence  ends after . ! ? 。 ！ ？ … with closing quotes, and after line ends

    encoder = FramedEncoder(tokenizer, cutoff_len=128, words="own")
    for example in encoder.documents(documents, ledger): …

Stations of the ledger: `tokenize` (rows, bytes in and tokens out), `frame` (pieces, and the special tokens around them).
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any, Literal

import numpy as np

from danlu.core.errors import ConfigError
from danlu.core.examples import Branch, Example
from danlu.core.ledger import Ledger
from danlu.core.records import Document
from danlu.tokens.codec import Codec, spread
from danlu.tokens.denoise import SENTENCE, WORD
from danlu.tokens.encode import batches, open_stations
from danlu.tokens.labelled import Form

Words = Literal["own", "jieba"]
HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]+")
SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s)|[。！？…]+[”’」』）]*|\n")
SPACE = "▁"  # what SentencePiece writes for a space, and so how its words begin


class FramedEncoder:
    """Turns documents into framed examples with one tokenizer.

    cutoff_len  tokens of the longest piece with its frame
    words       how whole words are told apart; None: not at all
    sentences   whether sentences are
    workers     processes that encode, where there is much
    """

    def __init__(self, tokenizer: Any, cutoff_len: int, *, words: Words | None = None, sentences: bool = False,
                 workers: int = 1) -> None:
        self.tokenizer, self.codec = tokenizer, Codec(tokenizer)
        self.before, self.after = (np.array(ids, np.int32) for ids in Form.of(tokenizer).one)
        self.room = cutoff_len - len(self.before) - len(self.after)
        self.workers = workers
        if self.room < 1:
            raise ConfigError(f"cutoff_len {cutoff_len} leaves no room between the special tokens", key="cutoff_len")
        self._reader = _Reader(self.codec, words, sentences)

    def documents(self, documents: Iterable[Document], ledger: Ledger) -> Iterator[Example]:
        """The examples of many documents, in their order, tokenised in batches."""
        open_stations(ledger, ("tokenize", "frame"))
        found = batches(documents, lambda document: len(document.text))
        for batch, encoded in spread(self._reader.read, found, _texts, self.workers):
            for document, (ids, columns) in zip(batch, encoded, strict=True):
                yield from self._pieces(document, ids, columns, ledger)

    def _pieces(self, document: Document, ids: np.ndarray, columns: dict[str, np.ndarray], ledger: Ledger
                ) -> Iterator[Example]:
        station, size, count = ledger.station("tokenize"), document.num_bytes, len(ids)
        station.take(rows=1, bytes=size)
        station.add("tokens of text", tokens=count)
        if count == 0:
            station.drop("empty document", rows=1, bytes=size)
            return
        station.give(rows=1, bytes=size, tokens=count)
        starts = range(0, count, self.room)
        station, frame = ledger.station("frame"), len(self.before) + len(self.after)
        station.take(rows=1, tokens=count)
        if len(starts) > 1:
            station.add("further pieces of long documents", rows=len(starts) - 1)
        station.add("special tokens", tokens=frame * len(starts))
        station.give(rows=len(starts), tokens=count + frame * len(starts))
        for number, start in enumerate(starts, 1):
            part = slice(start, start + self.room)
            tokens = np.concatenate([self.before, ids[part], self.after])
            weights = self._framed(np.ones(len(ids[part]), np.float32), 0)
            name = document.id if number == 1 else f"{document.id}#{number}"
            found = {key: self._framed(column[part] - column[start], -1) for key, column in columns.items()}
            branch = Branch(tokens, weights, found)
            yield Example(np.zeros(0, np.int32), (branch,), document.source, document.category, name)

    def _framed(self, column: np.ndarray, outside: int) -> np.ndarray:
        return np.pad(column.astype(np.float32), (len(self.before), len(self.after)), constant_values=outside)


def _texts(documents: Sequence[Document]) -> list[str]:
    return [document.text for document in documents]


class _Reader:
    """Encodes texts, and numbers the words and sentences of their tokens; may be sent to another process."""

    def __init__(self, codec: Codec, words: Words | None, sentences: bool) -> None:
        self.codec, self.words, self.sentences = codec, words, sentences
        if words == "jieba":
            chinese_words()  # raises where there is none
        self._is_split = codec.special.pre_tokenizer is not None

    def read(self, texts: list[str]) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """The ids of each text, and its columns."""
        if self.words is None and not self.sentences:
            return [(ids, {}) for ids in self.codec.encode_plain(texts)]
        found = self.codec.plain.encode_batch(texts, add_special_tokens=False)
        return [(np.array(encoding.ids, np.int32), self._columns(text, encoding))
                for text, encoding in zip(texts, found, strict=True)]

    def _columns(self, text: str, encoding: Any) -> dict[str, np.ndarray]:
        # a token may begin with the space before its word: what it is of is told by its last character
        last = np.array([max(end - 1, start) for start, end in encoding.offsets], np.int64)
        columns = {}
        if self.sentences:
            ends = [found.end() for found in SENTENCE_END.finditer(text)]
            columns[SENTENCE] = np.searchsorted(ends, last, side="right")
        if self.words is not None:
            columns[WORD] = self._word_numbers(text, encoding, last)
        return columns

    def _word_numbers(self, text: str, encoding: Any, last: np.ndarray) -> np.ndarray:
        """The number of each token's word, counted over the text."""
        if self._is_split:
            keys = [(-1, -1 if word is None else word) for word in encoding.word_ids]
        else:
            begins = np.cumsum([token.startswith(SPACE) for token in encoding.tokens])
            keys = [(-1, int(word)) for word in begins]
        if self.words == "own":  # a run of Han is no word: each of its tokens is one, and the parts of a character are
            for place, (at, (begin, _)) in enumerate(zip(last.tolist(), encoding.offsets, strict=True)):
                if HAN.match(text, at):
                    keys[place] = (begin, 1)
        if self.words == "jieba":
            cut = chinese_words()
            words = list(chain.from_iterable(_spans(run, cut) for run in HAN.finditer(text)))
            starts = np.array([start for start, _ in words], np.int64)
            for place, at in enumerate(last):
                found = int(np.searchsorted(starts, at, side="right")) - 1
                if found >= 0 and at < words[found][1]:
                    keys[place] = (found, 0)
        changes = [0, *(int(one != two) for one, two in pairwise(keys))]
        return np.cumsum(changes[:len(keys)])


def _spans(run: "re.Match[str]", cut: Any) -> Iterator[tuple[int, int]]:
    """Where the words of a run of Han characters begin and end in the text."""
    at = run.start()
    for word in cut(run.group()):
        yield at, at + len(word)
        at += len(word)


def chinese_words() -> Any:
    """jieba's function that cuts Chinese text into words. Raises ConfigError where it is not installed."""
    try:
        import jieba
    except ImportError:
        raise ConfigError("whole_word_mask: jieba needs the package jieba", key="whole_word_mask",
                          hint="pip install 'danlu[jieba]'") from None
    jieba.setLogLevel("WARNING")  # it tells of its dictionary otherwise
    return jieba.cut
