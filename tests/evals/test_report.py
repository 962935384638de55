"""The report: one safe page, figures that agree in all forms, the same bytes each time."""

import base64
import hashlib
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from danlu.evals.figures import (
    Answered,
    BitsRow,
    Curve,
    LedgerLine,
    LineageStep,
    ModelEntry,
    Report,
    Sample,
    SkillRow,
)
from danlu.evals.report import FILES, bits_lines, html, markdown, skill_lines, terminal_table, write_report

EVIL = "<script>alert('x')</script>\x1b[2J\u202e|`` ``` \n</pre><img src=http://example.org/a.png>{{ 1 + 1 }}"
EMPTY = {"rows": 0, "bytes": 0, "tokens": 0}


def report() -> Report:
    bits = [BitsRow(category, system, kind, value, *interval, 150_000, 12)
            for category in ("en", "zh")
            for system, kind, value, interval in (("base", "model", 1.5, (1.4, 1.6)),
                                                  ("chat", "model", 1.75, (1.6, 1.9)),
                                                  ("n-gram", "baseline", 2.25, (2.0, 2.5)),
                                                  ("gzip -9", "baseline", 3.125, (None, None)))]
    skills = [SkillRow(task, model, value, value / 2, (1 + value) / 2, 20)
              for task in ("copy", "add") for model, value in (("base", 0.0), ("chat", 0.75))]
    return Report(
        title="quickstart · report", fingerprint="ab" * 32,
        models=[ModelEntry(name, mark * 32, 4_700_000, 4096, 512) for name, mark in (("base", "12"), ("chat", "34"))],
        bits=bits, skills=skills,
        samples=[Sample("copy", EVIL, EVIL, [Answered("base", EVIL, False), Answered("chat", "", True)])],
        free=[Sample("", "你是谁？", "", [Answered("base", "春眠", None)])],
        lineage=[LineageStep("base", "model", "12" * 32, ["corpus 00112233"], "loss 2.5")],
        ledger=[LedgerLine("corpus", "read:<a>", EMPTY | {"rows": 12}, EMPTY | {"rows": 10}, "− empty: 2 rows")],
        curves=[Curve("base", "training", list(range(1, 41)), [4.0 - 0.05 * step for step in range(40)]),
                Curve("base", "held out", [20, 40], [3.2, 2.2])],
        notes=["a note with <b>"])


