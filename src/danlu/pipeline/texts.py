"""What the stage `eval` measures of running text: losses in every unit, baselines, and whether something was forgotten.

The documents are those that a corpus holds out, files outside, or both. Each model reads them while it is open; then the
models are compared with the reference on the same bytes, and `max_rise` says how much more it may come to.

    reading = Reading(context, names, notes)
    reading.measure(name, loaded, window)            # for every model …
    rises = reading.rises()
    gate(rises)                                     # sentences about what has risen too far
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from danlu.core.config import Config
from danlu.core.errors import ConfigError, DanluError, DataError
from danlu.core.ledger import Ledger
from danlu.core.records import Document
from danlu.pipeline.context import DOCSTRINGS, FILES, Context, Reference
from danlu.text.lines import BLANK_LINE, LINE_END
from danlu.text.read import SourceConfig, read_documents

if TYPE_CHECKING:
    from danlu.evals.figures import BitsRow, LossRow, RiseRow
    from danlu.evals.perplexity import DocumentScore
    from danlu.models.load import Loaded

NGRAM = "n-gram"
READ_FOR_BITS = ("max_bytes", "cutoff_len", "stride")
MAX_NAMED = 8  # sources that a note names
LONGEST_WINDOW = 2048  # tokens, for models that do not say what they were trained on


class TextSettings(Config):
    """The keys about running text."""

    corpus: str | None = Field(None, description="a corpus step, whose held-out documents are scored")
    texts: tuple[SourceConfig, ...] = Field((), description="files outside, as they are; each as in a corpus's sources")
    max_bytes: int = Field(150_000, ge=1000, description="held-out bytes scored per category, in whole documents")
    cutoff_len: int | None = Field(None, ge=8, description="tokens seen at once when scored; by default as in training")
    stride: int | None = Field(None, ge=1, description="tokens by which windows move on; default: half of them")
    ngram_max_bytes: int = Field(16_000_000, ge=0, description="training text for the n-gram baseline; 0: no n-gram")
    max_rise: dict[str, float] = Field({}, description="category or language → how much more bits per byte than the "
                                                       "reference's are allowed: en: 0.03 is 3 %")
    on_rise: Literal["warn", "stop"] = Field("warn", description="where more is needed: a note, or the step fails")


class Forgotten(DanluError):
    """A model needs more bits for what it knew before than the recipe allows, and the recipe says to stop there."""


def text_references(settings: TextSettings) -> list[Reference]:
    """The corpus and the files outside."""
    found = [] if settings.corpus is None else [Reference(("corpus",), settings.corpus, ("corpus",))]
    return found + [Reference(("texts", place, "path"), source.path, (FILES, DOCSTRINGS), label=True)
                    for place, source in enumerate(settings.texts)]


def check_texts(settings: Any) -> None:
    """Raises ConfigError for a gate without anything to compare with, and for settings that nothing would read."""
    if settings.max_rise and (settings.reference is None or len(settings.models) < 2):
        raise ConfigError("max_rise compares with the reference, and there is none beside a model", key="max_rise",
                          hint="Name the untouched model among `models`, and set reference to it.")
    low = [name for name, value in settings.max_rise.items() if not 0 <= value < 100]
    if low:
        raise ConfigError(f"max_rise of “{low[0]}” is {settings.max_rise[low[0]]}; it is a share from 0: 0.03 means 3 %",
                          key=f"max_rise.{low[0]}")
    for place, source in enumerate(settings.texts):
        if "group" in source.model_fields_set:
            raise ConfigError("group says what is held out together, and of these files nothing is", key=f"texts.{place}")
    if settings.stride is not None and settings.cutoff_len is not None and settings.stride >= settings.cutoff_len:
        raise ConfigError(f"stride {settings.stride} leaves a window of {settings.cutoff_len} tokens no context",
                          key="stride", hint="Half of cutoff_len is usual.")


class Reading:
    """Everything about running text, model by model.

    names  what the models are called in the report, by what the recipe calls them
    notes  what a reader of the report should know; more are added here
    """

    def __init__(self, context: Context, names: Mapping[str, str], notes: list[str]) -> None:
        self.context, self.names, self.notes = context, names, notes
        self.settings: Any = context.settings
        self.texts = _documents(context, notes)  # by category
        if self.texts:
            stride_of(self.settings, window_of(context))  # before a model is opened
        self.losses: list[LossRow] = []
        self.bits: list[BitsRow] = []
        self._scores: dict[str, list[DocumentScore]] = {}
        from danlu.evals.figures import EVERYTHING

        known = set(self.texts) | {EVERYTHING, *_languages(self.texts)}
        for name in self.settings.max_rise:
            if name not in known:
                raise DataError(f"max_rise names “{name}”, and the text that is scored has "
                                f"{', '.join(sorted(known - {EVERYTHING}))}", where=context.step,
                                hint="Name a category or a language of the text, or all.")

    def measure(self, name: str, loaded: "Loaded", window: int) -> None:
        """Reads everything with one model."""
        from danlu.evals.figures import BitsRow
        from danlu.evals.perplexity import bits_per_byte, loss_rows, score_documents

        every: list[DocumentScore] = []
        for category, documents in self.texts.items():
            with self.context.progress(f"{name}: bits per byte, {category}", total=100) as bar:
                scores = score_documents(loaded.root, loaded.tokenizer, documents, context=window,
                                         stride=stride_of(self.settings, window),
                                         micro_batch_tokens=self.settings.micro_batch_tokens, progress=_percent(bar))
            result = bits_per_byte(scores)
            if result.num_inexact:
                self.notes.append(f"{name}: the tokens of {result.num_inexact} of {result.num_documents} {category} "
                                  "documents do not give back their text, so these bits are for a slightly different text")
            self.bits.append(BitsRow(category, name, "model", result.value, result.low, result.high, result.num_bytes,
                                     result.num_documents))
            every += scores
        if every:
            self._scores[name] = every
            self.losses += loss_rows(name, every)

    def rises(self) -> "list[RiseRow]":
        """Every model against the reference, by category and language and over everything."""
        from danlu.evals.forgetting import rise_rows

        if self.settings.reference is None:
            return []
        reference = self.names[self.settings.reference]
        if reference not in self._scores:
            return []
        return [row for name, scores in self._scores.items() if name != reference
                for row in rise_rows(name, scores, reference, self._scores[reference], self.settings.max_rise)]


def baselines(context: Context, texts: Mapping[str, Sequence[Document]], notes: list[str]) -> "list[BitsRow]":
    """gzip and xz of each category's text as a whole, and the n-gram model document by document."""
    from danlu.evals.baselines import ByteNgram, gzip_bits, xz_bits
    from danlu.evals.figures import BitsRow
    from danlu.evals.perplexity import bits_per_byte

    rows = []
    training = training_text(context, notes)
    model = ByteNgram.train(training) if training else None
    for category, documents in texts.items():
        parts = [document.text.encode() for document in documents]
        if model is not None:
            result = bits_per_byte([_by_bytes(document, model.bits(part)) for document, part in zip(documents, parts,
                                                                                                   strict=True)])
            rows.append(BitsRow(category, NGRAM, "baseline", result.value, result.low, result.high, result.num_bytes,
                                len(parts)))
        whole, num_bytes = b"\n".join(parts), sum(map(len, parts))
        for system, bits in (("xz -9", xz_bits(whole)), ("gzip -9", gzip_bits(whole))):
            # by the bytes that all systems are measured on, the line ends between documents are not among them
            rows.append(BitsRow(category, system, "baseline", bits / num_bytes, None, None, num_bytes, len(parts)))
    return rows


