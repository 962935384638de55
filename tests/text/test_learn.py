"""What a corpus learns before it is cleaned: lines that its documents share, and how far they are from good text."""

import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from corpus_runs import hashes, run, run_killed
from pydantic import ValidationError

from danlu.core.errors import DataError
from danlu.pipeline.stages import corpus
from danlu.pipeline.stages.corpus import Settings
from danlu.text import learn, spool
from danlu.text.clean import CleanConfig
from danlu.text.corpus import read_corpus

FOOT = "© {year} The Harbour Gazette, all rights reserved"
OTHER = "where the old keeper looked out to sea"
SENTENCE = "the old keeper climbed stairs of his lamp every evening and looked out to sea where no ship came"
WORDS = SENTENCE.split()
NOISE = "zqxj vkwp 9f#k"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Pages with a foot, a page that was copied many times, pages that are nothing but a foot, and noise."""
    draw = random.Random(2)
    pages = [f"{' '.join(draw.choices(WORDS, k=20))}\n{FOOT.format(year=2000 + number)}\n" for number in range(12)]
    copied = "This one page was copied often\nand nobody knows why it was.\n"
    rows = pages + [copied] * 9 + [FOOT.format(year=1999), NOISE * 10]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    (tmp_path / "b").mkdir()
    for number in range(6):
        (tmp_path / "b" / f"{number}.txt").write_text(f"{OTHER}\n{' '.join(draw.choices(WORDS, k=15))}\n")
    (tmp_path / "good").mkdir()
    for number in range(3):
        (tmp_path / "good" / f"{number}.txt").write_text("".join(
            " ".join(draw.choices(WORDS, k=12)) + ".\r\n" for _ in range(40)))
    return tmp_path


BOTH = {"boilerplate": {"min_documents": 5}, "perplexity": [{"language": "en", "train": "good/", "max_perplexity": 5000}]}
KEYS = {"heldout": [], "heldout_share": 0, "near_dedup": None, "dedup_paragraphs": False}


def stations(folder: Path) -> dict[str, dict]:
    return {station["name"]: station for station in json.loads((folder / "ledger.json").read_bytes())["stations"]}


def test_shared_lines_go_and_are_counted(base: Path) -> None:
    metrics = run(base, "w", 1 << 30, clean={"boilerplate": {"min_documents": 5}}, **KEYS)
    texts = [document.text for document in read_corpus(base / "w", "train")]
    assert len(texts) == metrics["train"]["documents"] == 12 + 1 + 1 + 6
    assert not any("Gazette" in text or OTHER in text for text in texts)
    assert "This one page was copied often\nand nobody knows why it was." in texts, "its copies are one document"
    clean = stations(base / "w")["clean"]
    assert clean["notes"]["boilerplate_lines"] == 12 + 6
    lines = [f"{FOOT.format(year=2000)}\n"] * 12 + [f"{OTHER}\n"] * 6
    assert clean["dropped"]["boilerplate"] == {"rows": 0, "tokens": 0, "bytes": len("".join(lines).encode())}
    assert clean["dropped"]["only_boilerplate"]["rows"] == 1
    shown = [item for item in json.loads((base / "w" / "report.json").read_bytes())["removed"]
             if item["reason"] == "boilerplate"]
    assert [(item["where"], item["excerpt"]) for item in shown] == [("a.jsonl:1 and 12 more documents",
                                                                     FOOT.format(year=2000)),
                                                                    ("b/0.txt and 5 more documents", OTHER)]
    page = (base / "w" / "report.html").read_text()
    assert "clean: boilerplate" in page and "a.jsonl:1 and 12 more documents" in page
    run(base, "more", 1 << 30, clean={"boilerplate": {"min_documents": 14}}, **KEYS)
    assert "boilerplate" not in stations(base / "more")["clean"]["dropped"], "13 documents have the line"


def test_texts_unlike_good_text_go_and_what_was_measured_is_told(base: Path) -> None:
    run(base, "w", 1 << 30, clean={"perplexity": BOTH["perplexity"]}, **KEYS)
    found = stations(base / "w")
    assert found["clean"]["dropped"]["high_perplexity"]["rows"] == 2
    table = pq.read_table(base / "w" / "train-00000.parquet").to_pydict()
    assert all(1 < value <= 5000 for value in table["perplexity"])
    report = json.loads((base / "w" / "report.json").read_bytes())
    foot, noise = (item for item in report["removed"] if item["reason"] == "high_perplexity")
    assert foot["where"].startswith("a.jsonl:22 (perplexity ") and foot["excerpt"] == FOOT.format(year=1999)
    assert noise["where"].startswith("a.jsonl:23 (perplexity ") and noise["excerpt"].startswith(NOISE)
    assert sum(report["perplexities"]["en"].values()) == 12 + 9 + 1 + 1 + 6
    assert "en: perplexity" in (base / "w" / "report.html").read_text()
    read, train = found["perplexity of en: read:good/"], found["perplexity of en: train"]
    assert read["in"]["rows"] == 120 and read["out"]["rows"] == train["in"]["rows"] == train["out"]["rows"] == 3
    assert train["dropped"]["normalised"]["bytes"] > 100


def test_good_text_is_read_as_its_entry_says(base: Path) -> None:
    lines = (base / "good" / "0.txt").read_text().splitlines()
    (base / "rows.jsonl").write_text("".join(json.dumps({"content": line}) + "\n" for line in lines))
    for work, entry in (("lines", {"train": "good/0.txt", "document": "line"}),
                        ("rows", {"train": "rows.jsonl", "field": "content"})):
        run(base, work, 1 << 30, clean={"perplexity": [entry]}, **KEYS)
        assert stations(base / work)["perplexity of others: train"]["in"]["rows"] == 40
    by_line, by_row = (pq.read_table(base / work / "train-00000.parquet")["perplexity"] for work in ("lines", "rows"))
    assert by_line == by_row, "the same texts"
    with pytest.raises(ValidationError, match="a path of names joined by dots"):
        CleanConfig.model_validate({"perplexity": [{"train": "a", "field": "data[0]"}]})


def test_of_good_text_no_more_is_read_than_asked_for(base: Path) -> None:
    limit = 1000 + (base / "good" / "0.txt").stat().st_size
    entry = {"train": "good/*.txt", "max_chars": limit}
    run(base, "w", 1 << 30, clean={"perplexity": [entry]}, **KEYS)
    train = stations(base / "w")["perplexity of others: train"]
    assert train["out"] == {"rows": 2, "tokens": 0, "bytes": limit} and train["dropped"]["behind max_chars"]["bytes"] > 0
    assert train["notes"] == {"reading ended at max_chars": 1}
    assert stations(base / "w")["perplexity of others: read:good/*.txt"]["out"]["rows"] == 2
    table = pq.read_table(base / "w" / "train-00000.parquet").to_pydict()
    assert max(table["perplexity"]) > 5000, "without max_perplexity it is only measured"
    run(base, "zh", 1 << 30, clean={"perplexity": [{**entry, "language": "zh"}]}, **KEYS)
    assert set(pq.read_table(base / "zh" / "train-00000.parquet").to_pydict()["perplexity"]) == {None}


def test_splits_and_workers_change_no_byte(base: Path) -> None:
    metrics = run(base, "one", 1 << 30, clean=BOTH, **KEYS)
    for work, size, workers in (("many", 200, 1), ("two", 900, 2)):
        assert run(base, work, size, workers=workers, clean=BOTH, **KEYS) == metrics
        assert hashes(base / work) == hashes(base / "one")
    left = {path.suffix for path in (base / "many.keep").iterdir()}
    assert not left & {".counted", ".texts", ".lines", ".lines-owners"}


@pytest.mark.parametrize("place", ["count 1", "count 3", "found 1", "found 2", "unlink 2", "model 3", "model 20",
                                   "learned 1", "clean 2"])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(base: Path, place: str) -> None:
    run(base, "whole", 900, clean=BOTH, **KEYS)
    what, nth = place.split()
    owner, name = {"count": (learn, "finish_split"), "found": (learn, "write_atomic"), "unlink": (Path, "unlink"),
                   "model": (learn, "sync"), "learned": (learn.Ledger, "state"), "clean": (spool, "finish_split")}[what]
    run_killed(base, owner, name, int(nth), 900, clean=BOTH, **KEYS)
    run(base, "killed", 900, clean=BOTH, **KEYS)
    assert hashes(base / "killed") == hashes(base / "whole")


def test_what_was_learned_is_not_learned_again(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(base, "w", 900, clean=BOTH, **KEYS)
    monkeypatch.setattr(learn.CharNgram, "train", None)
    monkeypatch.setattr(corpus, "count_split", None)
    expected = hashes(base / "w")
    run(base, "w", 900, clean=BOTH, **KEYS)
    assert hashes(base / "w") == expected


def test_the_good_text_is_an_input_of_the_step() -> None:
    settings = Settings.model_validate({"sources": [{"path": "a"}], "clean": BOTH})
    assert [reference.text for reference in corpus.references(settings)
            if reference.key == ("clean", "perplexity", 0, "train")] == ["good/"]


def test_settings_and_files_that_cannot_be_meant(base: Path) -> None:
    with pytest.raises(ValidationError, match="two entries of “perplexity” are for the same language"):
        CleanConfig.model_validate({"perplexity": [{"train": "a"}, {"train": "b"}]})
    (base / "empty.txt").write_text("\n\n")
    with pytest.raises(DataError, match="no text for the model of good text"):
        run(base, "w", 900, clean={"perplexity": [{"train": "empty.txt"}]}, **KEYS)
