"""From records to Examples on disk, as an artifact of their own beside the step's models.

`runs/<recipe>/<step>/examples-<first 8>/` holds `train/` and, where something is held out, `eval/`. Its name is the hash
of what makes it (data, tokenizer, lengths), so another learning rate does not tokenise again. One process writes it, the
others open the same bytes.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field, field_validator, model_validator

from danlu import __version__
from danlu.core.artifact import Artifact, digest, fresh_folder, open_artifact, publish
from danlu.core.config import Config, free
from danlu.core.errors import DataError
from danlu.core.examples import Example
from danlu.core.ledger import Ledger
from danlu.core.records import Dialogue, Document, Feedback, Labelled, Message, Preference, Prompt, Ranking
from danlu.data.store import ExampleStore, write_examples
from danlu.pipeline.context import DOCSTRINGS, FILES, STEP, TASK, Context
from danlu.text.rows import MAX_REFUSED
from danlu.tokens.codec import identity, num_ids
from danlu.tokens.templates import check_template, use_template

SCHEMA = 6
Record = Document | Dialogue | Preference | Ranking | Feedback | Labelled | Prompt
R = TypeVar("R", bound=Record)
Split = Literal["train", "heldout"]
HASH_RANGE = 1 << 32
SCHEMES = ("package", "docstrings", "task")  # what stands before a colon and is no name of data


class DataConfig(Config):
    """What is trained on, and what is held out of it."""

    dataset: str | list[str] = Field(description="steps, files, folders, globs, datasets' names, package:NAME/path or "
                                                 "task:NAME; as a list, or with commas between them")
    eval_dataset: str | list[str] | None = Field(None, description="what eval_loss is measured on")
    val_size: float = Field(0.0, ge=0, lt=1, description="share of the dataset that is held out for eval_loss, by hash")
    cutoff_len: int = Field(1024, ge=2, description="tokens of the longest example")
    max_samples: int | None = Field(None, ge=1, description="records taken from each dataset; prompts from each task")
    category: str | None = Field(None, description="the label by which losses are reported; default by kind of data")
    dataset_dir: str | None = free(None, min_length=1, description="folder in which all datasets named without / lie, "
                                                                   "with its dataset_info.json")
    max_refused: float = Field(MAX_REFUSED, ge=0, le=1, description="share of a dataset's rows that may be refused before "
                                                                    "the step stops; 0: it stops at the first")

    @model_validator(mode="before")
    @classmethod
    def _as_lists(cls, values: Any) -> Any:
        """Datasets with commas between them as a list, and those without a folder in `dataset_dir`."""
        if not isinstance(values, dict):
            return values
        folder = values.get("dataset_dir")
        written = {key: _split(values[key]) for key in ("dataset", "eval_dataset") if key in values}
        if not isinstance(folder, str) or not folder:
            return values | written
        found = {key: _named(value, folder) for key, value in written.items()}
        if found == written:
            raise ValueError("dataset_dir is set, and every dataset is named with a folder of its own: nothing would be "
                             "looked for there")
        return values | found

    @model_validator(mode="after")
    def _held_out_once(self) -> "DataConfig":
        if self.val_size and self.eval_dataset is not None:
            raise ValueError("val_size and eval_dataset cannot both be set")
        return self

    def datasets(self) -> list[str]:
        """The training data, as a list."""
        return [self.dataset] if isinstance(self.dataset, str) else list(self.dataset)

    def eval_datasets(self) -> list[str]:
        """The held-out data named apart, as a list."""
        if self.eval_dataset is None:
            return []
        return [self.eval_dataset] if isinstance(self.eval_dataset, str) else list(self.eval_dataset)


def _split(value: Any) -> Any:
    """A text with commas as a list; what stands in a list is taken as it is.

    Commas in brackets divide nothing, nor do those behind docstrings:, which has names with commas between them itself.
    """
    if not isinstance(value, str):
        return value
    parts, depth = [""], 0
    for character in value:
        depth = max(0, depth + (character in "[{(") - (character in ")}]"))
        if character == "," and not depth and not parts[-1].strip().startswith(f"{DOCSTRINGS}:"):
            parts.append("")
        else:
            parts[-1] += character
    return value if len(parts) == 1 else [part.strip() for part in parts]


def _named(value: Any, folder: str) -> Any:
    """What `dataset` says as `danlu.text.registry` knows it: a name in a folder is `folder/name`."""
    if isinstance(value, list):
        return [_named(item, folder) if isinstance(item, str) else item for item in value]
    plain = isinstance(value, str) and value and "/" not in value and value.partition(":")[0] not in SCHEMES
    return f"{folder.rstrip('/')}/{value}" if plain else value


class TemplateConfig(Config):
    """How dialogues are written; what is set here is saved with the model as its chat template."""

    template: str | None = Field(None, description="a built-in name, Jinja, or for sft a format string over columns; "
                                                   "default: the checkpoint's own template")
    default_system: str | None = Field(None, min_length=1, description="system message of dialogues that have none")
    enable_thinking: bool | None = Field(None, description="the template's variable of that name: whether answers think")
    add_special_tokens: str | list[str] | None = Field(
        None, min_length=1, description="tokens that the template writes and the model lacks: added to its tokenizer, each "
                                        "with a new row that begins as the mean of the others")

    @field_validator("add_special_tokens", mode="before")
    @classmethod
    def _tokens_as_list(cls, tokens: Any) -> Any:
        """Tokens with commas between them as a list, so that both ways to write them are one setting."""
        return [token.strip() for token in tokens.split(",")] if isinstance(tokens, str) and tokens else tokens

    def new_tokens(self) -> list[str]:
        """The tokens that the step adds to the vocabulary of its model."""
        return list(self.add_special_tokens or [])

    def use_template(self, tokenizer: Any, answer: str | list[str] | None = None) -> None:
        """Gives the tokenizer this template. Raises ConfigError where it does not fit."""
        use_template(tokenizer, self.template, self.default_system, self.enable_thinking, answer)

    def check_template(self, answer: str | list[str] | None = None, columns: bool = False) -> None:
        """Raises ConfigError where the settings are no template, before anything is opened."""
        check_template(self.template, answer, columns)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a stage makes its examples with a tokenizer: `read` gives (training records, held-out records) and counts
    each in its own ledger, `encode` makes their Examples. `corrupted`: as `write_examples` has it."""

    settings: dict[str, Any]
    tokenizer: Any
    read: Callable[[Ledger, Ledger], tuple[Iterable[Any], Iterable[Any]]]
    encode: Callable[[Iterable[Any], Ledger], Iterator[Example]]
    corrupted: bool = False


