"""The corpus's road at scale: workers, splits and kills change no byte; near duplicates go only beside one that stays."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from corpus_runs import hashes, run, run_killed

from danlu.core.ledger import Ledger
from danlu.core.records import Document
from danlu.text import near, shards, spool
from danlu.text.clean import CleanConfig
from danlu.text.corpus import CorpusWriter, read_corpus
from danlu.text.decontaminate import DISGUISES
from danlu.text.dedup import BLANK_LINES, fingerprint
from danlu.text.minhash import NearConfig, band_keys, shingles, signature, similarity
from danlu.text.read import SourceConfig
from danlu.text.splits import plan_splits
from danlu.text.spool import Job, Spool, fill

WORDS = [f"word{n}" for n in range(300)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Two sources with exact and near copies within and across, shared paragraphs and dirt."""
    draw = random.Random(1)
    texts = [" ".join(draw.choices(WORDS, k=60)) for _ in range(60)]
    for number in range(1, 60, 3):
        words = texts[number - 1].split()
        words[draw.randrange(60)] = "other"
        texts[number] = " ".join(words)
    rows = [{"text": text + "\n\nAll rights reserved."} for text in texts + texts[:5]]
    lines = [json.dumps(row) for row in rows]
    lines[7:7] = ["{broken", json.dumps({"text": "7"}), "", *(json.dumps({"text": f"{n}"}) for n in range(9))]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "b").mkdir()
    for number in range(12):
        text = texts[number * 3].replace("word1 ", "word2 ").upper() if number % 2 else " ".join(draw.choices(WORDS, k=40))
        (tmp_path / "b" / f"{number:02}.txt").write_text(text + "\n")
    return tmp_path


def test_splits_and_workers_change_no_byte(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 5000)
    metrics = run(base, "one", 1 << 30)
    expected = hashes(base / "one")
    assert len(list(read_corpus(base / "one", "train"))) == metrics["train"]["documents"] > 30
    assert {"train-00000.parquet", "train-00002.parquet", "heldout-00000.parquet", "report.html"} <= set(expected)
    assert metrics["duplicates"] == 5 and metrics["near_duplicates"] > 15 and metrics["quarantined"] == 1
    for work, size, workers in (("many", 700, 1), ("two", 3000, 2)):
        assert run(base, work, size, workers=workers) == metrics
        assert hashes(base / work) == expected


@pytest.mark.parametrize("place", ["write 3", "write 70", "finish 1", "finish 4", "shard 2", "ledger 1"])
def test_killed_anywhere_it_goes_on_to_the_same_bytes(base: Path, place: str) -> None:
    run(base, "whole", 2000)
    what, nth = place.split()
    owner, name = {"write": (CorpusWriter, "write"), "finish": (spool, "write_atomic"), "shard": (shards, "write_atomic"),
                   "ledger": (Ledger, "save")}[what]
    run_killed(base, owner, name, int(nth), 2000)
    done = {path: path.stat().st_mtime_ns for path in (base / "killed.keep").glob("*.json")}
    run(base, "killed", 2000)
    assert hashes(base / "killed") == hashes(base / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in done.items()), "what was done is not done again"
    assert done or place in ("write 3", "finish 1")


def test_a_cut_file_of_the_spool_is_made_again(base: Path) -> None:
    run(base, "a", 2000)
    path = next((base / "a.keep").glob("*.marks"))
    path.write_bytes(path.read_bytes()[:-1])
    expected = hashes(base / "a")
    run(base, "a", 2000)
    assert hashes(base / "a") == expected


