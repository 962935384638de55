"""Writes a Report for people and for programs: report.html (one file, no links), report.md, report.json and pictures.

Text that a model wrote is shown as text: it is escaped, control characters are made visible, and the page's own policy
allows neither scripts nor anything from outside.

    write_report(report, folder)
    console.print(terminal_table(report))
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danlu.core.terminal import visible
from danlu.evals.figures import (
    ALL_PAIRS,
    FORGOTTEN,
    Answered,
    BitsRow,
    PreferenceRow,
    Report,
    RewardRow,
    Sample,
    SkillRow,
    system_label,
)
from danlu.evals.markdown import as_table, code, fence, inline, interval, number
from danlu.evals.sections import Section, sections

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

FILES = ("report.html", "report.md", "report.json", "bits_per_byte.png", "exact_match.png", "preferences.png", "loss.png")

MAX_TERMINAL_LINES = 24  # of a section
MAX_ON_ONE_LINE = 3  # figures that stand beside each other in a terminal with their intervals


@dataclass(frozen=True, slots=True)
class Cell:
    """One system's figure in a line of a table; None where it was not measured; `best` among the line's cells."""

    row: Any
    best: bool


@dataclass(frozen=True, slots=True)
class BitsLine:
    """One category of text under all systems."""

    category: str
    cells: Sequence[Cell]
    num_bytes: int
    num_documents: int


@dataclass(frozen=True, slots=True)
class SkillLine:
    """One task under all models."""

    task: str
    cells: Sequence[Cell]
    num_prompts: int


@dataclass(frozen=True, slots=True)
class PreferenceLine:
    """One category of pairs under the judge and all models."""

    category: str
    cells: Sequence[Cell]
    num_pairs: int


def write_report(report: Report, folder: Path) -> None:
    """Writes all files of the report into a folder. The same report gives the same bytes."""
    from danlu.evals import charts

    if report.bits:
        charts.draw_bits(report.bits, report.model_names, folder / "bits_per_byte.png")
    if report.skills:
        charts.draw_skills(report.skills, report.model_names, folder / "exact_match.png")
    if report.preferences or report.rewards:
        charts.draw_preferences(report.preferences, report.rewards, report.model_names, folder / "preferences.png")
    if report.curves:
        charts.draw_losses(report.curves, report.model_names, folder / "loss.png")
    (folder / "report.json").write_text(json.dumps(report.to_json(), ensure_ascii=False, indent=1) + "\n", "utf-8")
    (folder / "report.md").write_text(markdown(report), "utf-8")
    (folder / "report.html").write_text(html(report, folder), "utf-8")


def systems_of(report: Report) -> list[str]:
    """The models and baselines in the order in which they are shown."""
    return list(dict.fromkeys(row.system for row in report.bits))


def bits_lines(report: Report) -> list[BitsLine]:
    """One line per category with a cell for each system; the lowest figure is the best."""
    found = {(row.category, row.system): row for row in report.bits}
    lines = []
    for category in dict.fromkeys(row.category for row in report.bits):
        rows: list[BitsRow | None] = [found.get((category, system)) for system in systems_of(report)]
        present = [row for row in rows if row is not None]
        least = min(row.value for row in present)
        cells = [Cell(row, row is not None and row.value == least) for row in rows]
        lines.append(BitsLine(category, cells, max(row.num_bytes for row in present),
                              max(row.num_documents for row in present)))
    return lines


def skill_lines(report: Report) -> list[SkillLine]:
    """One line per task with a cell for each model; the highest figure is the best, unless nothing was right."""
    found = {(row.task, row.model): row for row in report.skills}
    lines = []
    for task in dict.fromkeys(row.task for row in report.skills):
        rows: list[SkillRow | None] = [found.get((task, model)) for model in report.model_names]
        present = [row for row in rows if row is not None]
        most = max(row.value for row in present)
        cells = [Cell(row, row is not None and row.value == most > 0) for row in rows]
        lines.append(SkillLine(task, cells, max(row.num_prompts for row in present)))
    return lines


def preference_systems(report: Report) -> list[tuple[str, str]]:
    """(kind, name) of the judge, if there is one, and of the models whose preferences were read."""
    found = dict.fromkeys((row.kind, row.system) for row in report.preferences)
    return sorted(found, key=lambda system: system[0] != "judge")


def preference_lines(report: Report) -> list[PreferenceLine]:
    """One line per category with a cell for the judge and each model; the highest figure of a model is the best."""
    found = {(row.category, row.kind, row.system): row for row in report.preferences}
    lines = []
    for category in dict.fromkeys(row.category for row in report.preferences):
        rows: list[PreferenceRow | None] = [found.get((category, *system)) for system in preference_systems(report)]
        most = max((row.value for row in rows if row is not None and row.kind == "model"), default=None)
        cells = [Cell(row, row is not None and row.kind == "model" and row.value == most) for row in rows]
        lines.append(PreferenceLine(category, cells, max(row.num_pairs for row in rows if row is not None)))
    return lines


def html(report: Report, folder: Path) -> str:
    """The page, with the pictures of that folder inside it."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def picture(name: str, caption: str) -> Markup:
        path = folder / name
        if not path.exists():
            return Markup("")
        data = base64.b64encode(path.read_bytes()).decode()
        return Markup('<figure><img alt="{}" src="data:image/png;base64,{}"><figcaption>{}</figcaption></figure>'
                      ).format(caption, Markup(data), caption)

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["visible"] = visible
    environment.filters["number"] = number
    environment.globals["system_label"] = system_label
    environment.filters["csp_hash"] = lambda css: base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    template = environment.from_string(resources.files("danlu.evals").joinpath("report.html").read_text("utf-8"))
    page = template.render(report=report, systems=systems_of(report), bits=bits_lines(report),
                           skills=skill_lines(report), preferences=preference_lines(report),
                           preference_systems=preference_systems(report), picture=picture, sections=sections(report))
    return page.lstrip() + "\n"


