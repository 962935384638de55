"""The stage `tokenizer`: trains a tokenizer on a corpus, or on text files, and measures it beside others.

    vocabulary:
      stage: tokenizer
      dataset: corpus                  # a corpus step, files, package:… or docstrings:…; one or a list
      kind: byte_bpe                   # or wordpiece, unigram, sentencepiece_bpe
      vocab_size: 4096
      max_bytes_per_category: 20000000 # so that the largest category does not make all the words
      compare: [path/to/model]         # folders whose tokenizers are measured on the same texts

The artifact is a folder that `AutoTokenizer.from_pretrained` opens, with the ledger and `figures.json` beside it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pydantic import Field, model_validator
from tokenizers import Tokenizer

from danlu.core.config import Config
from danlu.core.errors import DataError
from danlu.core.ledger import Ledger
from danlu.core.records import Document
from danlu.pipeline.context import DOCSTRINGS, FILES, HUB, Amount, Context, Forecast, Input, Reference
from danlu.pipeline.models import place
from danlu.text.clean import language
from danlu.text.read import SourceConfig, read_corpus, read_documents
from danlu.tokens.codec import Codec, chunks_of
from danlu.tokens.measure import ALL, figure_table, measure
from danlu.tokens.sp_train import BLANK
from danlu.tokens.splitting import Chinese, Digits
from danlu.tokens.train import MIN_VOCAB_SIZE, NAMES, Kind, Options, is_name, own_tokens, train_tokenizer

KIND = "tokenizer"
SCHEMA = 3
# Of training on two cores, for the forecast.
BYTES_PER_SECOND: dict[Kind, int] = {"byte_bpe": 2_000_000, "wordpiece": 1_000_000, "sentencepiece_bpe": 1_000_000,
                                     "unigram": 300_000}
MAX_MEASURED = 2_000_000  # bytes of a category that a tokenizer is measured on
STRETCH = 1 << 14  # characters of what is drawn at once from a category that is too large
BERT: tuple[Digits, Chinese] = ("free", "characters")  # as BERT's own tokenizers do
OTHERS: tuple[Digits, Chinese] = ("single", "free")
FIGURES = "figures.json"


class Settings(Config):
    """The settings of `stage: tokenizer`."""

    dataset: str | list[str] = Field(min_length=1, description="corpus steps, files, package:… or docstrings:…")
    kind: Kind = Field("byte_bpe", description="byte-level BPE, BERT's WordPiece, or SentencePiece's Unigram or BPE")
    vocab_size: int = Field(4096, ge=MIN_VOCAB_SIZE, le=1_000_000, description="tokens, special tokens included")
    max_bytes_per_category: int | None = Field(None, ge=1, description="a larger category is sampled down to this")
    special_tokens: list[str] = Field([], description="further special tokens after those that the kind always has")
    num_sentinels: int = Field(0, ge=0, le=10_000, description="special tokens <extra_id_0>, <extra_id_1>, … (T5's)")
    digits: Digits | None = Field(None, description="each alone, at most three together, or as they come; default: by kind")
    chinese: Chinese | None = Field(
        None, description="characters are words each, runs of them are words, or letters as others are; default: by kind")
    character_coverage: float = Field(0.9995, gt=0, le=1, description="share of the text whose characters are learned")
    lowercase: bool = Field(False, description="wordpiece: letters are made small")
    strip_accents: bool | None = Field(None, description="wordpiece: accents are taken off; default: as lowercase says")
    compare: list[str] = Field([], description="tokenizers beside which this one is measured: steps, folders, hub ids")

    def datasets(self) -> list[str]:
        """What is read, as a list."""
        return [self.dataset] if isinstance(self.dataset, str) else list(self.dataset)

    def options(self) -> Options:
        """What the tokenizer is to be."""
        sentinels = [f"<extra_id_{number}>" for number in range(self.num_sentinels)]
        digits, chinese = BERT if self.kind == "wordpiece" else OTHERS
        return Options(self.kind, self.vocab_size, (*self.special_tokens, *sentinels), self.digits or digits,
                       self.chinese or chinese, self.character_coverage, self.lowercase, self.strip_accents)

    @model_validator(mode="after")
    def _tokens_are_distinct(self) -> "Settings":
        own, further = own_tokens(self.kind), self.options().special_tokens
        if len({*own, *further}) < len(own) + len(further) or any(not token.strip() for token in further):
            raise ValueError(f"special tokens are not empty, written once and none of {' '.join(own)}")
        bad = next((token for token in further if not is_name(token)), None)
        if bad is not None:
            raise ValueError(f"the special token “{bad}” could be spelled by ordinary text. {NAMES}")
        return self

    @model_validator(mode="after")
    def _vocabulary_holds_what_it_must(self) -> "Settings":
        least = self.options().least_size
        if self.vocab_size < least:
            raise ValueError(f"vocab_size {self.vocab_size} is too small for what {self.kind} with these special tokens "
                             f"must hold: use {least} or more; a few thousand is usual for small corpora")
        return self

    @model_validator(mode="after")
    def _kind_has_these_options(self) -> "Settings":
        unread = {"byte_bpe": {"character_coverage", "lowercase", "strip_accents"}, "wordpiece": set[str]()}.get(
            self.kind, {"lowercase", "strip_accents"}) & self.model_fields_set
        if unread:
            raise ValueError(f"{min(unread)} means nothing for kind: {self.kind}")
        if self.digits == "groups" and self.kind in ("unigram", "sentencepiece_bpe"):
            raise ValueError("SentencePiece does not cut digits from the left, so digits: groups is for the other kinds")
        return self


def references(settings: Settings) -> list[Reference]:
    """What the tokenizer is trained on, and those that it is compared with."""
    one = isinstance(settings.dataset, str)
    found = [Reference(("dataset",) if one else ("dataset", i), text, ("corpus", FILES, DOCSTRINGS), label=True)
             for i, text in enumerate(settings.datasets())]
    return found + [Reference(("compare", i), text, ("tokenizer", "model", FILES, HUB))
                    for i, text in enumerate(settings.compare)]


def forecast(settings: Settings, inputs: Mapping[str, Input]) -> Forecast:
    """The vocabulary's size, and the time where the input lies there already."""
    data = [inputs[text] for text in settings.datasets() if text in inputs]
    size = sum(path.stat().st_size for item in data for path in item.files)
    size += sum(item.forecast.facts.get("bytes", 0) for item in data if item.forecast)
    if settings.max_bytes_per_category is not None and len(data) == 1 and data[0].produces != "corpus":
        size = min(size, settings.max_bytes_per_category)  # files are one category, a corpus may hold several
    options, rate = settings.options(), BYTES_PER_SECOND[settings.kind]
    notes = [f"{settings.kind}, {settings.vocab_size:,} tokens, digits: {options.digits}, chinese: {options.chinese}"]
    return Forecast(seconds=Amount(size / rate, exact=False) if size else None, notes=notes,
                    facts={"vocab_size": settings.vocab_size})


