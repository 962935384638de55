"""How well a model predicts held-out text: loss, perplexity, bits per byte and per character; every byte is scored.

A document is encoded as in training and each of its tokens is predicted exactly once, the first one from the token
that begins every document (bos, or eos where there is no bos). A tokenizer without either has nothing to predict a first
token from: such a token costs log₂ of the number of ids, and is counted. Long documents are read in windows that overlap,
so that a token far inside still has at least (context − stride) tokens before it. The bits of a document divided by its
UTF-8 bytes compare with a compressor, and between models of different vocabularies; perplexity per token does not.

    scores = score_documents(loaded.root, loaded.tokenizer, documents, context=512, stride=256)
    result = bits_per_byte(scores)
    print(result.value, result.low, result.high, result.num_bytes)
    rows = loss_rows("base", scores)                # by category, source and language
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import torch

from danlu.core.errors import DataError
from danlu.core.examples import Branch, Example
from danlu.core.records import Document
from danlu.data.pack import micro_batches
from danlu.evals.figures import ALL_TEXT, LossRow
from danlu.evals.statistics import ratio_interval
from danlu.models.generate import evaluating
from danlu.models.root import Root
from danlu.text.clean import language
from danlu.tokens.codec import Codec, Encoded, Segment, num_ids

BLOCK = 1000  # characters: where there are too few documents, stretches of this length are what an interval is over
MIN_DOCUMENTS = 5  # that an interval over documents needs; of fewer, it is over their blocks


class Block(NamedTuple):
    """A stretch of BLOCK characters, the same for every model; a token is of the one in which it begins."""

    bits: float
    num_bytes: int
    num_chars: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class DocumentScore:
    """One held-out document: −log₂ of the probability of its tokens. `exact`: the tokens give back the very text.

    num_without_context  tokens that nothing stood before: 0, or 1 where the tokenizer has no token to begin with
    """

    id: str
    num_bytes: int
    num_tokens: int
    bits: float
    exact: bool = True
    num_chars: int = 0
    source: str = ""
    category: str = ""
    language: str = ""
    num_without_context: int = 0
    blocks: tuple[Block, ...] = ()


@dataclass(frozen=True, slots=True)
class BitsPerByte:
    """Total bits ÷ total bytes with a 95 % interval over documents (None for fewer than two)."""

    value: float
    low: float | None
    high: float | None
    num_bytes: int
    num_tokens: int
    num_documents: int
    num_inexact: int


def choose_documents(read: Callable[[], Iterable[Document]], max_bytes: int) -> tuple[dict[str, list[Document]], list[str]]:
    """Of each category whole documents of together at most `max_bytes`, spread over all of them; and notes on what was cut.

    `read` gives all documents and is called twice, so that memory holds what is chosen and not all that there is.
    """
    sizes: dict[str, list[tuple[str, int]]] = {}
    for document in read():
        sizes.setdefault(document.category, []).append((document.id, len(document.text.encode())))
    wanted = {category: dict(choose_places(sizes[category], max_bytes)) for category in sorted(sizes)}
    found: dict[str, dict[int, Document]] = {category: {} for category in wanted}
    seen, cut = dict.fromkeys(wanted, 0), {}
    for document in read():
        place = seen[document.category]
        seen[document.category] += 1
        if place in wanted[document.category]:
            text = beginning(document.text, wanted[document.category][place])
            if text != document.text:
                cut[document.category, place] = f"{document.id} was cut to its first {len(text.encode())} bytes"
            found[document.category][place] = Document(text, document.source, document.id, document.category)
    return ({category: [found[category][place] for place in places] for category, places in wanted.items()},
            [cut[key] for key in sorted(cut)])


def choose_places(sizes: Iterable[tuple[str, int]], max_bytes: int) -> list[tuple[int, int]]:
    """Which of some documents, given as (id, bytes), are read: (place, how many of its bytes) in the order of choice.

    The order is that of the ids' hashes, so it depends on nothing else. Documents that do not fit any more are passed
    over; only where this leaves less than half of the bytes is the first of them cut to fill the rest.
    """
    ordered = sorted((sha256(id.encode()).digest(), place, size) for place, (id, size) in enumerate(sizes))
    chosen, passed, room = [], [], max_bytes
    for _, place, size in ordered:
        if 0 < size <= room:
            chosen.append((place, size))
            room -= size
        elif size > room:
            passed.append(place)
    if passed and room > max_bytes // 2:
        chosen.append((passed[0], room))
    return chosen


def beginning(text: str, num_bytes: int) -> str:
    """The first whole characters of at most that many bytes."""
    return text.encode()[:num_bytes].decode(errors="ignore")


def windows(tokens: Sequence[int] | np.ndarray, context: int, stride: int) -> list[Example]:
    """Examples of at most `context` tokens that together learn every token but the first exactly once.

    The first token is the one that begins a document; it is context only.
    """
    assert 0 < stride < context, "every window keeps some context"
    tokens = np.asarray(tokens, np.int32)
    found: list[Example] = []
    scored = 1
    while scored < len(tokens):
        end = min(len(tokens), context if not found else scored + stride)
        start = max(0, end - context)
        weights = np.zeros(end - start, np.float32)
        weights[scored - start:] = 1
        found.append(Example(tokens[:0], (Branch(tokens[start:end], weights),)))
        scored = end
    return found


def start_token(tokenizer: Any) -> int | None:
    """The token that begins every document, as in training: bos, else eos; None where there is neither."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def first_token_in_words(tokenizer: Any) -> str:
    """How a document's first token is predicted, for a reader of the report; "" where a bos does it, as most expect."""
    if tokenizer.bos_token_id is not None:
        return ""
    if tokenizer.eos_token_id is not None:
        return f"The first token of a document is predicted from {tokenizer.eos_token}: there is no bos token."
    return (f"The first token of a document costs log₂ {num_ids(tokenizer):,} = {math.log2(num_ids(tokenizer)):.1f} bits: "
            "there is no bos and no eos token to predict it from.")


