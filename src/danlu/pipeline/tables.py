"""Tables for the terminal: the plan, and the ledger of a run.

Names, reasons and places come from data: they are shown as they are, never read as rich's markup or obeyed as escape
sequences.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from danlu.core.ledger import UNITS
from danlu.core.terminal import visible
from danlu.pipeline.context import Amount
from danlu.pipeline.progress import show_duration, show_number

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from danlu.pipeline.plan import Plan, PlannedStep


NUMBERS = ("tokens", "steps", "FLOPs", "memory", "time")


def show_bytes(value: float) -> str:
    """1.5 GB: in powers of 1000, as disks are sold."""
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{int(value)} B"


def _amount(amount: Amount | None, show: Any) -> str:
    return "" if amount is None else f"{'' if amount.exact else '≈ '}{show(amount.value)}"


def _flops(value: float) -> str:
    return f"{value:.2e}"


def plan_tables(plan: "Plan", accounts: Mapping[str, Mapping[str, Any]]) -> list["RenderableType"]:
    """The plan's table, and below it the mixes and notes of the steps; `accounts` as `Plan.render` has them.

    Raises DataError where a mix whose examples are there would take something more often than its `max_epochs`.
    """
    from rich.table import Table
    from rich.text import Text

    from danlu.pipeline.mix_tables import planned_tables

    table = Table(title=_title(f"{plan.recipe.title} → {plan.folder}"), title_justify="left", header_style="bold")
    table.add_column("step", no_wrap=True)
    table.add_column("stage", no_wrap=True)
    table.add_column("why", overflow="fold", min_width=16)
    rows = [_numbers(planned) for planned in plan.steps.values()]
    shown = [index for index in range(len(NUMBERS)) if any(row[index] for row in rows)]
    for index in shown:
        table.add_column(NUMBERS[index], justify="right", no_wrap=True)
    for planned, row in zip(plan.steps.values(), rows, strict=True):
        table.add_row(plain(planned.step.name), plain(planned.step.stage), _why(planned),
                      *(row[index] for index in shown), style="dim" if planned.artifact else "")
    notes = [f"{planned.step.name}: {note}" for planned in plan.steps.values() for note in planned.forecast.notes]
    for name, account in accounts.items():
        from danlu.data.shares import require_epochs

        settings: Any = plan.steps[name].step.settings
        notes += [f"{name}: {sentence}" for sentence in require_epochs(account, settings.mix.max_epochs)]
    todo = [planned for planned in plan.steps.values() if planned.artifact is None]
    seconds = [planned.forecast.seconds for planned in todo if planned.forecast.seconds is not None]
    total = f"{len(todo)} of {len(plan.steps)} steps to run"
    if seconds:
        total += f", about {show_duration(sum(amount.value for amount in seconds))}"
    mixes = [table for planned in todo if "mix" in planned.forecast.facts for table in
             planned_tables(planned.step.name, planned.forecast.facts["mix"], accounts.get(planned.step.name))]
    return [table, *mixes, *(plain(note, "yellow") for note in notes), Text(total + ".")]


def plain(text: str, style: str = "") -> "Text":
    """Text that is shown as it is, whatever is written in it."""
    from rich.text import Text

    return Text(visible(text), style=style)


def _title(text: str) -> "Text":
    return plain(text, "table.title")


def _why(planned: "PlannedStep") -> "Text":
    from rich.text import Text

    return Text.assemble(("reuse", "green") if planned.artifact else ("run", "bold"), " ", plain(planned.reason))


def _numbers(planned: "PlannedStep") -> list[str]:
    forecast = planned.forecast
    return [_amount(forecast.tokens, show_number), _amount(forecast.steps, show_number),
            _amount(forecast.flops, _flops), _amount(forecast.memory, show_bytes),
            _amount(forecast.seconds, show_duration)]


def ledger_table(title: str, ledger: Mapping[str, Any]) -> "Table":
    """Every station of a ledger: what came in, what was added or dropped and why, what went out."""
    from rich.table import Table

    table = Table(title=_title(title), title_justify="left", header_style="bold")
    table.add_column("station", overflow="fold")
    table.add_column("", overflow="fold")
    for unit in UNITS:
        table.add_column(unit, justify="right", no_wrap=True)
    for station in ledger["stations"]:
        lines = [("in", station["in"])]
        lines += [(f"+ {reason}", count) for reason, count in station["added"].items()]
        lines += [(f"− {reason}", count) for reason, count in station["dropped"].items()]
        lines += [("out", station["out"])]
        for number, (label, count) in enumerate(lines):
            name = station["name"] if number == 0 else ""
            table.add_row(plain(name), plain(label), *(f"{count[unit]:,}" if count[unit] else "" for unit in UNITS))
        for note, rows in station.get("notes", {}).items():
            table.add_row("", plain(note, "yellow"), f"{rows:,}")
        wrong = imbalance(station)
        table.add_row("", f"[red]does not balance: {wrong}[/]" if wrong else "[green]balances[/]", end_section=True)
    return table


def imbalance(station: Mapping[str, Any]) -> str:
    """What a station's numbers leave unexplained; empty where they balance."""
    found = []
    for unit in UNITS:
        left = station["in"][unit] + sum(count[unit] for count in station["added"].values())
        right = station["out"][unit] + sum(count[unit] for count in station["dropped"].values())
        if left != right:
            found.append(f"{left - right:+,} {unit}")
    return ", ".join(found)


def quarantine_table(quarantine: Mapping[str, tuple[int, list[str]]]) -> "Table":
    """What was refused: each reason, how often, and where it was met first."""
    from rich.table import Table

    table = Table(title="quarantine", title_justify="left", header_style="bold")
    table.add_column("reason", overflow="fold")
    table.add_column("count", justify="right")
    table.add_column("first places", overflow="fold")
    for reason, (count, places) in quarantine.items():
        table.add_row(plain(reason), f"{count:,}", plain(", ".join(places)))
    return table
