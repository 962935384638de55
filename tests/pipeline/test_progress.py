"""Progress on a terminal and elsewhere; tables of what data say."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from danlu.pipeline import progress
from danlu.pipeline.context import Forecast
from danlu.pipeline.progress import show_duration, show_fields, show_number, show_progress
from danlu.pipeline.tables import ledger_table, plan_tables, quarantine_table


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (12, "12"), (1234, "1,234"), (999_999, "999,999"), (4_700_000, "4.7 M"), (3.0, "3"),
    (2.34567, "2.346"), (1.5e-5, "1.5e-05"), (3.2e18, "3.2e+18"), (2_500_000_000, "2.5 G"),
])
def test_numbers(value, text):
    assert show_number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [(1.26, "1.3 s"), (245, "4 min 05 s"), (7800, "2 h 10 min")])
def test_durations(seconds, text):
    assert show_duration(seconds) == text


def test_fields():
    assert show_fields({"loss": 3.25, "tokens_per_second": 5200, "at": "end"}) == "loss 3.25  tokens/s 5,200  at end"


def test_plain_lines_are_sparse(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with show_progress(Console(file=out, width=100), "training", total=100) as bar:
        for done in range(1, 101):
            now[0] += 3.0
            bar.update(done, loss=1.5)
    lines = out.getvalue().splitlines()
    assert lines[0] == "training: 10/100  loss 1.5  4 min 30 s left"
    assert len(lines) == 10


def test_what_was_done_earlier_says_nothing_about_the_rest(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with show_progress(Console(file=out, width=100), "training", total=100) as bar:
        bar.go_on(80)
        for done in range(81, 101):
            now[0] += 3.0
            bar.update(done)
    assert out.getvalue().splitlines() == ["training: 90/100  30.0 s left", "training: 100/100"]
    out = io.StringIO()
    with show_progress(Console(file=out, force_terminal=True, width=120), "training", total=100) as bar:
        bar.go_on(80)
        bar.update(81)
        assert bar.bars.tasks[0].completed == 81 and bar.bars.tasks[0].total == 100
        assert bar.bars.tasks[0].fields["fields"] == ""


def test_plain_lines_of_quick_work_and_of_unknown_size(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with show_progress(Console(file=out), "reading") as bar:
        for done in range(1, 100):
            now[0] += 1.0
            bar.update(done * 1000)
    assert out.getvalue().splitlines()[:2] == ["reading: 10,000", "reading: 20,000"]
    with show_progress(Console(file=(out := io.StringIO())), "quick", total=5) as bar:
        for done in range(5):
            bar.update(done)
    assert out.getvalue() == ""


def test_a_bar_on_a_terminal():
    out = io.StringIO()
    with show_progress(Console(file=out, force_terminal=True, width=120), "training", total=10) as bar:
        bar.update(5, loss=1.5)
        bar.bars.refresh()
    assert "training" in out.getvalue() and "5/10" in out.getvalue() and "loss 1.5" in out.getvalue()


EVIL = "[red]a[/] [/nothing] \x1b[2J\u202e"
SHOWN = "[red]a[/] [/nothing] ␛[2J\ufffd"


def test_tables_show_data_as_they_are():
    nothing = {"rows": 0, "bytes": 0, "tokens": 0}
    station = {"name": f"read:{EVIL}", "in": nothing, "added": {f"added {EVIL}": nothing},
               "dropped": {f"dropped {EVIL}": nothing}, "out": nothing}
    out = io.StringIO()
    console = Console(file=out, width=300, force_terminal=True, color_system=None)
    console.print(ledger_table(f"title {EVIL}", {"stations": [station]}))
    console.print(quarantine_table({f"reason {EVIL}": (2, [f"place {EVIL}"])}))
    step = SimpleNamespace(name=EVIL, stage="count")
    planned = SimpleNamespace(step=step, artifact=None, reason=f"why {EVIL}", forecast=Forecast(notes=[f"note {EVIL}"]))
    whole = SimpleNamespace(recipe=SimpleNamespace(title="demo"), folder=EVIL, steps={"a": planned})
    for part in plan_tables(whole, {}):
        console.print(part)
    for word in ("title ", "read:", "+ added ", "− dropped ", "reason ", "place ", "demo → ", "run why ", "note "):
        assert word + SHOWN in out.getvalue(), word
    assert "\x1b[2J" not in out.getvalue() and "\u202e" not in out.getvalue()
