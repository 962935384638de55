"""The stage `expand`: a model's vocabulary grows by pieces that are given or learned, and its tables with it.

    grown:
      stage: expand
      model: HuggingFaceTB/SmolLM2-135M
      pieces: pieces.jsonl             # {"piece": "你好"}, one a line; without it they are learned from `dataset`
      dataset: corpus                  # text to learn from, and to measure on
      num_pieces: 8000
      pad_to_multiple_of: 64

The artifact is a model folder. `growth.json` in it says where the new rows begin (`first_new_id`, also in the metrics and
in the model's config, where models that are trained from this one keep it), what each new token was spelled with, and which
of them each category's texts use.
"""

import copy
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from danlu.core.config import Config
from danlu.core.errors import ConfigError, DataError
from danlu.core.ledger import Ledger
from danlu.core.records import Document
from danlu.pipeline.context import DOCSTRINGS, FILES, HUB, Context, Forecast, Input, Reference
from danlu.pipeline.models import model_config, place
from danlu.pipeline.vocabulary import Change, change_notes, change_tables, measure
from danlu.text.clean import language
from danlu.text.pieces import read_pieces
from danlu.text.read import SourceConfig, read_corpus, read_documents
from danlu.tokens.expand import MAX_PIECE_LENGTH, Growth, grow, kept_ids, stripped
from danlu.tokens.learn import learn_pieces
from danlu.tokens.spelling import Spelling

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

    from danlu.core.artifact import Artifact

KIND = "model"
SCHEMA = 3
GROWTH_FILE = "growth.json"
TOKENIZER = ".tokenizer"  # where the grown tokenizer lies until the model is written
TOP = 20  # of the most used new tokens that metrics name for each category


class Settings(Config):
    """The settings of `stage: expand`."""

    model: str = Field(description="a step, folder or hub id")
    pieces: str | None = Field(None, description="file of pieces, {\"piece\": …} a line; default: learned from dataset")
    dataset: str | list[str] | None = Field(None, description="corpus steps or files to learn from and to measure on")
    mode: Literal["merge", "replace"] = Field("merge", description="add to the vocabulary, or put pieces in its place")
    num_pieces: int | None = Field(None, ge=1, le=1_000_000, description="the most pieces that are added; default: all")
    max_piece_length: int = Field(16, ge=1, le=MAX_PIECE_LENGTH, description="characters of the longest piece")
    min_count: int = Field(10, ge=1, description="a learned piece saves so many tokens in the text it is learned from")
    learn_ascii: bool = Field(False, description="learn pieces with ASCII characters too; English text then changes")
    learn_categories: list[str] | None = Field(None, description="categories whose text is learned from; default: all")
    max_bytes_per_category: int = Field(20_000_000, ge=1, description="of a category so much text is learned from")
    init: Literal["mean", "norm_matched", "random"] = Field("mean", description="what new rows begin as")
    pad_to_multiple_of: int | None = Field(None, ge=2, description="rows are padded to a multiple of this")

    def datasets(self) -> list[str]:
        """What is read, as a list."""
        return [] if self.dataset is None else [self.dataset] if isinstance(self.dataset, str) else list(self.dataset)

    @model_validator(mode="after")
    def _pieces_come_from_somewhere(self) -> "Settings":
        if self.pieces is None and not self.datasets():
            raise ValueError("there is neither a file of pieces nor a dataset to learn them from")
        if self.pieces is None and self.num_pieces is None:
            raise ValueError("num_pieces is missing: how many pieces are to be learned")
        learning = {"min_count", "learn_ascii", "learn_categories", "max_bytes_per_category"} & self.model_fields_set
        if self.pieces is not None and learning:
            raise ValueError(f"{min(learning)} is about learning pieces, and these are given")
        return self


def references(settings: Settings) -> list[Reference]:
    """The model, the pieces and the texts."""
    found = [Reference(("model",), settings.model, ("model", FILES, HUB))]
    if settings.pieces is not None:
        found.append(Reference(("pieces",), settings.pieces, (FILES,)))
    one = not isinstance(settings.dataset, list)
    return found + [Reference(("dataset",) if one else ("dataset", i), text, ("corpus", FILES, DOCSTRINGS))
                    for i, text in enumerate(settings.datasets())]