def markdown(report: Report) -> str:
    """The report as Markdown; the pictures are linked by name."""
    parts = [f"# {inline(report.title)}", f"danlu report `{report.fingerprint[:8]}`"]
    if report.bits:
        table = [["text", *systems_of(report), "bytes", "documents"]]
        table += [[line.category, *(_bits(cell) for cell in line.cells), f"{line.num_bytes:,}",
                   f"{line.num_documents:,}"] for line in bits_lines(report)]
        parts += ["## Bits per byte of held-out text",
                  "Lower is better; in brackets 95 % intervals, over documents or over blocks of few documents.",
                  as_table(table), "![bits per byte](bits_per_byte.png)"]
    for section in sections(report):
        parts += [f"## {section.title}", inline(section.lead), as_table([section.header, *section.rows])]
    if report.skills:
        table = [["task", *report.model_names, "prompts"]]
        table += [[line.task, *(_share(cell) for cell in line.cells), f"{line.num_prompts:,}"]
                  for line in skill_lines(report)]
        parts += ["## Tasks", "Exact match; in brackets 95 % Wilson intervals.", as_table(table),
                  "![exact match](exact_match.png)"]
    parts += _preference_parts(report)
    for heading, samples in report.all_samples:
        parts += [f"## {heading}", *(_sample(sample) for sample in samples)]
    if report.curves:
        parts += ["## Training", "![loss](loss.png)"]
    if report.models:
        table = [["model", "parameters", "vocabulary", "context", "fingerprint", "notes"]]
        table += [[model.name, f"{model.num_parameters:,}", f"{model.vocab_size:,}", f"{model.context:,}",
                   model.fingerprint[:8], " ".join(model.notes)] for model in report.models]
        parts += ["## Models", as_table(table)]
    if report.lineage:
        table = [["step", "leaves", "fingerprint", "made from", "figures"]]
        table += [[step.step, step.kind, step.fingerprint[:8], " ".join(step.parents), step.summary]
                  for step in report.lineage]
        parts += ["## Where it came from", as_table(table)]
    if report.ledger:
        parts += ["## The ledger", as_table([["step", "station", "rows", "bytes", "tokens", "added and dropped"],
                                           *(_ledger_cells(line) for line in report.ledger)])]
    if report.notes:
        parts += ["## Notes", "\n".join(f"- {inline(note)}" for note in report.notes)]
    return "\n\n".join(parts) + "\n"


