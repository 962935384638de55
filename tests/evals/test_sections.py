"""The report's tables of losses, of what rose and of questions: figures by hand, names that stay text, many sources."""

import io
from pathlib import Path

from rich.console import Console

from danlu.evals.figures import ChoiceRow, LossRow, ModelEntry, Report, RiseRow
from danlu.evals.report import markdown, terminal_table, write_report
from danlu.evals.sections import MAX_SOURCES, sections

EVIL = "<b onclick=x>|`\x1b[2J{{ 1 }}"


def loss(model: str, kind: str, group: str, num_bytes: int = 200) -> LossRow:
    return LossRow(model, kind, group, loss=1.38629, loss_low=1.2, loss_high=1.5, bits_per_token=2.0, perplexity=4.0,
                   bits_per_byte=0.5, low=0.4, high=0.6, bits_per_char=1.5, char_low=1.2, char_high=1.8, unit="documents",
                   num_bytes=num_bytes, num_chars=67, num_tokens=50, num_documents=7,
                   num_without_context=7 if model == "chat" else 0)


def report(group: str = "en") -> Report:
    rise = RiseRow("chat", "base", "category", group, 0.0512, 0.04, 0.061, 1.05, 1.0, "documents", max_rise=0.03)
    choices = [ChoiceRow(group, "base", 0, 0.5, 0.2, 0.8, 0.75, 0.4, 0.9, 8, chance=0.25),
               ChoiceRow(group, "chat", 5, 0.625, 0.3, 0.9, None, None, None, 8, perplexity=34.5, gain=0.125, gain_low=-0.1,
                         gain_high=0.3)]
    return Report("t", "ab" * 32, models=[ModelEntry("base", "12" * 32, 5, 9, 512, stride=128),
                                          ModelEntry("chat", "34" * 32, 5, 9, 512, stride=128)],
                  losses=[loss(model, kind, name) for model in ("base", "chat")
                          for kind, name in (("category", group), ("all", "all text"))],
                  rises=[rise, RiseRow("chat", "base", "all", "all text", -0.01, None, None, 0.99, 1.0, "documents")],
                  choices=choices, reference="base")


def test_what_the_tables_say() -> None:
    rises, losses, choices = sections(report())
    assert rises.title == "Learned and forgotten since base"
    assert rises.rows == [["en", "category", "chat", "1.000", "1.050", "+5.1 % [+4.0 % – +6.1 %]", "+3.0 %", "✗ forgotten"],
                          ["all text", "", "chat", "1.000", "0.990", "−1.0 %", "–", "–"]]
    assert [row[:3] for row in losses.rows] == [
        ["en", "category", "base"], ["en", "category", "chat"], ["all text", "", "base"], ["all text", "", "chat"]
    ], "the models of one text below each other"
    assert losses.rows[0][3:] == ["1.3863", "2.000", "4.00", "0.500 [0.400 – 0.600]", "1.500", "0.746", "50", "200", "7"]
    assert "base, chat: 512 tokens at a time, at least 384 of them before each token of a longer text." in losses.lead
    assert "chat has no token to begin with: 7 first tokens cost as much as a guess." in losses.lead
    assert choices.rows[0] == ["en", "0", "base", "50.0 % [20.0 – 80.0]", "75.0 % [40.0 – 90.0]", "25.0 %", "–", "–", "8"]
    assert choices.rows[1][4:] == ["–", "–", "34.5", "+12.5 % [−10.0 % – +30.0 %]", "8"]
    assert sections(Report("t", "ab" * 32)) == []


def test_names_stay_text_everywhere(tmp_path: Path) -> None:
    write_report(report(EVIL), tmp_path)
    page = (tmp_path / "report.html").read_text("utf-8")
    assert page.count('<td class="number">8</td>') == 2 and "&#34;number" not in page
    assert "<b " not in page and "\x1b" not in page and page.count("onclick=x&gt;") == 5
    text = markdown(report(EVIL))
    assert "\x1b" not in text and "\\<b onclick=x\\>\\|\\`" in text
    output = io.StringIO()
    Console(file=output, width=220).print(terminal_table(report(EVIL)))
    assert "\x1b" not in output.getvalue() and "✗ forgotten" in output.getvalue()


def test_of_many_sources_the_largest_are_shown() -> None:
    many = Report("t", "ab" * 32, losses=[loss("base", "source", f"file {number}", number + 1) for number in range(100)])
    [section] = sections(many)
    assert len(section.rows) == MAX_SOURCES and section.rows[0][0] == f"file {100 - MAX_SOURCES}"
    output = io.StringIO()
    Console(file=output, width=220).print(terminal_table(many))
    assert f"… and {MAX_SOURCES - 24} more lines in the report" in output.getvalue()