def forecast(settings: Settings, inputs: Mapping[str, Input]) -> Forecast:
    """The grown config, so that later steps can be forecast, and where the new rows begin, where the model is there."""
    from danlu.models.embeddings import num_rows
    from danlu.models.freeze import FIRST_NEW_ID
    from danlu.models.load import load_tokenizer
    from danlu.tokens.codec import backend_of

    config, item = copy.deepcopy(model_config(settings, inputs)), inputs[settings.model]
    if config is None:
        return Forecast(notes=("the model is not there yet: no size",))
    text, pieces = config.get_text_config(), _forecast_pieces(settings, inputs)
    rows, notes = text.vocab_size, []
    if item.folder is not None:
        backend = backend_of(load_tokenizer(item.folder))
        first = first_new_id(item.folder, config)
        if settings.mode == "replace":
            first = len(kept_ids(Spelling(backend), named_ids(item.folder, config)))
        rows = 0 if settings.mode == "replace" else rows
        notes.append(f"new tokens begin at id {first:,}")
    else:
        first = rows
    text.vocab_size = num_rows(first + pieces, settings.pad_to_multiple_of, at_least=rows)
    setattr(config, FIRST_NEW_ID, first)
    return Forecast(notes=[f"at most {pieces:,} pieces, and the parts that they need", *notes],
                    facts={"config": config, "vocab_size": text.vocab_size})


def _forecast_pieces(settings: Settings, inputs: Mapping[str, Input]) -> int:
    """The most pieces that there can be."""
    if settings.pieces is None:
        return settings.num_pieces or 0
    lines = 0
    for path in inputs[settings.pieces].files:
        with open(path, "rb") as file:
            lines += sum(1 for _ in file)
    return min(lines, settings.num_pieces or lines)


def check(settings: Settings, inputs: Mapping[str, Input]) -> None:
    """Whether the model and its tokenizer are of a kind that can grow, where they are there."""
    from danlu.models.load import load_tokenizer
    from danlu.tokens.codec import backend_of

    folder, config = inputs[settings.model].folder, model_config(settings, inputs)
    made_for = next(iter((config and config.architectures) or ()), "")
    if config is not None and (config.is_encoder_decoder or made_for.endswith(("ForMaskedLM", "ForPreTraining"))):
        raise ConfigError(f"{made_for or config.model_type} is no causal language model, and only their vocabularies grow",
                          key="model", hint="Train a tokenizer of its own, and the model from nothing, for other kinds.")
    if folder is not None:
        try:
            Spelling(backend_of(load_tokenizer(folder)))
        except ConfigError as error:
            raise ConfigError(error.message, key="model", hint=error.hint) from None


def first_new_id(source: Path | str, config: Any) -> int:
    """The id behind all that the tokenizer has and all that a config names.

    Rows that no id belongs to (padding to a multiple) are taken by new tokens: nothing ever produced or read them.
    """
    from danlu.models.load import load_tokenizer
    from danlu.tokens.codec import num_ids

    rows = config.get_text_config().vocab_size
    return max(num_ids(load_tokenizer(source)), *(id + 1 for id in named_ids(source, config) if id < rows), 0)


def named_ids(source: Path | str, config: Any) -> set[int]:
    """The ids that a model's config and its generation config name."""
    from transformers import GenerationConfig

    configs = [config]
    with suppress(OSError):  # many models have none
        configs.append(GenerationConfig.from_pretrained(str(source)))
    values = [value for each in configs for _, value in token_ids(each)]
    return {id for value in values for id in (value if isinstance(value, list) else [value])}


def token_ids(config: Any) -> list[tuple[str, Any]]:
    """The entries of a config that name ids: `eos_token_id`, `image_token_index`, lists of them, …"""
    return [(key, value) for key, value in config.to_dict().items()
            if key.endswith(("token_id", "token_ids", "token_index")) and
            (isinstance(value, int) or (isinstance(value, list) and all(isinstance(id, int) for id in value)))]


def run(context: Context) -> dict[str, Any]:
    """Grows the tokenizer, measures it, grows the model and compares it with what it was."""
    from danlu.models.export import TEXT
    from danlu.models.load import load_config, load_tokenizer
    from danlu.tokens.codec import Codec, backend_of

    settings, ledger = context.settings, Ledger()
    source = place(context.inputs[settings.model])
    tokenizer = load_tokenizer(source)
    growth = grow_vocabulary(context, backend_of(tokenizer), source, ledger)
    if not growth.tokens and settings.mode == "merge":
        reasons = Counter(reason for _, reason in growth.refused).most_common(TOP)
        raise DataError("no piece is new: the vocabulary stays as it is"
                        + "".join(f"\n  {count:,} refused: {reason}" for reason, count in reasons), where=context.step,
                        hint="Give other pieces." if settings.pieces else "Give more text, or a lower min_count.")
    folder = context.work / TOKENIZER
    growth.write(_files_of(source), folder)
    load_config(source).save_pretrained(folder)  # beside it transformers may open a tokenizer as another class
    grown = load_tokenizer(folder)
    change = Change(Codec(tokenizer), Codec(grown), growth)
    with context.progress("measuring") as bar:
        measure(change, _measured(context))
        change.compare_also(TEXT.splitlines())
        bar.update(sum(count.characters for count in change.by_language.values()))
    metrics = _grow_model(context, source, growth, grown, change)
    shutil.rmtree(folder)
    ledger.save(context.work)
    used = change.used_pieces()
    recut = change.recut_pieces()
    metrics |= {"first_new_id": growth.first_id, "mode": settings.mode, **change.summary(),
                "most_used": {name: list(found)[:TOP] for name, found in used.items()}, "most_recut": list(recut)[:TOP],
                "unreached": len(growth.unreached)}
    _write_growth(context.work / GROWTH_FILE, growth, metrics["rows"], {"used": used, "recut": recut})
    return metrics


