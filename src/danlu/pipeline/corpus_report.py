"""The report on a corpus: what came, what stays, how long and in which language, and examples of what each rule removed.

It is made once, with the corpus: `report.json` for programs, `report.html` for people; `danlu corpus RECIPE STEP --report`
shows the same in the terminal. Text from the data is shown as text: escaped, control characters as signs.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from danlu.core.artifact import open_artifact
from danlu.core.errors import ConfigError, DataError
from danlu.core.ledger import Ledger
from danlu.core.terminal import visible
from danlu.pipeline.recipe import CURRENT, Recipe
from danlu.text.read import SourceConfig
from danlu.text.select import Chosen
from danlu.text.spool import Spool

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

REPORT, DATA = "report.html", "report.json"
QUARANTINED = 3  # refused inputs of each reason that are shown
MEASURED = "perplexity of what was measured, whether it stays or not"
BAR = 24  # characters of a bar in the terminal
CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #6b7280; --line: #e5e7eb; --paper: #ffffff; --card: #f6f8fa;
  --bar: #0b6e99; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e7eb; --soft: #9ca3af; --line: #374151; --paper: #111827;
  --card: #1f2937; --bar: #6cc0e5; } }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.55 system-ui, "Noto Sans CJK SC", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 24px; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 32px 0 8px; }
h3 { font-size: 15px; margin: 18px 0 6px; }
.soft { color: var(--soft); }
table { border-collapse: collapse; width: 100%; } .scroll { overflow-x: auto; }
th, td { text-align: left; padding: 5px 12px 5px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; } .number { text-align: right; white-space: nowrap; }
.bar { background: var(--bar); height: 12px; border-radius: 2px; min-width: 1px; } td.wide { width: 40%; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13px/1.6 ui-monospace, monospace; margin: 4px 0 10px; }
"""


def report_of(title: str, fingerprint: str, spool: Spool, chosen: Chosen, held: np.ndarray,
              sources: Sequence[SourceConfig], ledger: Ledger) -> dict[str, Any]:
    """All figures and examples, as plain values."""
    marks = spool.marks
    stays, categories = chosen.stays, {}
    names = [source.category for source in sources]
    for category in sorted(set(names)):
        own = stays & np.isin(spool.sources, [number for number, name in enumerate(names) if name == category])
        sizes, languages = chosen.sizes[own], marks["language"][own]
        categories[category] = {
            "documents": int(own.sum()), "bytes": int(sizes.sum()), "heldout": int((own & held).sum()),
            "lengths": lengths(chosen.chars[own]),
            "languages": {name: int((languages == number).sum()) for number, name in enumerate(spool.languages)
                          if (languages == number).any()}}
    by_reason: dict[str, list[dict[str, str]]] = {}
    for item in ledger.quarantined:
        shown = by_reason.setdefault(item.reason.partition(":")[0].partition(" (")[0], [])
        if len(shown) < QUARANTINED:
            shown.append({"where": item.where, "excerpt": item.excerpt})
    return {"title": title, "fingerprint": fingerprint, "categories": categories, "ledger": ledger.to_json(),
            "removed": [{"station": item.station, "reason": item.reason, "where": item.where, "excerpt": item.excerpt,
                         "like": item.like} for item in chosen.removed],
            "perplexities": {language: {str(least): count for least, count in counts.items()}
                             for language, counts in spool.perplexities().items()},
            "quarantine": by_reason}


def lengths(chars: np.ndarray) -> dict[str, int]:
    """How many texts have at least so many characters and fewer than the next power of two: {"64": 12, "128": 40}."""
    counts = np.bincount(np.frexp(np.maximum(chars, 1))[1] - 1) if len(chars) else np.zeros(0, np.int64)
    first = int(np.argmax(counts > 0)) if counts.any() else 0
    return {str(2 ** power): int(count) for power, count in enumerate(counts) if power >= first}


def write_report(report: Mapping[str, Any], folder: Path) -> None:
    """Writes `report.json` and `report.html`."""
    (folder / DATA).write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
    (folder / REPORT).write_text(page(report), encoding="utf-8")


def page(report: Mapping[str, Any]) -> str:
    """The report as one page that needs nothing else."""
    parts = ['<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
             "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
             '<meta name="viewport" content="width=device-width, initial-scale=1">',
             f"<title>{_text(report['title'])}: corpus</title><style>{CSS}</style></head><body><main>",
             f"<h1>{_text(report['title'])}</h1><div class=soft>corpus · <code>{report['fingerprint'][:8]}</code></div>",
             "<h2>What stays</h2>", _table(("category", "documents", "bytes", "held out", "languages"), (
                 (name, part["documents"], part["bytes"], part["heldout"],
                  ", ".join(f"{language} {count:,}" for language, count in part["languages"].items()))
                 for name, part in report["categories"].items()))]
    for name, part in report["categories"].items():
        parts += [f"<h3>{_text(name)}: length in characters</h3>", _histogram(part["lengths"])]
    for language, counts in report["perplexities"].items():
        parts += [f"<h3>{_text(language)}: {MEASURED}</h3>", _histogram(counts)]
    parts += ["<h2>The road</h2>", _table(("station", "in", "out", "what was dropped, added or noted"), (
        (station["name"], station["in"]["rows"], station["out"]["rows"], "; ".join(_losses(station)))
        for station in report["ledger"]["stations"]))]
    parts.append("<h2>Examples of what was removed</h2>")
    for (station, reason), items in _by_reason(report["removed"]).items():
        parts.append(f"<h3>{_text(station)}: {_text(reason)}</h3>")
        parts += [_example(item["where"] + (f" ~ {item['like']}" if item["like"] else ""), item["excerpt"])
                  for item in items]
    if report["quarantine"]:
        parts.append(f"<h2>Quarantine: {report['ledger']['quarantined']:,} refused</h2>")
        for reason, items in report["quarantine"].items():
            parts.append(f"<h3>{_text(reason)}</h3>")
            parts += [_example(item["where"], item["excerpt"]) for item in items]
    return "\n".join([*parts, "</main></body></html>\n"])