def _preference_parts(report: Report) -> list[str]:
    """The section “Preferences and rewards” in Markdown; nothing where neither was measured."""
    if not report.preferences and not report.rewards:
        return []
    parts = ["## Preferences and rewards"]
    if report.preferences:
        table = [["pairs", *(system_label(*system) for system in preference_systems(report)), "number"]]
        table += [[line.category, *(_share(cell) for cell in line.cells), f"{line.num_pairs:,}"]
                  for line in preference_lines(report)]
        last = preference_lines(report)[-1]
        table.append([f"margin, {last.category}", *(_margin(cell) for cell in last.cells), f"{last.num_pairs:,}"])
        parts += ["How often each prefers the chosen answer of a held-out pair: the judge by its scores, a model by the "
                  "summed log-probability of the answer; and the margin, the mean difference of scores or of sums (nats), "
                  "which DPO widens; in brackets 95 % intervals.",
                  as_table(table)]
    if report.rewards:
        kl = [f"KL to {report.reference}"] if report.reference else []
        table = [["model", "judge's score", *kl, "exact match", "ended by itself", "tokens", "answers"]]
        table += [[row.model, _score(row), *([_kl(row)] if kl else []), _exact(row), f"{100 * row.ended:.1f} %",
                   f"{row.length:.1f}", f"{row.num_answers:,}"] for row in report.rewards]
        parts += ["Answers drawn at temperature 1, which is what PPO trains; in brackets 95 % "
                  "intervals over prompts. The score has no unit; KL is in nats per answer.", as_table(table)]
    return [*parts, "![preferences and rewards](preferences.png)"]


def _score(row: RewardRow) -> str:
    return interval(row.score, row.low, row.high, 3)


def _kl(row: RewardRow) -> str:
    return "–" if row.kl is None else interval(row.kl, row.kl_low, row.kl_high, 2)


def _exact(row: RewardRow) -> str:
    if row.exact is None or row.exact_low is None or row.exact_high is None:
        return "–"
    return f"{100 * row.exact:.1f} % [{100 * row.exact_low:.1f} – {100 * row.exact_high:.1f}]"


def _bits(cell: Cell) -> str:
    if cell.row is None:
        return "–"
    return interval(cell.row.value, cell.row.low, cell.row.high, 3)


def _share(cell: Cell) -> str:
    if cell.row is None:
        return "–"
    return f"{100 * cell.row.value:.1f} % [{100 * cell.row.low:.1f} – {100 * cell.row.high:.1f}]"


def _margin(cell: Cell) -> str:
    return "–" if cell.row is None else interval(cell.row.margin, cell.row.margin_low, cell.row.margin_high, 2)


def _ledger_cells(line: Any) -> list[str]:
    amounts = [f"{line.came[unit]:,} → {line.went[unit]:,}" if line.came[unit] or line.went[unit] else "–"
               for unit in ("rows", "bytes", "tokens")]
    return [line.step, line.station, *amounts, line.changes]


def _sample(sample: Sample) -> str:
    asked = f"**{inline(sample.task)}**\n\n" if sample.task else ""
    expected = f"\n\nexpected: {code(sample.expected)}" if sample.expected else ""
    answers = [f"{inline(answer.model)}{_marks(answer)}:\n\n{fence(answer.text)}" for answer in sample.answers]
    return "\n\n".join([f"{asked}{fence(sample.prompt)}{expected}", *answers])


def _marks(answer: Answered) -> str:
    """Whether an answer is right and what the judge gave it, as far as that is known."""
    right = "" if answer.right is None else " ✓" if answer.right else " ✗"
    return right + ("" if answer.score is None else f" (score {number(answer.score, 2)})")