def _write_growth(path: Path, growth: Growth, rows: int, counted: Mapping[str, Any]) -> None:
    """Writes `growth.json`, one new token a line."""
    head = {"first_new_id": growth.first_id, "num_ids": growth.num_ids, "rows": rows, "unreached": growth.unreached,
            **counted, "tokens": []}
    tokens = [json.dumps({"id": token.id, "piece": growth.old.text(token.token), "token": token.token,
                          "parts": token.parts, "wanted": token.wanted}, ensure_ascii=False) for token in growth.tokens]
    text = json.dumps(head, ensure_ascii=False).removesuffix("]}") + "\n" + ",\n".join(tokens) + "\n]}\n"
    path.write_text(text, encoding="utf-8")


def published(artifact: "Artifact", console: "Console") -> None:
    """Shows what the step has changed."""
    for table in change_tables(artifact.metrics):
        console.print(table)
    found = artifact.metrics
    for note in change_notes(found):
        console.print(note, markup=False, highlight=False)
    if found["logits_difference"] is None:
        console.print("no text kept its ids, so no logits could be compared", markup=False)
    else:
        console.print(f"old logits on {found['logits_tokens']:,} tokens of text that kept its ids: the same up to "
                      f"{found['logits_difference']:.1e} of the largest one", markup=False, highlight=False)


def grow_vocabulary(context: Context, backend: Any, source: Path | str, ledger: Ledger) -> Growth:
    """The grown tokenizer; every piece is in the ledger, those that were refused with their reasons."""
    from danlu.models.load import load_config

    settings, config = context.settings, load_config(source)
    if settings.pieces is not None:
        named = list(read_pieces(settings.pieces, context.base, ledger))
    else:
        spelling = Spelling(backend)
        reads = stripped(spelling, kept_ids(spelling, named_ids(source, config))) if settings.mode == "replace" else backend
        with context.progress("learning pieces") as bar:
            texts = (document.text for document in _learned(context, ledger, bar))
            learned = learn_pieces(reads, texts, settings.num_pieces or 1, min_count=settings.min_count,
                                   max_length=settings.max_piece_length, ascii=settings.learn_ascii)
        named = [("learned", piece) for piece in learned]
    with context.progress("growing the vocabulary"):
        growth = grow(backend, [piece for _, piece in named], first_new_id(source, config), num_pieces=settings.num_pieces,
                      max_length=settings.max_piece_length, replace=settings.mode == "replace",
                      keep=named_ids(source, config))
    station = ledger.station("pieces")
    station.take(rows=len(named))
    for number, reason in growth.refused:
        station.drop(reason, rows=1)
        ledger.quarantine(named[number][0], reason, named[number][1])
    wanted = sum(token.wanted for token in growth.tokens)
    station.give(rows=wanted)
    station = ledger.station("vocabulary")
    station.take(rows=wanted)
    if len(growth.tokens) > wanted:
        station.add("parts that pieces need", rows=len(growth.tokens) - wanted)
    station.give(rows=len(growth.tokens))
    return growth


def _files_of(source: Path | str) -> Path:
    """The folder of the tokenizer's files; of a hub id they are fetched."""
    if isinstance(source, Path):
        return source
    from huggingface_hub import snapshot_download

    from danlu.models.load import TOKENIZER_FILES

    return Path(snapshot_download(source, allow_patterns=list(TOKENIZER_FILES)))


def _documents(context: Context, ledger: Ledger, split: Literal["train", "heldout"]) -> Iterator[Document]:
    """The documents behind `dataset`; of files all for training and none held out."""
    for text in context.settings.datasets():
        item = context.inputs[text]
        if item.produces == "corpus":
            yield from read_corpus(item.require_folder(), split)
        elif split == "train":
            yield from read_documents(SourceConfig(path=text), context.base, ledger)


