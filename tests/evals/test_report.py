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
    PER_ANSWER,
    PER_PAIR,
    Answered,
    BitsRow,
    Curve,
    LedgerLine,
    LineageStep,
    ModelEntry,
    PreferenceRow,
    Report,
    RewardRow,
    Sample,
    SkillRow,
)
from danlu.evals.report import (
    FILES,
    bits_lines,
    html,
    markdown,
    number,
    preference_lines,
    skill_lines,
    terminal_table,
    write_report,
)

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
        preferences=[PreferenceRow(category, system, kind, value, value - 0.05, value + 0.05, 40)
                     for system, kind, value in (("judge", "judge", 0.875), ("base", "model", 0.5),
                                                 ("chat", "model", 0.625))
                     for category in ("form", "wrong", "all pairs")],
        rewards=[RewardRow("base", -1.25, -1.5, -1.0, 12.5, 11.0, 14.0, 0.0, 0.0, 0.2, 0.1, 30.5, 20),
                 RewardRow("chat", 0.375, 0.25, 0.5, 0.0, 0.0, 0.0, 0.7, 0.5, 0.9, 1.0, 3.5, 20)],
        judge="judge", reference="chat",
        samples=[Sample("copy", EVIL, EVIL, [Answered("base", EVIL, False, -2.25), Answered("chat", "", True, 0.5)])],
        free=[Sample("", "你是谁？", "", [Answered("base", "春眠", None)])],
        lineage=[LineageStep("base", "model", "12" * 32, ["corpus 00112233"], "loss 2.5")],
        ledger=[LedgerLine("corpus", "read:<a>", EMPTY | {"rows": 12}, EMPTY | {"rows": 10}, "− empty: 2 rows")],
        curves=[Curve("base", "training", list(range(1, 41)), [4.0 - 0.05 * step for step in range(40)]),
                Curve("base", "held out", [20, 40], [3.2, 2.2]), Curve("judge", "training", [1, 2], [0.7, 0.5], PER_PAIR),
                Curve("chat", "reward", [1, 5], [-0.5, 0.5], PER_ANSWER)],
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
    assert len(images) == 4 and all(source.startswith("data:image/png;base64,") for source in images)
    assert base64.b64decode(images[0].partition(",")[2]) == (tmp_path / "bits_per_byte.png").read_bytes()
    assert not any(name.startswith("on") or name == "style" for _, attributes in reader.tags for name in attributes)
    assert "score −2.25" in reader.text
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
                                   {"preferences": ()}, {"rewards": ()}, {"rewards": (), "judge": "", "reference": ""},
                                   {"preferences": (), "rewards": (), "judge": "", "reference": "", "curves": ()},
                                   {"bits": (), "skills": (), "samples": (), "free": (), "curves": (), "lineage": (),
                                    "ledger": (), "notes": (), "models": (), "preferences": (), "rewards": ()}])
def test_what_was_not_measured_is_not_there(tmp_path: Path, parts: dict) -> None:
    write_report(replace(report(), **parts), tmp_path)
    reader = Reader((tmp_path / "report.html").read_text("utf-8"))
    assert not reader.open
    assert ("Bits per byte" in reader.text) == ("bits" not in parts)
    assert (tmp_path / "exact_match.png").exists() == ("skills" not in parts)
    assert ("Preferences and rewards" in reader.text) == ("preferences" not in parts or "rewards" not in parts)
    assert ("a coin gets" in reader.text) == ("preferences" not in parts)
    assert ("What the models answer when" in reader.text) == ("rewards" not in parts)
    Console(file=io.StringIO()).print(terminal_table(replace(report(), **parts)))
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
        for figure in ("1.500", "1.400", "3.125", "75.0", "150,000", "n-gram", "87.5 %", "62.5 %", "−1.250", "12.50",
                       "KL to chat", "70.0 %"):
            assert figure in form
    assert "| en | 1.500" in text


def test_best_figures() -> None:
    [line, _] = bits_lines(report())
    assert [cell.best for cell in line.cells] == [True, False, False, False]
    [tasks, _] = skill_lines(report())
    assert [cell.best for cell in tasks.cells] == [False, True]
    nothing_right = replace(report(), skills=[replace(row, value=0.0) for row in report().skills])
    assert not any(cell.best for line in skill_lines(nothing_right) for cell in line.cells)


def test_the_best_of_the_models_not_of_the_judge() -> None:
    [form, _, _] = preference_lines(report())
    assert [(cell.row.system, cell.best) for cell in form.cells] == [("judge", False), ("base", False), ("chat", True)]
    assert form.num_pairs == 40
    partly = replace(report(), preferences=[row for row in report().preferences
                                            if (row.system, row.category) != ("base", "form")])
    assert preference_lines(partly)[0].cells[1].row is None


def test_minus_zero_is_zero() -> None:
    assert [number(value, 2) for value in (-0.001, 0.0, -1.5, 2.25)] == ["0.00", "0.00", "−1.50", "2.25"]


@pytest.mark.parametrize("names", [["base", "chat", "preferred", "aligned"]])
def test_a_terminal_of_100_columns_shows_four_models(names: list[str]) -> None:
    told = report()
    many = replace(
        told, models=[replace(told.models[0], name=name) for name in names],
        bits=[*(replace(row, system=name) for row in told.bits if row.system == "base" for name in names),
              *(row for row in told.bits if row.kind == "baseline")],
        skills=[replace(row, model=name) for row in told.skills if row.model == "chat" for name in names],
        preferences=[replace(row, system=name) for row in told.preferences if row.system == "chat" for name in names],
        rewards=[replace(told.rewards[0], model=name, kl=123.45, kl_low=111.11, kl_high=133.33) for name in names])
    output = io.StringIO()
    Console(file=output, width=100).print(terminal_table(many))
    shown = output.getvalue()
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 100
    for whole in ("1.500 [1.400 – 1.600]", "[37.5 – 87.5]", "[57.5 – 67.5]", "[−1.500 – −1.000]", "[111.11 – 133.33]"):
        assert whole in shown, "no figure is broken"


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
        preferences=[replace(row, category=EVIL_NAME + row.category) for row in report().preferences],
        judge=EVIL_NAME + "judge", reference=EVIL_NAME,
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
                         preferences=[replace(row, system="$\\x$", category="$\\frac{$", kind="model")
                                      for row in report().preferences[:1]],
                         rewards=[replace(report().rewards[0], model="$\\x$")], judge="$\\y$",
                         curves=[replace(curve, model="$\\x$") for curve in report().curves]), tmp_path)
    assert len(list(tmp_path.glob("*.png"))) == 4