@torch.no_grad()
def score_documents(root: Root, tokenizer: Any, documents: Sequence[Document], *, context: int,
                    stride: int | None = None, micro_batch_tokens: int = 8192,
                    progress: Callable[[float], None] = lambda share: None) -> list[DocumentScore]:
    """Scores every token of every document; `stride` is half the context where it is not given.

    `progress` hears what share of the work is done. Raises DataError where a model's numbers are not finite.
    """
    stride = stride or max(1, context // 2)
    first, codec = start_token(tokenizer), Codec(tokenizer)
    encoded = codec.encode([[Segment(0, document.text, plain=True)] if document.text else [] for document in documents])
    begin = np.zeros(0, np.int32) if first is None else np.array([first], np.int32)
    parts = [(number, window) for number, row in enumerate(encoded)
             for window in windows(np.concatenate([begin, row.ids]), context, stride)]
    found: list[list[np.ndarray]] = [[] for _ in documents]
    if first is None:
        for rows, row in zip(found, encoded, strict=True):
            rows.append(np.full(min(1, len(row.ids)), math.log2(num_ids(tokenizer))))
    for (number, _), logprobs in zip(parts, _read(root, [window for _, window in parts], micro_batch_tokens, progress),
                                     strict=True):
        found[number].append(-logprobs / math.log(2))
    scores = []
    for document, row, rows in zip(documents, encoded, found, strict=True):
        bits = np.concatenate(rows) if rows else np.zeros(0)
        assert len(bits) == len(row.ids), "every token is scored exactly once"
        if not np.isfinite(bits).all():
            raise DataError("the model gives this text no probability (its numbers are not finite)", where=document.id)
        scores.append(_score(document, row, bits, codec.decode(row.ids) == document.text, first is None))
    return scores


def _read(root: Root, examples: Sequence[Example], micro_batch_tokens: int, progress: Callable[[float], None]
          ) -> Iterator[np.ndarray]:
    """float64 log-probabilities of each window's scored tokens, window by window."""
    device = next(root.parameters()).device
    total, done = sum(example.num_tokens for example in examples), 0
    with evaluating(root):
        for group in micro_batches(examples, micro_batch_tokens, padded=not root.packs):
            logprobs = root(root.batch(group).to(device)).logprobs_S.double().cpu().numpy()
            yield from np.split(logprobs, np.cumsum([example.num_targets for example in group])[:-1])
            done += sum(example.num_tokens for example in group)
            progress(done / total)


def _score(document: Document, row: Encoded, bits: np.ndarray, exact: bool, without_first: bool) -> DocumentScore:
    text = document.text
    return DocumentScore(document.id, len(text.encode()), len(row.ids), float(bits.sum()), exact, len(text),
                         document.source, document.category, language(text), int(without_first and len(row.ids) > 0),
                         blocks_of(text, row.offsets[:, 0], bits))


def blocks_of(text: str, begins: np.ndarray, bits: np.ndarray) -> tuple[Block, ...]:
    """The blocks of a text whose tokens begin at these characters and cost these bits, both [tokens]."""
    pieces = [text[start:start + BLOCK] for start in range(0, len(text), BLOCK)]
    places = np.minimum(begins // BLOCK, len(pieces) - 1)
    sums, counts = (np.bincount(places, weights, len(pieces)) for weights in (bits, None))
    return tuple(Block(float(total), len(piece.encode()), len(piece), int(count))
                 for piece, total, count in zip(pieces, sums, counts, strict=True))


def bits_per_byte(scores: Sequence[DocumentScore]) -> BitsPerByte:
    """The total over documents. Raises DataError where there is not one byte."""
    num_bytes = sum(score.num_bytes for score in scores)
    if num_bytes == 0:
        raise DataError("there is no held-out text to score")
    low, high = units_of(scores).interval()
    return BitsPerByte(sum(score.bits for score in scores) / num_bytes, low, high, num_bytes,
                       sum(score.num_tokens for score in scores), len(scores),
                       sum(not score.exact for score in scores))


@dataclass(frozen=True, slots=True)
class Units:
    """What an interval is over, and what that is in words: the documents, or the blocks of few ones.

    strata  the categories, of which the recipe decides how much there is: resampling keeps their shares
    """

    bits: list[float]
    num_bytes: list[int]
    num_chars: list[int]
    num_tokens: list[int]
    strata: list[str]
    name: str

    def interval(self, denominators: Sequence[float] | None = None) -> tuple[float, float] | tuple[None, None]:
        """95 % interval of bits per byte, or of bits ÷ other amounts of the same units; None where there is none."""
        below = self.num_bytes if denominators is None else denominators
        return ratio_interval(self.bits, below, strata=self.strata) or (None, None)


def units_of(scores: Sequence[DocumentScore]) -> Units:
    """The documents, or where there are fewer than MIN_DOCUMENTS their blocks."""
    blocks = [(block, score.category) for score in scores for block in score.blocks]
    few = len(scores) < MIN_DOCUMENTS and len(blocks) > len(scores)
    rows = blocks if few else [(Block(score.bits, score.num_bytes, score.num_chars, score.num_tokens), score.category)
                               for score in scores if score.num_bytes]
    return Units([row.bits for row, _ in rows], [row.num_bytes for row, _ in rows], [row.num_chars for row, _ in rows],
                 [row.num_tokens for row, _ in rows], [category for _, category in rows],
                 f"blocks of {BLOCK:,} characters" if few else "documents")


def grouped(scores: Sequence[DocumentScore]) -> dict[tuple[str, str], list[DocumentScore]]:
    """The scores by (kind of group, name): each category, source and language, and last everything together.

    A source or a language that is the same documents as a group before it, or as everything, has no line of its own,
    unless it is a language that has no other line under its name.
    """
    whole = list(scores)
    found: dict[tuple[str, str], list[DocumentScore]] = {}
    for kind in ("category", "source", "language"):
        names: dict[str, list[DocumentScore]] = {}
        for score in scores:
            names.setdefault({"category": score.category, "source": score.source, "language": score.language}[kind],
                             []).append(score)
        known = [*found.values(), *([whole] if kind != "category" else [])]
        found |= {(kind, name): members for name, members in sorted(names.items())
                  if members not in known or (kind == "language" and ("category", name) not in found)}
    return found | {("all", ALL_TEXT): whole}


def loss_rows(model: str, scores: Sequence[DocumentScore]) -> list[LossRow]:
    """The losses of one model in all units, by category, source and language, and over everything.

    loss = Σ −ln p / tokens in nats; perplexity = e^loss; bits per token, byte and character are the same sum in bits over
    other counts. Groups without a byte are left out.
    """
    return [_loss_row(model, kind, name, members) for (kind, name), members in grouped(scores).items()
            if sum(score.num_tokens for score in members)]


def _loss_row(model: str, kind: str, name: str, scores: Sequence[DocumentScore]) -> LossRow:
    bits, num_tokens = sum(score.bits for score in scores), sum(score.num_tokens for score in scores)
    num_bytes, num_chars = sum(score.num_bytes for score in scores), sum(score.num_chars for score in scores)
    units = units_of(scores)
    (low, high), by_token, (char_low, char_high) = map(units.interval, (None, units.num_tokens, units.num_chars))
    loss = bits * math.log(2) / num_tokens
    loss_low, loss_high = (None if end is None else end * math.log(2) for end in by_token)
    return LossRow(model, kind, name, loss=loss, loss_low=loss_low, loss_high=loss_high, bits_per_token=bits / num_tokens,
                   perplexity=math.exp(min(loss, 700.0)), bits_per_byte=bits / num_bytes, low=low, high=high,
                   bits_per_char=bits / num_chars, char_low=char_low, char_high=char_high, unit=units.name,
                   num_bytes=num_bytes, num_chars=num_chars, num_tokens=num_tokens, num_documents=len(scores),
                   num_without_context=sum(score.num_without_context for score in scores))