class Reader(HTMLParser):
    """The tags with their attributes, and the visible text."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "tags are closed in order"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_safe(tmp_path: Path) -> None:
    write_report(report(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    page = (tmp_path / "report.html").read_text("utf-8")
    reader = Reader(page)
    assert not reader.open
    assert {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object", "form", "a"} == set()
    images = [attributes["src"] or "" for tag, attributes in reader.tags if tag == "img"]
    assert len(images) == 3 and all(source.startswith("data:image/png;base64,") for source in images)
    assert base64.b64decode(images[0].partition(",")[2]) == (tmp_path / "bits_per_byte.png").read_bytes()
    assert not any(name.startswith("on") or name == "style" for _, attributes in reader.tags for name in attributes)
    assert "alert('x')" in reader.text and "{{ 1 + 1 }}" in reader.text and "a note with <b>" in reader.text
    assert "\x1b" not in page and "\u202e" not in page


def test_the_policy_allows_the_page_s_own_style_only(tmp_path: Path) -> None:
    page = html(report(), tmp_path)
    policy = next(attributes["content"] for tag, attributes in Reader(page).tags
                  if tag == "meta" and attributes.get("http-equiv") == "Content-Security-Policy")
    style = re.search(r"<style>(.*?)</style>", page, re.S)
    assert style is not None and policy is not None
    expected = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    assert f"'sha256-{expected}'" in policy and "default-src 'none'" in policy and "unsafe" not in policy
    assert "url(" not in style[1] and "@import" not in style[1]


def test_same_report_same_bytes(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        write_report(report(), folder)
    for name in FILES:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


@pytest.mark.parametrize("parts", [{"bits": ()}, {"skills": (), "samples": ()}, {"curves": (), "free": ()},
                                   {"bits": (), "skills": (), "samples": (), "free": (), "curves": (), "lineage": (),
                                    "ledger": (), "notes": (), "models": ()}])
def test_what_was_not_measured_is_not_there(tmp_path: Path, parts: dict) -> None:
    write_report(replace(report(), **parts), tmp_path)
    reader = Reader((tmp_path / "report.html").read_text("utf-8"))
    assert not reader.open
    assert ("Bits per byte" in reader.text) == ("bits" not in parts)
    assert (tmp_path / "exact_match.png").exists() == ("skills" not in parts)
    assert sum(tag == "img" for tag, _ in reader.tags) == len(list(tmp_path.glob("*.png")))


def test_the_forms_agree(tmp_path: Path) -> None:
    write_report(report(), tmp_path)
    data = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert data["bits"][0] == {"category": "en", "system": "base", "kind": "model", "value": 1.5, "low": 1.4,
                               "high": 1.6, "num_bytes": 150_000, "num_documents": 12}
    assert data["samples"][0]["answers"][0]["text"] == EVIL, "the data keep every character"
    text = (tmp_path / "report.md").read_text("utf-8")
    page = Reader((tmp_path / "report.html").read_text("utf-8")).text
    output = io.StringIO()
    Console(file=output, width=120).print(terminal_table(report()))
    for form in (text, page, output.getvalue()):
        for figure in ("1.500", "1.400", "3.125", "75.0", "150,000", "n-gram"):
            assert figure in form
    assert "| en | 1.500" in text


def test_best_figures() -> None:
    [line, _] = bits_lines(report())
    assert [cell.best for cell in line.cells] == [True, False, False, False]
    [tasks, _] = skill_lines(report())
    assert [cell.best for cell in tasks.cells] == [False, True]
    nothing_right = replace(report(), skills=[replace(row, value=0.0) for row in report().skills])
    assert not any(cell.best for line in skill_lines(nothing_right) for cell in line.cells)


def test_markdown_holds_no_markup_of_models() -> None:
    text = markdown(report())
    outside = re.sub(r"^(`{3,})text\n.*?\n\1$", "", text, flags=re.S | re.M)
    assert "alert" in text and "\x1b" not in text
    assert "<img" not in re.sub(r"(`+) .*? \1", "", outside)
    for line in outside.splitlines():
        if line.startswith("| en"):
            assert line.count("|") - line.count("\\|") == 8


EVIL_NAME = "\x1b[2J\u202e<b>$\\x$[red]"


def named_by_data() -> Report:
    """A report whose every name comes from data that means harm."""
    return replace(
        report(), title=EVIL_NAME, notes=[EVIL_NAME],
        bits=[replace(row, category=EVIL_NAME + row.category) for row in report().bits],
        skills=[replace(row, task=EVIL_NAME + row.task) for row in report().skills],
        models=[replace(model, notes=[EVIL_NAME]) for model in report().models],
        lineage=[LineageStep(EVIL_NAME, EVIL_NAME, "12" * 32, [EVIL_NAME], EVIL_NAME)],
        ledger=[LedgerLine(EVIL_NAME, EVIL_NAME, EMPTY, EMPTY, EVIL_NAME)],
        curves=[replace(curve, label=EVIL_NAME) for curve in report().curves])


def test_names_from_data_steer_neither_page_nor_terminal(tmp_path: Path) -> None:
    write_report(named_by_data(), tmp_path)
    output = io.StringIO()
    Console(file=output, width=200).print(terminal_table(named_by_data()))
    for form in ((tmp_path / "report.html").read_text("utf-8"), (tmp_path / "report.md").read_text("utf-8"),
                 output.getvalue()):
        assert "␛[2J\ufffd" in form or "␛\\[2J\ufffd" in form
        assert "\x1b" not in form and "\u202e" not in form
    assert "$\\x$[red]en" in output.getvalue(), "data are no markup"


def test_names_from_data_are_no_formulas(tmp_path: Path) -> None:
    write_report(replace(named_by_data(), models=[replace(report().models[0], name="$\\x$")],
                         bits=[replace(row, system="$\\x$", category="$\\frac{$") for row in report().bits[:1]],
                         skills=[replace(row, model="$\\x$") for row in report().skills[:1]],
                         curves=[replace(curve, model="$\\x$") for curve in report().curves]), tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 3
