"""Writes a Report for people and for programs: report.html (one file, no links), report.md, report.json and pictures.

Text that a model wrote is shown as text: it is escaped, control characters are made visible, and the page's own policy
allows neither scripts nor anything from outside.

    write_report(report, folder)
    console.print(terminal_table(report))
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from danlu.core.terminal import visible
from danlu.evals.figures import BitsRow, Report, Sample, SkillRow

if TYPE_CHECKING:
    from rich.console import RenderableType

FILES = ("report.html", "report.md", "report.json", "bits_per_byte.png", "exact_match.png", "loss.png")


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


def write_report(report: Report, folder: Path) -> None:
    """Writes all files of the report into a folder. The same report gives the same bytes."""
    from danlu.evals import charts

    if report.bits:
        charts.draw_bits(report.bits, report.model_names, folder / "bits_per_byte.png")
    if report.skills:
        charts.draw_skills(report.skills, report.model_names, folder / "exact_match.png")
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
    environment.filters["csp_hash"] = lambda css: base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    template = environment.from_string(resources.files("danlu.evals").joinpath("report.html").read_text("utf-8"))
    page = template.render(report=report, systems=systems_of(report), bits=bits_lines(report),
                           skills=skill_lines(report), picture=picture)
    return page.lstrip() + "\n"


def markdown(report: Report) -> str:
    """The report as Markdown; the pictures are linked by name."""
    parts = [f"# {_inline(report.title)}", f"danlu report `{report.fingerprint[:8]}`"]
    if report.bits:
        table = [["text", *systems_of(report), "bytes", "documents"]]
        table += [[line.category, *(_bits(cell) for cell in line.cells), f"{line.num_bytes:,}",
                   f"{line.num_documents:,}"] for line in bits_lines(report)]
        parts += ["## Bits per byte of held-out text", "Lower is better; in brackets 95 % intervals over documents.",
                  _table(table), "![bits per byte](bits_per_byte.png)"]
    if report.skills:
        table = [["task", *report.model_names, "prompts"]]
        table += [[line.task, *(_share(cell) for cell in line.cells), f"{line.num_prompts:,}"]
                  for line in skill_lines(report)]
        parts += ["## Tasks", "Exact match; in brackets 95 % Wilson intervals.", _table(table),
                  "![exact match](exact_match.png)"]
    for heading, samples in (("Samples", report.samples), ("Free prompts", report.free)):
        if samples:
            parts += [f"## {heading}", *(_sample(sample) for sample in samples)]
    if report.curves:
        parts += ["## Training", "![loss](loss.png)"]
    if report.models:
        table = [["model", "parameters", "vocabulary", "context", "fingerprint", "notes"]]
        table += [[model.name, f"{model.num_parameters:,}", f"{model.vocab_size:,}", f"{model.context:,}",
                   model.fingerprint[:8], " ".join(model.notes)] for model in report.models]
        parts += ["## Models", _table(table)]
    if report.lineage:
        table = [["step", "leaves", "fingerprint", "made from", "figures"]]
        table += [[step.step, step.kind, step.fingerprint[:8], " ".join(step.parents), step.summary]
                  for step in report.lineage]
        parts += ["## Where it came from", _table(table)]
    if report.ledger:
        parts += ["## The ledger", _table([["step", "station", "rows", "bytes", "tokens", "added and dropped"],
                                           *(_ledger_cells(line) for line in report.ledger)])]
    if report.notes:
        parts += ["## Notes", "\n".join(f"- {_inline(note)}" for note in report.notes)]
    return "\n\n".join(parts) + "\n"


def _bits(cell: Cell) -> str:
    if cell.row is None:
        return "–"
    interval = f" [{cell.row.low:.3f} – {cell.row.high:.3f}]" if cell.row.low is not None else ""
    return f"{cell.row.value:.3f}{interval}"


def _share(cell: Cell) -> str:
    if cell.row is None:
        return "–"
    return f"{100 * cell.row.value:.1f} % [{100 * cell.row.low:.1f} – {100 * cell.row.high:.1f}]"


def _ledger_cells(line: Any) -> list[str]:
    amounts = [f"{line.came[unit]:,} → {line.went[unit]:,}" if line.came[unit] or line.went[unit] else "–"
               for unit in ("rows", "bytes", "tokens")]
    return [line.step, line.station, *amounts, line.changes]


def _sample(sample: Sample) -> str:
    asked = f"**{_inline(sample.task)}**\n\n" if sample.task else ""
    expected = f"\n\nexpected: {_code(sample.expected)}" if sample.expected else ""
    answers = [f"{_inline(answer.model)}{'' if answer.right is None else ' ✓' if answer.right else ' ✗'}:\n\n"
               f"{_fence(answer.text)}" for answer in sample.answers]
    return "\n\n".join([f"{asked}{_fence(sample.prompt)}{expected}", *answers])


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(_inline(cell) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def _inline(text: str) -> str:
    """Text in a line of Markdown: nothing in it is taken for markup."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", visible(" ".join(text.split())))


def _code(text: str) -> str:
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{ticks} {visible(' '.join(text.split()))} {ticks}"


def _fence(text: str) -> str:
    """A fenced block whose fence is longer than any run of backticks inside."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{ticks}text\n{visible(text)}\n{ticks}"


def terminal_table(report: Report) -> "RenderableType":
    """The headline figures as tables for the terminal."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    def table(title: str, first: str, columns: Sequence[str], last: Sequence[str]) -> Table:
        made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
        made.add_column(first)
        for name in [*columns, *last]:
            made.add_column(Text(visible(name)), justify="right")
        return made

    parts: list[RenderableType] = []
    if report.bits:
        bits = table("bits per byte of held-out text (lower is better)", "text", systems_of(report),
                     ("bytes", "documents"))
        for line in bits_lines(report):
            cells = [Text(_bits(cell).replace(" [", "\n["), style="bold green" if cell.best else "")
                     for cell in line.cells]
            bits.add_row(Text(visible(line.category)), *cells, f"{line.num_bytes:,}", f"{line.num_documents:,}")
        parts.append(bits)
    if report.skills:
        skills = table("exact match on held-out prompts (higher is better)", "task", report.model_names, ("prompts",))
        for task_line in skill_lines(report):
            cells = [Text(_share(cell), style="bold green" if cell.best else "") for cell in task_line.cells]
            skills.add_row(Text(visible(task_line.task)), *cells, f"{task_line.num_prompts:,}")
        parts.append(skills)
    parts.extend(Text(visible(note), style="dim") for note in report.notes)
    return Group(*parts)
