"""The samples of docs/formats.md: each is read as the page says, and the Chinese page has the same ones."""

import json
import re
from pathlib import Path

import pytest

from danlu.core.ledger import Ledger
from danlu.text.feedback import read_feedback
from danlu.text.formats import read_dialogues
from danlu.text.labelled import read_labelled
from danlu.text.preferences import read_preferences, read_prompts
from danlu.text.rankings import read_rankings
from danlu.text.registry import _check

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = [DOCS / "formats.md", DOCS / "formats.zh.md"]
READERS = {"sft": read_dialogues, "rm": read_preferences, "ranking": read_rankings, "kto": read_feedback,
           "ppo": read_prompts, "labelled": read_labelled}


def samples(page: Path) -> list[tuple[str, str]]:
    """(reader, text) of every sample."""
    return re.findall(r"^```json (\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_sample_is_read(page: Path, tmp_path: Path) -> None:
    found = samples(page)
    assert {reader for reader, _ in found} == {*READERS, "registry"}
    for number, (reader, text) in enumerate(found):
        if reader == "registry":
            for name, entry in json.loads(text).items():
                _check(entry, name)
            continue
        (tmp_path / f"{number}.jsonl").write_text(text, encoding="utf-8")
        ledger = Ledger()
        records = list(READERS[reader](f"{number}.jsonl", tmp_path, ledger, strict=True))
        assert len(records) == text.count("\n")
        notes = set(ledger.station(f"read:{number}.jsonl").notes)
        assert notes <= {"not read: response[1:]", "not read: response[2:]"}, notes
        if reader == "rm":
            assert {(item.chosen, item.rejected) for item in records} == {("good", "bad")}
        if reader == "ranking":
            assert {item.answers for item in records} == {("the best", "the next", "the worst")}


def test_both_pages_have_the_same_samples_and_sections() -> None:
    english, chinese = map(samples, PAGES)
    assert english == chinese
    headings = [len(re.findall(r"^## ", page.read_text(encoding="utf-8"), re.MULTILINE)) for page in PAGES]
    assert headings[0] == headings[1]