@dataclass(frozen=True, slots=True)
class Prepared:
    """The opened examples; `held_out` is None where nothing is. `reference` names the folder of a reference's column."""

    artifact: Artifact
    train: ExampleStore
    held_out: ExampleStore | None
    reference: str = ""


def prepare(context: Context, recipe: Recipe) -> Prepared:
    """Opens the step's examples, made by the main process if they are not there yet."""
    recipe = recipe if context.watch is None else context.watch(recipe)
    parents = {text: context.inputs[text].fingerprint for text in _datasets(context)}
    key = _key(context, recipe)
    final = context.work.parent / f"examples-{key[:8]}"
    ready = True
    try:
        if context.world.is_main and not final.exists():
            ready = False
            _write(context, recipe, final, key, parents)
            ready = True
    finally:
        everyone = context.world.agree(ready)
    if not everyone:
        raise DataError("the main process could not prepare the examples; its message says why")
    artifact = open_artifact(final, kind="examples", deep=context.world.is_main)
    if artifact.fingerprint != key:
        raise DataError("holds other examples than this step needs", where=str(final), hint="Remove that folder.")
    held_out = ExampleStore(final / "eval") if (final / "eval").is_dir() else None
    return Prepared(artifact, ExampleStore(final / "train"), held_out)


def _datasets(context: Context) -> list[str]:
    return sorted({*context.settings.datasets(), *context.settings.eval_datasets()})


def _key(context: Context, recipe: Recipe) -> str:
    """The hash of what makes the examples: of a step what it made, not its name; the seed where it draws."""
    inputs, settings = context.inputs, dict(recipe.settings)
    for name, texts in (("dataset", context.settings.datasets()), ("eval_dataset", context.settings.eval_datasets())):
        settings[name] = [["" if inputs[text].kind == STEP else text, inputs[text].fingerprint] for text in texts]
    drawn = settings.get("make_rejected") or any(inputs[text].kind == TASK for text in _datasets(context))
    return digest({"schema": SCHEMA, "settings": settings, "tokenizer": identity(recipe.tokenizer),
                   "seed": context.seed if drawn else None})


def _write(context: Context, recipe: Recipe, final: Path, key: str, parents: dict[str, str]) -> None:
    work = fresh_folder(final.with_name(f".work-{final.name}"))
    ledger, held_out_ledger = Ledger(), Ledger()
    for text in context.settings.datasets():
        if context.inputs[text].kind in (FILES, DOCSTRINGS) and not context.inputs[text].produces:
            ledger.station(f"read:{text}")  # first on the road, though a lazy reader asks for it last
    train, held_out = recipe.read(ledger, held_out_ledger)
    counts, vocab_size = {}, num_ids(recipe.tokenizer)
    with context.progress("preparing examples") as bar:
        for name, records, book in (("train", train, ledger), ("eval", held_out, held_out_ledger)):
            folder = work / name
            folder.mkdir()
            summary = write_examples(folder, _watched(recipe.encode(records, book), bar), vocab_size,
                                     corrupted=recipe.corrupted)
            counts[name] = {"num_examples": summary.num_examples, "num_tokens": summary.num_tokens,
                            "num_targets": summary.num_targets}
    if counts["train"]["num_examples"] == 0:
        reasons = ledger.to_json()["stations"]
        dropped = {reason: count["rows"] for station in reasons for reason, count in station["dropped"].items()}
        told = ", ".join(f"{count} × {reason}" for reason, count in dropped.items() if count) or "no record was found"
        raise DataError(f"the dataset gives nothing to train on: {told}", where=", ".join(parents))
    if counts["eval"]["num_examples"] == 0 and recipe.settings["eval_dataset"] is not None:
        raise DataError("the eval_dataset gives nothing to evaluate on", where=str(recipe.settings["eval_dataset"]))
    if counts["eval"]["num_examples"] == 0:
        for path in (work / "eval").iterdir():
            path.unlink()
        (work / "eval").rmdir()
    if any(station.came.rows for station in held_out_ledger.stations.values()):
        ledger.absorb(held_out_ledger, "eval: ")
    ledger.save(work)
    publish(work, final, kind="examples", fingerprint=key, parents=parents, config=recipe.settings, metrics=counts,
            code=__version__)