def _learned(context: Context, ledger: Ledger, bar: Any) -> Iterator[Document]:
    """The documents to learn from: of each category the first `max_bytes_per_category`."""
    settings, read, found = context.settings, dict[str, int](), set[str]()
    station = ledger.station("learn")
    for document in _documents(context, ledger, "train"):
        size = len(document.text.encode())
        found.add(document.category)
        station.take(rows=1, bytes=size)
        before = read.get(document.category, 0)
        room = settings.max_bytes_per_category - before
        if settings.learn_categories is not None and document.category not in settings.learn_categories:
            station.drop("another category", rows=1, bytes=size)
            continue
        if size > room:
            document = replace(document, text=document.text.encode()[:room].decode(errors="ignore"))
            left = len(document.text.encode())
            station.drop("beyond max_bytes_per_category", rows=0 if left else 1, bytes=size - left)
            read[document.category] = settings.max_bytes_per_category
        else:
            left = size
            read[document.category] = before + size
        if left:
            station.give(rows=1, bytes=left)
            bar.update(sum(read.values()))
            yield document
    for name in settings.learn_categories or ():
        if name not in found:
            raise DataError(f"no document is of the category “{name}”, which learn_categories names",
                            where=", ".join(settings.datasets()), hint=f"The data hold: {', '.join(sorted(found))}.")


def _measured(context: Context) -> Iterator[Document]:
    """What the change is measured on: held-out documents; those for training in categories that hold none out; without
    a dataset a few lines of danlu's own, their language for category."""
    from danlu.models.export import TEXT

    held_out = set()
    for document in _documents(context, Ledger(), "heldout"):
        held_out.add(document.category)
        yield document
    for document in _documents(context, Ledger(), "train"):
        if document.category not in held_out:
            yield document
    if not context.settings.datasets():
        for number, line in enumerate(TEXT.splitlines()):
            yield Document(line, "danlu", str(number), language(line))


def _grow_model(context: Context, source: Path | str, growth: Growth, tokenizer: Any, change: Change) -> dict[str, Any]:
    """Gives the model its new rows, compares it with what it was and writes it. Returns sizes before and after."""
    import torch

    from danlu.models.attention import leave_packed
    from danlu.models.embeddings import Fill, check_logits, logits_on, num_rows, resize
    from danlu.models.freeze import FIRST_NEW_ID
    from danlu.models.load import load_config, load_model, write_model
    from danlu.tokens.codec import num_ids

    settings: Settings = context.settings
    dtype = load_config(source).dtype
    loaded = load_model(source)  # in float32, which holds every number of the shorter formats
    lm, old_ids = loaded.lm, num_ids(loaded.tokenizer)
    leave_packed(lm)
    rows_before, parameters = lm.config.get_text_config().vocab_size, lm.num_parameters()
    columns = min(old_ids, growth.first_id)
    before = logits_on(lm, change.rows, columns)
    replaced = growth.kept is not None
    rows = num_rows(growth.num_ids, settings.pad_to_multiple_of, at_least=0 if replaced else rows_before)
    resize(lm, Fill(0 if replaced else growth.first_id, growth.sources(), old_ids, settings.init, context.seed), rows)
    difference = check_logits(before, logits_on(lm, change.rows, columns)) if before else None
    name_ids(lm, growth, rows)
    setattr(lm.config, FIRST_NEW_ID, growth.first_id)  # steps after this one keep it: train_rows_from: grown
    if isinstance(dtype, torch.dtype):
        lm.to(dtype)  # type: ignore[arg-type]  # transformers wraps `to` without its types
    write_model(lm, tokenizer, context.work, ())
    return {"num_ids": growth.num_ids, "rows": rows, "parameters": lm.num_parameters(), "num_ids_before": old_ids,
            "rows_before": rows_before, "parameters_before": parameters, "pieces": sum(t.wanted for t in growth.tokens),
            "parts": sum(not token.wanted for token in growth.tokens), "merges": growth.num_merges,
            "logits_difference": difference, "logits_tokens": sum(map(len, change.rows))}


def name_ids(lm: "PreTrainedModel", growth: Growth, rows: int) -> None:
    """Lets both configs name the ids that their tokens now have, and keeps rows without a token from being generated."""
    replaced = growth.kept is not None
    new = {old: id for id, old in enumerate(growth.kept or ())}
    assert lm.generation_config is not None, "every causal language model has one"
    for config in (lm.config, lm.generation_config):
        for key, value in token_ids(config) if replaced else ():  # an id without a token names nothing any more
            setattr(config, key, [new[id] for id in value if id in new] if isinstance(value, list) else new.get(value))
    suppressed = [id for id in lm.generation_config.suppress_tokens or [] if id < growth.first_id and not replaced]
    suppressed += range(growth.num_ids, rows)
    lm.generation_config.suppress_tokens = suppressed or None
