"""Tables of a mix for the terminal: what a plan knows of it, and the account of what the steps take."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from danlu.pipeline.progress import show_number
from danlu.pipeline.tables import plain

if TYPE_CHECKING:
    from rich.table import Table

MAX_SOURCES, MAX_NAME = 5, 26  # of one category that a table shows, and how much of a name
HEADS = {"loss": "last loss", "eval_loss": "held-out loss"}


def account_table(title: str, account: Mapping[str, Any], sources: bool = False) -> "Table":
    """Asked and realised shares of the learned tokens side by side, by category, and where `sources`, by source."""
    table = _table(title)
    table.add_column(account["by"], overflow="fold", min_width=8)
    for head in ("asked", "realised", "tokens", "examples seen", "epochs", "never seen"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in account["groups"]:
        table.add_row(plain(row["name"]), _percent(row["asked"]), *_seen(row))
        if sources and len(row["sources"]) > 1:
            _add_sources(table, row["sources"])
    table.add_section()
    table.add_row("all", "", "", f"{account['tokens']:,}")
    return table


def loss_table(title: str, account: Mapping[str, Any], losses: Mapping[str, Mapping[str, float]]) -> "Table":
    """What was learned of each category, and how its loss went."""
    table = _table(title)
    table.add_column(account["by"], overflow="fold", min_width=8)
    told = [name for name in HEADS if any(name in own for own in losses.values())]
    for head in ("asked", "realised", "epochs", *(HEADS[name] for name in told)):
        table.add_column(head, justify="right", no_wrap=True)
    for row in account["groups"]:
        own = losses.get(row["name"], {})
        asked = "–" if row["asked"] is None else _percent(row["asked"])
        table.add_row(plain(row["name"]), asked, _percent(row["realised"]), f"{row['epochs']:.2f}",
                      *(_loss(own, name) for name in told))
    return table


def phase_table(account: Mapping[str, Any]) -> "Table":
    """Asked and realised shares of each phase."""
    table = _table("asked → realised")
    table.add_column(account["by"], overflow="fold", min_width=8)
    for phase in account["phases"]:
        table.add_column(plain(f"{phase['name']}: {phase['steps']:,} steps"), justify="right", overflow="fold")
    for row in account["groups"]:
        shares = [phase["shares"][row["name"]] for phase in account["phases"]]
        table.add_row(plain(row["name"]), *(f"{_percent(own['asked'])} → {_percent(own['realised'])}" for own in shares))
    return table


def _table(title: str) -> "Table":
    from rich.table import Table

    # as wide as its title, which would be folded
    return Table(title=plain(title, "table.title"), title_justify="left", header_style="bold", min_width=len(title))


def _add_sources(table: "Table", sources: Sequence[Mapping[str, Any]]) -> None:
    largest = sorted(sources, key=lambda part: -part["tokens"])[:MAX_SOURCES]
    for part in largest:
        name = part["name"]
        short = name if len(name) <= MAX_NAME else f"…{name[1 - MAX_NAME:]}"
        table.add_row(plain(f"  {short}"), "", *_seen(part), style="dim")
    if len(sources) > len(largest):
        table.add_row(f"  and {len(sources) - len(largest)} more", style="dim")


def _seen(row: Mapping[str, Any]) -> list[str]:
    return [_percent(row["realised"]), f"{row['tokens']:,}", f"{row['examples_seen']:,} of {row['examples']:,}",
            f"{row['epochs']:.2f}", f"{row['unseen_tokens']:,}"]


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _loss(own: Mapping[str, float], name: str) -> str:
    if name not in own:
        return ""
    return f"{own['eval_loss_before']:.3f} → {own[name]:.3f}" if name == "eval_loss" else f"{own[name]:.3f}"


def mix_tables(title: str, account: Mapping[str, Any], sources: bool = False) -> list["Table"]:
    """What some steps take, and where there are phases what each takes."""
    tables = [account_table(title, account, sources=sources)]
    return [*tables, phase_table(account)] if len(account["phases"]) > 1 else tables


def planned_tables(step: str, told: Mapping[str, Any], account: Mapping[str, Any] | None) -> list["Table"]:
    """What a plan knows of a step's mix: all of it where its examples have been made, else about how much is asked."""
    buckets = f", {told['buckets']} buckets" if told["buckets"] > 1 else ""
    title = f"{step}: mix of learned tokens{buckets}"
    return [_forecast_table(title, told)] if account is None else mix_tables(title, account)


def _forecast_table(title: str, told: Mapping[str, Any]) -> "Table":
    table = _table(title)
    table.add_column(told["by"], overflow="fold", min_width=8)
    for head in (told["phases"] if len(told["phases"]) > 1 else ["asked"]):
        table.add_column(plain(head), justify="right", no_wrap=True)
    known = [name for name in ("tokens", "epochs") if all(row[name] is not None for row in told["rows"])]
    for name in known:
        table.add_column(name, justify="right", no_wrap=True)
    for row in told["rows"]:
        shown = {name: f"≈ {show_number(row[name]) if name == 'tokens' else format(row[name], '.2f')}" for name in known}
        asked = ("" if share is None else _percent(share) for share in row["asked"])
        table.add_row(plain(row["name"]), *asked, *shown.values())
    return table