def _watched(examples: Iterator[Example], bar: Any) -> Iterator[Example]:
    tokens = 0
    for number, example in enumerate(examples, 1):
        tokens += example.num_tokens
        if number % 256 == 0:
            bar.update(number, tokens=tokens)
        yield example


def joined_datasets(context: Context, records: Callable[[str, Ledger, Split], Iterable[R]]
                    ) -> Callable[[Ledger, Ledger], tuple[Iterable[R], Iterable[R]]]:
    """How a step reads its datasets one after another; `val_size` holds out a share of all of them together.

    records  of (dataset, ledger, split)
    """
    settings = context.settings

    def read(ledger: Ledger, held_out_ledger: Ledger) -> tuple[Iterable[R], Iterable[R]]:
        def train(book: Ledger) -> Iterable[R]:
            return chain.from_iterable(records(text, book, "train") for text in settings.datasets())

        if settings.eval_dataset is None:
            return split_by_hash(train, settings.val_size, ledger)
        held_out = (records(text, held_out_ledger, "heldout") for text in settings.eval_datasets())
        return train(ledger), chain.from_iterable(held_out)

    return read


def datasets_in_parts(context: Context, parts: Callable[[str, Ledger, Split, float], tuple[Iterable[R], Iterable[R]]]
                      ) -> Callable[[Ledger, Ledger], tuple[Iterable[R], Iterable[R]]]:
    """How a step reads its datasets one after another where each says itself what of it is held out.

    parts  (training records, held-out records) of (dataset, ledger, split, share to hold out)
    """
    settings = context.settings

    def read(ledger: Ledger, held_out_ledger: Ledger) -> tuple[Iterable[R], Iterable[R]]:
        found = [parts(text, ledger, "train", settings.val_size) for text in settings.datasets()]
        train = chain.from_iterable(part for part, _ in found)
        if settings.eval_dataset is None:
            return train, chain.from_iterable(held_out for _, held_out in found)
        return train, chain.from_iterable(parts(text, held_out_ledger, "heldout", 0.0)[0]
                                          for text in settings.eval_datasets())

    return read


def split_by_hash(read: Callable[[Ledger], Iterable[R]], share: float, ledger: Ledger) -> tuple[Iterable[R], Iterable[R]]:
    """(training records, held-out records): a record's content decides (of a preference its prompt), so that equal ones
    stay on one side.

    read  all of them, from the beginning, counted in a ledger: what is held out is read a second time, and counted the
          first time, so that however much it is nothing is kept in memory
    """
    if share == 0:
        return read(ledger), []
    station = ledger.station("held out")

    def train() -> Iterator[R]:
        for record in read(ledger):
            size = record.num_bytes
            station.take(rows=1, bytes=size)
            if _is_held_out(record, share):
                station.drop("held out for eval_loss", rows=1, bytes=size)
            else:
                station.give(rows=1, bytes=size)
                yield record

    return train(), (record for record in read(Ledger()) if _is_held_out(record, share))


def _is_held_out(record: Record, share: float) -> bool:
    if isinstance(record, Labelled):
        content = repr((record.text, record.other))
    else:
        content = record.context + record.text if isinstance(record, Document) else _stated(record.messages)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=4).digest(), "big") < share * HASH_RANGE


def _stated(messages: Sequence[Message]) -> str:
    """What decides of a dialogue whether it is held out, in a form of its own that no further field of Message changes:
    a split that was once made stays."""
    turns = [f"Message(role={turn.role!r}, content={turn.content!r}, thinking={turn.thinking!r}, "
             f"tool_calls={turn.tool_calls!r}, weight={turn.weight!r})" for turn in messages]
    return f"({', '.join(turns)}{',' if len(turns) == 1 else ''})"


def first(records: Iterable[R], count: int | None, ledger: Ledger, name: str) -> Iterator[R]:
    """The first `count` records; what lies behind them is counted, not lost."""
    if count is None:
        yield from records
        return
    station = ledger.station(f"max_samples:{name}")
    for number, record in enumerate(records):
        size = record.num_bytes
        station.take(rows=1, bytes=size)
        if number < count:
            station.give(rows=1, bytes=size)
            yield record
        else:
            station.drop("beyond max_samples", rows=1, bytes=size)