def run(context: Context) -> dict[str, Any]:
    """Samples, trains, checks the round trip and measures. Returns the vocabulary size and the figures."""
    from danlu.models.load import load_tokenizer

    settings: Settings = context.settings
    ledger = Ledger()
    others = {text: load_tokenizer(place(context.inputs[text])) for text in settings.compare}  # before it takes long
    sample = Sample(context, ledger)
    with context.progress("training a tokenizer") as bar:
        tokenizer = train_tokenizer(sample.texts(bar), settings.options(), context.work)
    measured, measured_on = measured_documents(context)
    check_round_trip(tokenizer, measured, settings.kind)
    figures = compared({context.step: tokenizer, **others}, measured)
    context.console.print(figure_table(figures))
    (context.work / FIGURES).write_text(json.dumps(figures, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    ledger.save(context.work)
    own = figures[context.step]["categories"]
    return {"vocab_size": tokenizer.get_vocab_size(), "bytes": sum(sample.used.values()),
            "bytes_per_token": {name: found["bytes_per_token"] for name, found in own.items() if found["tokens"]},
            "unknown_share": own[ALL]["unknown_share"], "byte_share": own[ALL]["byte_share"],
            "figures": figures, "measured_on": measured_on}


def compared(tokenizers: Mapping[str, Any], measured: list[Document]) -> dict[str, Any]:
    """The figures of tokenizers, by their names, on the same texts."""
    texts = [(document, language(document.text)) for document in measured]
    return {name: measure(tokenizer, texts) for name, tokenizer in tokenizers.items()}


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
            for number, chunk in enumerate(chunks_of(document.text) if self.limit is None else _stretches(
                    document.text, min(STRETCH, self.limit // 16 + 1))):
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


def _stretches(text: str, size: int) -> Iterator[str]:
    """The text in stretches of `size` characters or some more, up to a line end where there is one."""
    at = 0
    while at < len(text):
        end = text.find("\n", at + size - 1, at + 2 * size) + 1 or at + 2 * size
        yield text[at:end]
        at = end


def _draw(document: Document, number: int) -> float:
    """A number between 0 and 1 that depends on the chunk's name alone."""
    name = f"{document.source}\0{document.id}\0{number}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64


def measured_documents(context: Context) -> tuple[list[Document], dict[str, str]]:
    """The first MAX_MEASURED bytes of each category, of held-out documents where there are any; and of which they are."""
    found: list[Document] = []
    used: dict[str, int] = {}
    measured_on: dict[str, str] = {}
    for split, name in (("heldout", "held-out documents"), ("train", "training text")):
        for document in documents(context, Ledger(), split):
            category, left = document.category, MAX_MEASURED - used.get(document.category, 0)
            if measured_on.setdefault(category, name) != name or left <= 0:
                continue
            text = document.text[:left].encode()[:left].decode(errors="ignore")
            used[category] = used.get(category, 0) + max(1, len(text.encode()))
            found.append(replace(document, text=text))
    return found, dict(sorted(measured_on.items()))


def check_round_trip(tokenizer: Tokenizer, measured: list[Document], kind: Kind) -> None:
    """Raises DataError where a document does not come back as it was; WordPiece loses blanks, and that is counted only."""
    codec = Codec(tokenizer)
    if kind == "wordpiece":
        return
    for document, ids in zip(measured, codec.encode_plain([document.text for document in measured])):
        text = document.text if kind == "byte_bpe" else document.text.replace(BLANK, " ")
        if codec.decode(ids) != text:
            raise DataError("does not survive the tokenizer: its text came back changed",
                            where=f"{document.source}, {document.id}")