def _by_reason(removed: Iterable[Mapping[str, str]]) -> dict[tuple[str, str], list[Mapping[str, str]]]:
    found: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for item in removed:
        found.setdefault((item["station"], item["reason"]), []).append(item)
    return found


def _losses(station: Mapping[str, Any]) -> list[str]:
    """What a station did, in words."""
    words = []
    for name, sign in (("dropped", "−"), ("added", "+")):
        for reason, count in station[name].items():
            amount = f"{sign}{count['rows']:,} rows" if count["rows"] else f"{sign}{count['bytes']:,} bytes"
            words.append(f"{reason} {amount}")
    return words + [f"{text} ({rows:,})" for text, rows in station.get("notes", {}).items()]


def _text(text: str) -> str:
    return escape(visible(text))


def _example(where: str, excerpt: str) -> str:
    return f"<div class=soft>{_text(where)}</div><pre>{_text(excerpt)}</pre>"


def _table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    body = "".join("<tr>" + "".join(
        f"<td class=number>{cell:,}</td>" if isinstance(cell, int) else f"<td>{_text(cell)}</td>" for cell in row) + "</tr>"
        for row in rows)
    return f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>"


def _least(number: str) -> str:
    return f"{float(number):,.12g}"


def _histogram(counts: Mapping[str, int]) -> str:
    most = max(counts.values(), default=1)
    rows = "".join(f"<tr><td class=number>≥ {_least(least)}</td><td class=number>{count:,}</td><td class=wide>"
                   f'<div class=bar style="width:{100 * count / most:.1f}%"></div></td></tr>'
                   for least, count in counts.items())
    return f"<table>{rows}</table>"


def _bars(title: str, measure: str, counts: Mapping[str, int]) -> "Table":
    """A histogram for the terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(visible(title)), title_justify="left")
    for column in (measure, "documents", ""):
        table.add_column(column, justify="left" if not column else "right")
    most = max(counts.values(), default=1)
    for least, count in counts.items():
        table.add_row(f"≥ {_least(least)}", f"{count:,}", "█" * -(-BAR * count // most))
    return table


def show_report(recipe: Recipe, step: str, console: "Console", runs: str | Path = "runs") -> None:
    """Prints the report of a corpus that was made. Raises ConfigError for a step that is none or has not run.

    Where the recipe now says something else than what it was made with, that is said first.
    """
    from rich.text import Text

    from danlu.pipeline.plan import changed_settings

    found = recipe.step(step)
    if found.stage != "corpus":
        raise ConfigError(f"“{step}” is a step of stage {found.stage}, not corpus", where=found.place)
    pointer = Path(runs) / recipe.name / found.name / CURRENT
    if not pointer.is_file():
        raise ConfigError(f"the step “{found.name}” has not run yet", where=found.place, hint="danlu run makes it.")
    artifact = open_artifact(pointer.parent / pointer.read_text(encoding="utf-8").strip(), kind="corpus")
    folder = artifact.folder
    if not (folder / DATA).is_file():
        raise DataError("the corpus was made by an earlier danlu, without a report", where=str(folder))
    report = json.loads((folder / DATA).read_bytes())
    if changes := changed_settings(recipe, found, artifact.manifest["config"]):
        console.print(Text(visible("This corpus was made with other settings than the recipe has now "
                                   f"({'; '.join(changes)}); danlu run makes it anew."), style="yellow"))
    for name, part in report["categories"].items():
        title = f"{name}: {part['documents']:,} documents, {part['bytes']:,} bytes, {part['heldout']:,} held out"
        console.print(_bars(title, "characters", part["lengths"]))
        console.print(Text("languages: " + ", ".join(f"{language} {count:,}" for language, count in
                                                     part["languages"].items())))
    for language, counts in report["perplexities"].items():
        console.print(_bars(f"{language}: {MEASURED}", "perplexity", counts))
    for station in report["ledger"]["stations"]:
        console.print(Text(visible(f"{station['name']}: {station['in']['rows']:,} → {station['out']['rows']:,}"
                                   + "".join(f"\n  {loss}" for loss in _losses(station)))))
    for (place, reason), items in _by_reason(report["removed"]).items():
        console.print(Text(f"{place}: {reason}", style="bold"))
        for item in items:
            like = f" ~ {item['like']}" if item["like"] else ""
            console.print(Text(visible(f"  {item['where']}{like}: {' '.join(item['excerpt'].split())[:160]}")))
    console.print(Text(f"\nThe whole report: {folder / REPORT}"))
