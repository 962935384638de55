"""Bits per byte: how many bits a model needs for held-out text, every byte of it scored, whatever its tokenizer.

A document is encoded as in training and each of its tokens is predicted exactly once, the first one from the token
that begins every document. Long documents are read in windows that overlap, so that a token far inside still has at
least (context − stride) tokens before it. The bits of a document divided by its UTF-8 bytes compare with a compressor.

    scores = score_documents(loaded.root, loaded.tokenizer, documents, context=512)
    result = bits_per_byte(scores)
    print(result.value, result.low, result.high, result.num_bytes)
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import torch

from danlu.core.errors import DataError
from danlu.core.examples import Branch, Example
from danlu.core.records import Document
from danlu.data.pack import micro_batches
from danlu.evals.statistics import ratio_interval
from danlu.models.generate import evaluating
from danlu.models.root import Root
from danlu.tokens.codec import Codec


@dataclass(frozen=True, slots=True)
class DocumentScore:
    """One held-out document: −log₂ of the probability of its tokens. `exact`: the tokens give back the very text."""

    id: str
    num_bytes: int
    num_tokens: int
    bits: float
    exact: bool = True


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


def choose_documents(documents: Iterable[Document], max_bytes: int) -> tuple[list[Document], list[str]]:
    """Whole documents of together at most `max_bytes`, spread over all of them, and notes on what was done.

    The order is that of the ids' hashes, so it depends on nothing else. Documents that do not fit any more are passed
    over; only where this leaves less than half of the bytes is the first of them cut to fill the rest.
    """
    documents = list(documents)
    chosen, notes = [], []
    for place, size in choose_places(((document.id, len(document.text.encode())) for document in documents), max_bytes):
        document = documents[place]
        text = beginning(document.text, size)
        if text != document.text:
            notes.append(f"{document.id} was cut to its first {len(text.encode())} bytes")
        chosen.append(Document(text, document.source, document.id, document.category))
    return chosen, notes


def choose_places(sizes: Iterable[tuple[str, int]], max_bytes: int) -> list[tuple[int, int]]:
    """The choice of `choose_documents` from (id, bytes) alone: (place, how many of its bytes) in the order of choice.

    So a corpus can be gone through without being held in memory.
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


def start_token(tokenizer: Any) -> int:
    """The token that begins every document: bos, else eos. Raises DataError where there is neither."""
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise DataError("the tokenizer has neither a bos nor an eos token, so nothing can predict a first token")
    return token


@torch.no_grad()
def score_documents(root: Root, tokenizer: Any, documents: Sequence[Document], *, context: int,
                    stride: int | None = None, micro_batch_tokens: int = 8192,
                    progress: Callable[[float], None] = lambda share: None) -> list[DocumentScore]:
    """Scores every token of every document; `stride` is half the context where it is not given.

    `progress` hears what share of the work is done. Raises DataError where a model's numbers are not finite.
    """
    stride = stride or max(1, context // 2)
    device = next(root.parameters()).device
    first = start_token(tokenizer)
    codec = Codec(tokenizer)
    encoded = codec.encode_plain([document.text for document in documents])
    parts = [(number, window) for number, tokens in enumerate(encoded)
             for window in windows(np.concatenate([[first], tokens]), context, stride)]
    bits = np.zeros(len(documents))
    total_tokens = sum(window.num_tokens for _, window in parts)
    done = place = 0
    with evaluating(root):
        for group in micro_batches([window for _, window in parts], micro_batch_tokens):
            batch = root.batch(group).to(device)
            logprobs_S = root(batch).logprobs_S
            sums = batch.sum_per_branch(logprobs_S.double()).cpu().numpy()  # one branch an example
            owners = [number for number, _ in parts[place:place + len(group)]]
            np.add.at(bits, owners, -sums / math.log(2))
            place += len(group)
            done += batch.num_tokens
            progress(done / total_tokens)
    for document, total in zip(documents, bits, strict=True):
        if not math.isfinite(total):
            raise DataError("the model gives this text no probability (its numbers are not finite)", where=document.id)
    return [DocumentScore(document.id, len(document.text.encode()), len(tokens), float(total),
                          codec.decode(tokens) == document.text)
            for document, tokens, total in zip(documents, encoded, bits, strict=True)]


def bits_per_byte(scores: Sequence[DocumentScore]) -> BitsPerByte:
    """The total over documents. Raises DataError where there is not one byte."""
    num_bytes = sum(score.num_bytes for score in scores)
    if num_bytes == 0:
        raise DataError("there is no held-out text to score")
    interval = ratio_interval([score.bits for score in scores], [score.num_bytes for score in scores])
    low, high = interval or (None, None)
    return BitsPerByte(sum(score.bits for score in scores) / num_bytes, low, high, num_bytes,
                       sum(score.num_tokens for score in scores), len(scores),
                       sum(not score.exact for score in scores))