def spool_of(folder: Path, texts: list[str], config: NearConfig | None, paragraphs: bool = False) -> Spool:
    """A spool of these texts, in three splits."""
    (folder / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = SourceConfig(path="t.jsonl")
    total = (folder / "t.jsonl").stat().st_size
    jobs = [Job(number, split, source, CleanConfig(), config, paragraphs, None, (), folder)
            for number, split in enumerate(plan_splits([source], folder, total // 3 + 1))]
    (folder / "spool").mkdir()
    for job in reversed(jobs):
        fill(job, folder / "spool")
    return Spool(folder / "spool", jobs)


def plain_rule(texts: list[str], config: NearConfig) -> list[int]:
    """For each text the most similar one before it that stays and shares a band, where it is similar enough, or −1."""
    signatures = [signature(text, config) for text in texts]
    result: list[int] = []
    for own in signatures:
        similar = [(similarity(own, signatures[other]), -other) for other, of in enumerate(result) if of == -1 and
                   (band_keys(own, config) == band_keys(signatures[other], config)).any()]
        best = max(similar, default=(0, 1))
        result.append(-best[1] if best[0] >= config.threshold else -1)
    return result


def test_near_duplicates_are_those_of_the_plain_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(near, "CACHED", 5)
    draw = random.Random(3)
    texts = [" ".join(draw.choices(WORDS, k=50))]
    while len(texts) < 150:
        words = draw.choice(texts[-12:]).split()
        for _ in range(draw.choice([0, 1, 1, 2, 4, 20])):
            words[draw.randrange(50)] = draw.choice(WORDS)
        texts.append(" ".join(words))
    config = NearConfig(threshold=0.7)
    found = near.near_repeats(spool_of(tmp_path, texts, config), np.ones(150, np.bool_), config, np.zeros(150, np.bool_))
    assert found.tolist() == plain_rule(texts, config)
    assert 20 < (found >= 0).sum() < 130
    assert (found[found[found >= 0]] == -1).all(), "whatever is removed is like one that stays"


def test_a_chain_loses_only_what_is_like_its_neighbour_that_stays(tmp_path: Path) -> None:
    words = [f"w{n}" for n in range(100)]
    texts = []
    for link in range(12):  # each shares 0.8 of its shingles with the next, and less with those behind
        texts.append(" ".join(words))
        for place in range(link * 2, link * 2 + 2):
            words[(place * 7) % 100] = f"new{place}"
    config = NearConfig(threshold=0.7)
    found = near.near_repeats(spool_of(tmp_path, texts, config), np.ones(12, np.bool_), config, np.zeros(12, np.bool_))
    kept = np.flatnonzero(found == -1)
    assert 2 < len(kept) < 12 and (found != -1).any()
    assert set(found[found != -1].tolist()) <= set(kept.tolist())
    for number in np.flatnonzero(found != -1).tolist():
        one, other = (set(shingles(texts[place], config).tolist()) for place in (number, found[number]))
        assert found[number] < number and len(one & other) / len(one | other) > 0.5


def test_of_a_key_only_so_many_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(5)
    shared = " ".join(draw.choices(WORDS, k=40))
    texts = [shared + " " + " ".join(draw.choices(WORDS, k=40)) for _ in range(60)]
    config = NearConfig(threshold=0.95, bands=40, rows=1)
    everything = spool_of(tmp_path, texts, config)
    monkeypatch.setattr(near, "MAX_MEMBERS", 2)
    read = []
    original = near.similarity
    monkeypatch.setattr(near, "similarity", lambda own, others: read.append(len(others)) or original(own, others))
    assert (near.near_repeats(everything, np.ones(60, np.bool_), config, np.zeros(60, np.bool_)) == -1).all()
    assert max(read) <= 2 * config.bands


def test_paragraphs_are_dropped_as_in_one_reading(tmp_path: Path) -> None:
    draw = random.Random(9)
    pieces = ["One.", "two  WORDS", "Two words", "三", "Four\nlines", "five"]
    texts = [draw.choice(["\n\n", "\n \n\n"]).join(draw.choices(pieces, k=draw.randint(1, 4))) for _ in range(40)]
    source = {"path": "t.jsonl"}
    made = spool_of(tmp_path, texts, None, paragraphs=True)
    documents = [Document(row.text, row.source, row.id) for row in made.documents(range(len(made)))]
    expected, seen, whole = [], set(), set()
    for document in documents:
        if fingerprint(document.text) in whole:
            continue
        whole.add(fingerprint(document.text))
        kept = []
        parts = BLANK_LINES.split(document.text)
        for paragraph, blank in zip(parts[::2], [*parts[1::2], ""]):
            if paragraph.strip() and fingerprint(paragraph) not in seen:
                seen.add(fingerprint(paragraph))
                kept += [paragraph, blank]
        if text := "".join(kept[:-1]):
            expected.append((document.id, text))
    run(tmp_path, "w", 300, sources=[source], near_dedup=None, heldout=[], heldout_share=0)
    assert [(document.id, document.text) for document in read_corpus(tmp_path / "w", "train")] == expected
    assert 0 < len(expected) < 20


def test_evaluation_items_are_kept_out_and_the_recall_is_published(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = [" ".join(f"item{number}x{place}" for place in range(20)) for number in range(6)]
    (base / "exam.jsonl").write_text("".join(json.dumps({"q": text}) + "\n" for text in items))
    (base / "c.txt").write_text("Before.\n" + items[2].upper().replace(" ", "\n", 3) + "\nBehind.\n")
    sets = {"sets": [{"name": "exam", "path": "exam.jsonl", "fields": ["q"]}]}
    sources = [{"path": "a.jsonl"}, {"path": "c.txt"}]
    run(base, "w", 2000, sources=sources, heldout=[], decontaminate=sets)
    saved = {station["name"]: station for station in json.loads((base / "w" / "ledger.json").read_text())["stations"]}
    assert list(saved)[2:5] == ["clean", "decontaminate", "dedup"]
    assert saved["decontaminate"]["dropped"]["contaminated_exam"]["rows"] == 1
    (note, found), = saved["decontaminate"]["notes"].items()
    assert note.startswith("exam: planted items that were found, of ") and found == int(note.split()[-1]) > 6
    monkeypatch.setitem(DISGUISES, "other words", lambda text, random: text.replace("x", "-"))
    run(base, "v", 2000, sources=sources, heldout=[], decontaminate=sets)
    saved = {station["name"]: station for station in json.loads((base / "v" / "ledger.json").read_text())["stations"]}
    assert saved["decontaminate"]["notes"]["exam: planted items that were missed, other words"] == len(items)
    shown = json.loads((base / "w" / "report.json").read_text())["removed"]
    assert [item["where"] for item in shown if item["station"] == "decontaminate"] == ["c.txt"]
