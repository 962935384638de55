"""The stage `tokenizer`: trains a byte-level BPE tokenizer on a corpus, or on text files.

    vocabulary:
      stage: tokenizer
      dataset: corpus                  # a corpus step, files, package:… or docstrings:…; one or a list
      vocab_size: 4096
      max_bytes_per_category: 20000000 # so that the largest category does not make all the words

The artifact is a folder that `AutoTokenizer.from_pretrained` opens, with the ledger beside it.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, field_validator
from tokenizers import Tokenizer

from danlu.core.config import Config
from danlu.core.errors import DataError
from danlu.core.ledger import Ledger
from danlu.core.records import Document
from danlu.pipeline.context import DOCSTRINGS, FILES, Amount, Context, Forecast, Input, Reference
from danlu.text.read import SourceConfig, read_corpus, read_documents
from danlu.tokens.codec import Codec, chunks_of
from danlu.tokens.train import MIN_VOCAB_SIZE, SPECIAL_TOKENS, bytes_per_token, train_bpe

KIND = "tokenizer"
SCHEMA = 1
BYTES_PER_SECOND = 2_000_000  # of training on two cores, for the forecast
MAX_MEASURED = 2_000_000  # bytes of a category that bytes per token are measured on


class Settings(Config):
    """The settings of `stage: tokenizer`."""

    dataset: str | list[str] = Field(min_length=1, description="corpus steps, files, package:… or docstrings:…")
    vocab_size: int = Field(4096, ge=MIN_VOCAB_SIZE, le=1_000_000, description="tokens, special tokens included")
    max_bytes_per_category: int | None = Field(None, ge=1, description="a larger category is sampled down to this")
    special_tokens: list[str] = Field([], description="further special tokens after danlu's own")

    def datasets(self) -> list[str]:
        """What is read, as a list."""
        return [self.dataset] if isinstance(self.dataset, str) else list(self.dataset)

    @field_validator("special_tokens")
    @classmethod
    def _distinct(cls, value: list[str]) -> list[str]:
        twice = len({*value, *SPECIAL_TOKENS}) < len(value) + len(SPECIAL_TOKENS)
        if twice or any(not token.strip() for token in value):
            raise ValueError(f"special tokens are not empty, written once and none of {' '.join(SPECIAL_TOKENS)}")
        return value


def references(settings: Settings) -> list[Reference]:
    """What the tokenizer is trained on."""
    one = isinstance(settings.dataset, str)
    return [Reference(("dataset",) if one else ("dataset", i), text, ("corpus", FILES, DOCSTRINGS), label=True)
            for i, text in enumerate(settings.datasets())]


def forecast(settings: Settings, inputs: Mapping[str, Input]) -> Forecast:
    """The vocabulary's size, and the time where the input lies there already."""
    size = sum(path.stat().st_size for item in inputs.values() for path in item.files)
    size += sum(item.forecast.facts.get("bytes", 0) for item in inputs.values() if item.forecast)
    notes = [f"byte-level BPE, {settings.vocab_size:,} tokens, digits one by one"]
    return Forecast(seconds=Amount(size / BYTES_PER_SECOND, exact=False) if size else None, notes=notes,
                    facts={"vocab_size": settings.vocab_size})


def run(context: Context) -> dict[str, Any]:
    """Samples, trains, checks the round trip and measures. Returns the vocabulary size and bytes per token."""
    settings: Settings = context.settings
    ledger = Ledger()
    sample = Sample(context, ledger)
    with context.progress("training a tokenizer") as bar:
        tokenizer = train_bpe(sample.texts(bar), settings.vocab_size, context.work, settings.special_tokens)
    measured, measured_on = measured_documents(context)
    check_round_trip(tokenizer, measured)
    ledger.save(context.work)
    return {"vocab_size": tokenizer.get_vocab_size(), "bytes": sum(sample.used.values()),
            "bytes_per_token": bytes_per_token(tokenizer, measured),
            "measured_on": measured_on}


def documents(context: Context, ledger: Ledger, split: str = "train") -> Iterator[Document]:
    """Every document behind `dataset`; of corpora the given split, of files all for training and none held out."""
    for text in context.settings.datasets():
        item = context.inputs[text]
        if item.produces == "corpus":
            station = ledger.station(f"read:{text}")
            for document in read_corpus(item.require_folder(), "heldout" if split == "heldout" else "train"):
                size = len(document.text.encode())
                station.take(rows=1, bytes=size)
                station.give(rows=1, bytes=size)
                yield document
        elif split == "train":
            yield from read_documents(SourceConfig.model_validate({"path": text}), context.base, ledger)


class Sample:
    """The text to train on: of a category with too many bytes an even share, drawn by the hash of each chunk's name."""

    def __init__(self, context: Context, ledger: Ledger) -> None:
        self.context, self.ledger = context, ledger
        self.limit = context.settings.max_bytes_per_category
        self.used: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        if self.limit is not None:
            for document in documents(context, Ledger()):
                self.sizes[document.category] = self.sizes.get(document.category, 0) + len(document.text.encode())

    def texts(self, bar: Any) -> Iterator[str]:
        """The chunks, in the order of the documents; what is left out is in the ledger."""
        for document in documents(self.context, self.ledger):
            station = self.ledger.station("sample")
            kept = 0
            for number, chunk in enumerate(chunks_of(document.text)):
                size = len(chunk.encode())
                station.take(bytes=size)
                if self._chooses(document, number, size):
                    self.used[document.category] = self.used.get(document.category, 0) + size
                    kept += size
                    yield chunk
                else:
                    station.drop("beyond max_bytes_per_category", bytes=size)
            station.take(rows=1)
            station.give(rows=1 if kept else 0, bytes=kept)
            if not kept:
                station.drop("beyond max_bytes_per_category" if document.text else "empty document", rows=1)
            bar.update(sum(self.used.values()))

    def _chooses(self, document: Document, number: int, size: int) -> bool:
        if self.limit is None:
            return True
        fits = self.used.get(document.category, 0) + size <= self.limit
        return fits and _draw(document, number) * self.sizes[document.category] <= self.limit


def _draw(document: Document, number: int) -> float:
    """A number between 0 and 1 that depends on the chunk's name alone."""
    name = f"{document.source}\0{document.id}\0{number}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64


def measured_documents(context: Context) -> tuple[list[Document], dict[str, str]]:
    """Some megabytes of each category: held-out documents where there are any; and by category which they were."""
    found: list[Document] = []
    used: dict[str, int] = {}
    measured_on: dict[str, str] = {}
    for split, name in (("heldout", "held-out documents"), ("train", "training text")):
        for document in documents(context, Ledger(), split):
            size, category = len(document.text.encode()), document.category
            if measured_on.setdefault(category, name) == name and used.get(category, 0) < MAX_MEASURED:
                used[category] = used.get(category, 0) + size
                found.append(document)
    return found, dict(sorted(measured_on.items()))


def check_round_trip(tokenizer: Tokenizer, measured: list[Document]) -> None:
    """Raises DataError where a document does not come back as it was."""
    codec = Codec(tokenizer)
    for document, ids in zip(measured, codec.encode_plain([document.text for document in measured])):
        if codec.decode(ids) != document.text:
            raise DataError("does not survive the tokenizer: its text came back changed",
                            where=f"{document.source}, {document.id}")