def terminal_table(report: Report) -> "RenderableType":
    """The headline figures as tables for the terminal."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    if report.bits:
        lines = bits_lines(report)
        below = len(lines) > MAX_ON_ONE_LINE
        bits = _terminal("", [line.category for line in lines])
        for place, system in enumerate(systems_of(report)):
            cells = [line.cells[place] for line in lines]
            bits.add_row(Text(visible(system)), *(_shown(_bits(cell), cell.best, below) for cell in cells))
        bits.add_row("bytes", *(f"{line.num_bytes:,}" for line in lines), style="dim")
        bits.add_row("documents", *(f"{line.num_documents:,}" for line in lines), style="dim")
        parts += [Text("bits per byte of held-out text (lower is better)", style="bold"), bits]
    for section in sections(report):
        parts += _terminal_section(section)
    if report.skills:
        skills = _terminal("task", report.model_names, ("prompts",))
        for task_line in skill_lines(report):
            shares = (_shown(_share(cell), cell.best, len(report.model_names) > MAX_ON_ONE_LINE)
                      for cell in task_line.cells)
            skills.add_row(Text(visible(task_line.task)), *shares, f"{task_line.num_prompts:,}")
        parts += [Text("exact match on held-out prompts (higher is better)", style="bold"), skills]
    if report.preferences or report.rewards:
        parts += [Text("preferences of held-out pairs, and answers drawn at temperature 1", style="bold"),
                  _terminal_preferences(report)]
    parts.extend(Text(visible(note), style="bold red" if note.startswith(FORGOTTEN) else "dim") for note in report.notes)
    return Group(*parts)


def _terminal(first: str, columns: Sequence[str], last: Sequence[str] = ()) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD)
    made.add_column(first)
    for name in [*columns, *last]:
        made.add_column(Text(visible(name)), justify="right")
    return made


def _shown(figure: str, best: bool = False, below: bool = True) -> "Text":
    """A figure with its interval, `below` it or behind."""
    from rich.text import Text

    return Text(figure.replace(" [", "\n[") if below else figure, style="bold green" if best else "")


def _terminal_section(section: Section) -> "list[RenderableType]":
    """A section's first lines; the report has the others."""
    from rich.text import Text

    made = _terminal(section.header[0], section.header[1:])
    for row in section.rows[:MAX_TERMINAL_LINES]:
        made.add_row(*(Text(visible(cell)) for cell in row))
    if len(section.rows) > MAX_TERMINAL_LINES:
        made.add_row(f"… and {len(section.rows) - MAX_TERMINAL_LINES} more lines in the report", style="dim")
    return [Text(section.headline, style="bold"), made]


def _terminal_preferences(report: Report) -> "Table":
    """The judge and the models below each other with what they prefer over all pairs, and what their answers are worth."""
    from rich.text import Text

    preferred = {(line.category, cell.row.kind, cell.row.system): cell for line in preference_lines(report)
                 for cell in line.cells if cell.row is not None}
    rewards = {row.model: row for row in report.rewards}
    most = max((row.score for row in report.rewards), default=None)
    columns = ["prefers chosen", "margin"] if preferred else []
    columns += ["judge's score", *([f"KL to {report.reference}"] if report.reference else []), "exact"] if rewards else []
    table = _terminal("model", columns)
    judge = [("judge", report.judge)] if report.judge else []
    for kind, name in [*judge, *(("model", name) for name in report.model_names)]:
        cell, row = preferred.get((ALL_PAIRS, kind, name)), rewards.get(name) if kind == "model" else None
        if cell is None and row is None:
            continue
        cells = [_shown(_share(cell), cell.best) if cell else _shown("–"),
                 _shown(_margin(cell) if cell else "–")] if preferred else []
        if rewards and row is None:
            cells += [_shown("–")] * (len(columns) - len(cells))
        elif row is not None:
            cells += [_shown(_score(row), row.score == most), *([_shown(_kl(row))] if report.reference else []),
                      _shown(_exact(row))]
        table.add_row(Text(visible(system_label(kind, name))), *cells)
    return table