def _by_bytes(document: Document, bits: np.ndarray) -> "DocumentScore":
    """The score of a document each of whose bytes costs these bits: every one is a token."""
    from danlu.evals.perplexity import DocumentScore, blocks_of

    characters = np.repeat(np.arange(len(document.text)), [len(character.encode()) for character in document.text])
    return DocumentScore(document.id, len(bits), len(bits), float(bits.sum()), category=document.category,
                         num_chars=len(document.text), blocks=blocks_of(document.text, characters, bits))


def window_of(context: Context) -> int:
    """How many tokens every model may see at once: what the one that was trained on the fewest knows, to be fair."""
    from danlu.evals.lineage import trained_context

    settings: Any = context.settings
    folders = [context.inputs[text].folder for text in settings.models]
    trained = [trained_context(folder) for folder in folders if folder is not None]
    return settings.cutoff_len or min((length for length in trained if length is not None), default=LONGEST_WINDOW)


def stride_of(settings: Any, window: int) -> int:
    """By how many tokens windows move on. Raises ConfigError where that leaves no context."""
    if settings.stride is not None and settings.stride >= window:
        raise ConfigError(f"stride {settings.stride} leaves a window of {window} tokens no context", key="stride")
    return settings.stride or max(1, window // 2)


def gate(rises: "Sequence[RiseRow]") -> list[str]:
    """A sentence for each group that needs more than the recipe allows."""
    return [f"{row.model} needs {_percentage(row.value)} more bits per byte for “{row.group}” than {row.reference} "
            f"({row.bits_per_byte:.3f} instead of {row.reference_bits_per_byte:.3f}"
            + (f"; 95 % interval {_percentage(row.low)} to {_percentage(row.high)}"
               if row.low is not None and row.high is not None else "")
            + f"), and max_rise allows {_percentage(row.max_rise or 0.0)}" for row in rises if row.too_high]


def _percentage(share: float) -> str:
    return f"{100 * share:.1f} %".replace("-", "−")


def _percent(bar: Any) -> Callable[[float], None]:
    return lambda share: bar.update(100 * share)


def _languages(texts: Mapping[str, Sequence[Document]]) -> set[str]:
    from danlu.text.clean import language

    return {language(document.text) for documents in texts.values() for document in documents}


def _documents(context: Context, notes: list[str]) -> dict[str, list[Document]]:
    """The documents to be scored, by category; what there is beside them is read, but not held in memory."""
    from danlu.evals.perplexity import choose_documents
    from danlu.text.corpus import read_corpus

    settings: Any = context.settings
    sizes: dict[str, dict[str, int]] = {}  # category → source → bytes
    readings = 0

    def read() -> Iterator[Document]:
        nonlocal readings
        readings += 1
        if settings.corpus is not None:
            folder = context.inputs[settings.corpus].require_folder()
            yield from _some(read_corpus(folder, "heldout"), DataError(
                "holds no held-out documents", where=str(context.inputs[settings.corpus].folder),
                hint="Let the corpus step hold some out, or leave `corpus` away here."))
        for source in settings.texts:
            yield from _outside(source, context, notes if readings == 1 else [])

    def counted() -> Iterator[Document]:
        for document in read():
            if readings == 1:
                own = sizes.setdefault(document.category, {})
                own[document.source] = own.get(document.source, 0) + len(document.text.encode())
            yield document

    chosen, said = choose_documents(counted, settings.max_bytes)
    notes += said
    if settings.texts:
        for category, documents in chosen.items():
            notes += _left_out(category, sizes[category], documents)
    return chosen


def _some(documents: Iterator[Document], error: DataError) -> Iterator[Document]:
    """The documents; raises the error where none has any text."""
    empty = True
    for document in documents:
        empty = empty and not document.text
        yield document
    if empty:
        raise error


def _left_out(category: str, sizes: Mapping[str, int], chosen: Sequence[Document]) -> list[str]:
    """What of the files that somebody named is not scored, in words. `sizes`: of what there is, by source."""
    size, scored = sum(sizes.values()), sum(len(document.text.encode()) for document in chosen)
    if scored == size:
        return []
    missing = sorted(set(sizes) - {document.source for document in chosen})
    return [f"{scored:,} of the {size:,} bytes of {category} are scored (max_bytes)"
            + (f", none of {', '.join(missing[:MAX_NAMED])}" if missing else "")
            + (f" and {len(missing) - MAX_NAMED} other sources" if len(missing) > MAX_NAMED else "")]


def _outside(source: SourceConfig, context: Context, notes: list[str]) -> Iterator[Document]:
    """The documents of files outside, with not a byte changed; what cannot be read is told."""
    from danlu.text.clean import language

    ledger = Ledger()
    others = 0

    def wanted() -> Iterator[Document]:
        nonlocal others
        for document in read_documents(source, context.base, ledger):
            if source.language is not None and language(document.text) != source.language:
                others += 1
            else:
                yield document

    yield from _some(wanted(), DataError("holds no text to score", where=source.path))
    ledger.check()
    if ledger.num_quarantined:
        first = ledger.quarantined[0]
        notes.append(f"{ledger.num_quarantined} rows of {source.path} could not be read and are not scored, the first at "
                     f"{first.where}: {first.reason}")
    left = {reason: count.bytes for station in ledger.stations.values() for reason, count in station.dropped.items()
            if count.bytes and reason in (LINE_END, BLANK_LINE)}
    if left:
        notes.append(f"{sum(left.values()):,} bytes of {source.path} are not scored: {', '.join(left)}")
    if others:
        notes.append(f"{others} documents of {source.path} are not in {source.language} and are not scored")


def training_text(context: Context, notes: list[str]) -> list[bytes]:
    """The corpus's training documents for the n-gram model, as many as it may have; none without a corpus.

    The corpus is read twice, so that memory holds what is chosen and not the whole of it.
    """
    from danlu.evals.perplexity import beginning, choose_places
    from danlu.text.corpus import read_corpus

    settings: Any = context.settings
    if settings.corpus is None or settings.ngram_max_bytes == 0:
        return []
    folder: Path = context.inputs[settings.corpus].require_folder()
    total = 0

    def sizes() -> Iterator[tuple[str, int]]:
        nonlocal total
        for document in read_corpus(folder, "train"):
            size = len(document.text.encode())
            total += size
            yield document.id, size

    chosen = choose_places(sizes(), settings.ngram_max_bytes)
    wanted = dict(chosen)
    found = {place: beginning(document.text, wanted[place]).encode()
             for place, document in enumerate(read_corpus(folder, "train")) if place in wanted}
    parts = [found[place] for place, _ in chosen]
    if sum(map(len, parts)) < total:
        notes.append(f"the n-gram model learned from {sum(map(len, parts)):,} of the {total:,} bytes of training text")
    return [part for part in parts if part]
