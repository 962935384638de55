"""The corpus stage as a whole: counts, held-out groups, bytes."""

import hashlib
import io
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from rich.console import Console

from danlu.core.errors import ConfigError, DataError
from danlu.pipeline.context import Context, Input, SingleProcess
from danlu.pipeline.stages import corpus
from danlu.pipeline.stages.corpus import Group, Settings, Size, choose_heldout
from danlu.text.clean import measured
from danlu.text.files import resolve
from danlu.text.read import read_corpus
from danlu.text.spool import place_of


@pytest.fixture
def base(tmp_path: Path) -> Path:
    texts = tmp_path / "texts"
    texts.mkdir()
    for n in range(40):
        (texts / f"{n:02}.txt").write_text(f"Chapter {n}: it was a bright day, the {n}th of the month.\r\n")
    (texts / "copy.txt").write_text("CHAPTER 3: it was a bright day, the 3th of the month.\n")
    rows = [{"text": f"第{n}回：话说天下大势，分久必合，合久必分。"} for n in range(60)]
    (tmp_path / "zh.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + '\n{oops\n{"text": "12345"}\n')
    return tmp_path


def run(base: Path, work: str, **keys) -> dict:
    sources = [{"path": "texts", "category": "en"}, {"path": "zh.jsonl", "category": "zh"}]
    settings = Settings(**{"sources": sources, **keys})
    inputs = {reference.text: Input(reference.text, "files", "f", files=resolve(reference.text, base))
              for reference in corpus.references(settings)}
    assert corpus.forecast(settings, inputs).tokens is not None
    (base / work).mkdir()
    console = Console(file=io.StringIO(), width=200)
    metrics = corpus.run(Context("corpus", settings, 0, inputs, base / work, "f", base, SingleProcess(), console))
    metrics["printed"] = console.file.getvalue()
    return metrics


def test_the_corpus_and_its_counts(base: Path) -> None:
    metrics = run(base, "w", heldout_share=0.2)
    train, heldout = list(read_corpus(base / "w", "train")), list(read_corpus(base / "w", "heldout"))
    assert len(train) + len(heldout) == 40 + 60 and len(heldout) > 5
    assert not {document.id for document in train} & {document.id for document in heldout}
    assert metrics["train"]["documents"] == len(train)
    assert metrics["heldout"]["bytes"] == sum(len(document.text.encode()) for document in heldout)
    assert metrics["categories"]["zh"]["train"]["documents"] == sum(document.category == "zh" for document in train)
    assert (metrics["duplicates"], metrics["cleaned_away"], metrics["quarantined"]) == (1, 1, 1)
    assert sorted(metrics["language_bytes"]) == ["en", "zh"]
    assert sorted(path.name for path in (base / "w").iterdir()) == [
        "heldout-00000.parquet", "ledger.json", "quarantine.jsonl", "report.html", "report.json", "train-00000.parquet"]
    saved = json.loads((base / "w" / "ledger.json").read_text())
    stations = {station["name"]: station for station in saved["stations"]}
    assert list(stations) == ["read:texts", "read:zh.jsonl", "clean", "dedup", "split"]
    assert stations["clean"]["in"]["rows"] == 41 + 61 and stations["split"]["out"]["rows"] == 100


def test_the_same_bytes_again_and_another_share_keeps_what_was_held_out(base: Path) -> None:
    run(base, "a", heldout_share=0.1)
    run(base, "b", heldout_share=0.1)
    run(base, "c", heldout_share=0.3)
    for name in ("train-00000.parquet", "heldout-00000.parquet", "ledger.json", "report.json"):
        hashes = {hashlib.sha256((base / work / name).read_bytes()).hexdigest() for work in "ab"}
        assert len(hashes) == 1
    held = [{document.id for document in read_corpus(base / work, "heldout")} for work in "ac"]
    assert held[0] < held[1]


def test_held_out_by_pattern_bytes_and_group(base: Path) -> None:
    metrics = run(base, "a", heldout=["texts/1?.txt"], heldout_share=0)
    held = {document.source for document in read_corpus(base / "a", "heldout")}
    assert held == {f"texts/1{n}.txt" for n in range(10)}
    assert metrics["heldout"]["documents"] == 10
    metrics = run(base, "b", heldout_share=0.5, heldout_bytes=300)
    assert all(0 < splits["heldout"]["bytes"] <= 300 for splits in metrics["categories"].values())
    sources = [{"path": "zh.jsonl", "group": "file"}, {"path": "texts"}]
    run(base, "c", sources=sources, heldout=["zh.jsonl:7"], heldout_share=0)
    assert len(list(read_corpus(base / "c", "heldout"))) == 60, "the whole file goes with its one document"
    with pytest.raises(ConfigError, match="matches no document"):
        run(base, "d", heldout=["nothing*"])
    with pytest.raises(ConfigError, match=r"“texts/copy\.txt” in “heldout” matches no document that stays") as caught:
        run(base, "e", heldout=["texts/03.txt", "texts/copy.txt"])
    assert caught.value.hint == "It matches 1, all of which were dropped as duplicates."


def test_files_that_are_not_read_are_counted_and_said(base: Path) -> None:
    for name in ("a.log", "b.zip", ".c.txt"):
        (base / "texts" / name).write_text("text")
    (base / "texts" / "link").symlink_to(base)
    metrics = run(base, "a")
    assert "texts: 2 files of other kinds are not read" in metrics["printed"]
    [station] = [item for item in json.loads((base / "a" / "ledger.json").read_bytes())["stations"]
                 if item["name"] == "read:texts"]
    assert station["notes"] == {"not read: files of other kinds": 2, "not read: hidden files": 1,
                                "not read: links to folders": 1}


def test_rows_without_the_field_are_told_which_setting_names_it(base: Path) -> None:
    (base / "rows.jsonl").write_text('{"content": "A bright day."}\n' * 30)
    with pytest.raises(DataError, match=r"no field “text” \(fields found: content\)") as caught:
        run(base, "a", sources=[{"path": "rows.jsonl"}])
    assert "Name the field that holds the text: field" in str(caught.value.hint)
    assert run(base, "b", sources=[{"path": "rows.jsonl", "field": "content"}], heldout_share=0)["duplicates"] == 29


def test_what_is_measured_is_of_the_text_that_stays(base: Path) -> None:
    shared = "版权所有，请勿转载。本页面的内容由编辑部整理，仅供参考使用。"
    rows = [{"text": f"{shared}\n\nChapter {n}: it was a bright day, the {n}th of the month!"} for n in range(9)]
    (base / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run(base, "a", sources=[{"path": "rows.jsonl"}], heldout_share=0, dedup_paragraphs=True)
    columns = pq.read_table(base / "a" / "train-00000.parquet").to_pydict()
    assert len(columns["text"]) == 9 and sum(shared in text for text in columns["text"]) == 1
    for text, chars, han, symbols in zip(*(columns[name] for name in ("text", "chars", "han_ratio", "symbol_ratio"))):
        assert {"chars": chars, "han_ratio": han, "symbol_ratio": symbols} == measured(text)
    report = json.loads((base / "a" / "report.json").read_bytes())
    assert report["categories"]["text"]["lengths"] == {"32": 8, "64": 1}


def test_corpora_that_cannot_be_meant(base: Path) -> None:
    with pytest.raises(DataError, match="no document is left"):
        run(base, "a", sources=[{"path": "texts"}], clean={"min_chars": 1000})
    with pytest.raises(DataError, match="nothing is left to train on"):
        run(base, "b", heldout=["*"])
    with pytest.raises(DataError, match=r"zh.jsonl:61: bad JSON"):
        run(base, "c", sources=[{"path": "zh.jsonl", "max_refused": 0}])


def test_a_category_with_nothing_held_out_is_said(base: Path) -> None:
    name = "[red]en[/] [/nothing] \x1b[2J"
    metrics = run(base, "a", sources=[{"path": "texts", "category": name, "group": "package"}], heldout_share=0.01)
    assert "nothing of “[red]en[/] [/nothing] ␛[2J” is held out" in metrics["printed"], "data are no markup"


def test_a_limit_that_nothing_reads_is_refused() -> None:
    with pytest.raises(ValidationError, match="heldout_bytes limits what heldout_share holds out"):
        Settings(sources=[{"path": "x"}], heldout_share=0, heldout_bytes=100)
    assert Settings(sources=[{"path": "x"}], heldout_bytes=0).heldout_bytes == 0


def test_language_filter(base: Path) -> None:
    metrics = run(base, "a", sources=[{"path": "texts", "language": "zh"}, {"path": "zh.jsonl", "language": "zh"}])
    assert set(metrics["language_bytes"]) == {"zh"}
    assert metrics["cleaned_away"] == 41 + 1


def test_choosing_keeps_to_the_limit_of_each_category() -> None:
    sizes = {Group(category, place_of(f"{n}")): Size(10) for category in ("a", "b") for n in range(200)}
    sizes[Group("a", place_of("named"))] = Size(1000, named=True)
    held = choose_heldout(sizes, Settings(sources=[{"path": "x"}], heldout_share=0.3, heldout_bytes=95))
    assert Group("a", place_of("named")) in held
    for category in ("a", "b"):
        assert sum(group.category == category and not sizes[group].named for group in held) == 9
    half = choose_heldout(sizes, Settings(sources=[{"path": "x"}], heldout_share=0.5))
    assert 150 < len(half) < 250
