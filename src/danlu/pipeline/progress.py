"""Progress for people: a bar with the time left on a terminal, sparse plain lines anywhere else.

    with show_progress(console, "training", total=600) as bar:
        bar.update(12, loss=3.2, tokens_per_second=5200)
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from danlu.core.terminal import visible
from danlu.pipeline.context import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

SECONDS = 10.0  # between two plain lines
SHARE = 0.1  # of the total, between two plain lines


def show_duration(seconds: float) -> str:
    """12.3 s, 4 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def show_number(value: float) -> str:
    """A number as short as it can be read: 1,234, 4.7 M, 3.2e+15, 0.0123."""
    if abs(value) < 1e6 and float(value).is_integer():
        return f"{int(value):,}"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if size <= abs(value) < 1e15:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.4g}"


def show_fields(fields: dict[str, float | str]) -> str:
    """loss 3.2  tokens/s 5,200"""
    words = []
    for name, value in fields.items():
        name = name.replace("_per_second", "/s").replace("_", " ")
        words.append(f"{name} {value if isinstance(value, str) else show_number(value)}")
    return "  ".join(words)


class PlainProgress:
    """Lines at every tenth of the work, or every ten seconds, whichever comes later."""

    def __init__(self, console: "Console", description: str, total: float | None) -> None:
        self.console, self.description, self.total = console, description, total
        self.started = self.said_at = time.monotonic()
        self.said = self.begun = 0.0

    def go_on(self, done: float) -> None:
        """So much was done earlier, and says nothing about how long the rest takes."""
        self.said = self.begun = done

    def update(self, done: float, **fields: float | str) -> None:
        """Says where the work stands, where enough time and work went by since it was said last."""
        now = time.monotonic()
        enough = self.total is None or done - self.said >= self.total * SHARE
        if (not enough and now - self.said_at < SECONDS * 6) or now - self.said_at < SECONDS:
            return
        words = [f"{self.description}: {show_number(done)}"]
        if self.total:
            words[0] += f"/{show_number(self.total)}"
        words.append(show_fields(fields))
        if self.total and self.begun < done < self.total:
            words.append(f"{show_duration((now - self.started) / (done - self.begun) * (self.total - done))} left")
        self.console.print("  ".join(word for word in words if word), highlight=False, markup=False)
        self.said, self.said_at = done, now


class BarProgress:
    """One bar on a terminal."""

    def __init__(self, bars: "RichProgress", task: "TaskID") -> None:
        self.bars, self.task = bars, task

    def go_on(self, done: float) -> None:
        """So much was done earlier, and says nothing about how long the rest takes."""
        if done:
            self.bars.reset(self.task, completed=int(done))

    def update(self, done: float, **fields: float | str) -> None:
        """Moves the bar."""
        self.bars.update(self.task, completed=done, fields=show_fields(fields))


@contextmanager
def show_progress(console: "Console", description: str, total: float | None = None) -> Iterator[Progress]:
    """Shows the progress of one piece of work while it lasts."""
    description = visible(description)
    if console.quiet or not console.is_terminal:
        yield PlainProgress(console, description, total)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}", markup=False), BarColumn(bar_width=28), MofNCompleteColumn(),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
               TextColumn("{task.fields[fields]}", markup=False))
    with RichProgress(*columns, console=console, transient=True) as bars:
        yield BarProgress(bars, bars.add_task(description, total=total, fields=""))
