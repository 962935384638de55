"""The report's pictures as PNG files: loss curves, bits per byte beside the baselines, exact match by task.

The same figures give the same bytes: no dates are written, and nothing depends on a screen. A model has one colour in
all pictures, by its place among the models.

    draw_bits(report.bits, report.model_names, folder / "bits_per_byte.png")
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from danlu.core.terminal import visible
from danlu.evals.figures import BitsRow, Curve, SkillRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODEL_COLORS = ("#0b6e99", "#d1495b", "#edae49", "#6a4c93", "#2a9d8f", "#8d6a4f")
BASELINE_COLORS = {"n-gram": "#6b7280", "xz -9": "#a8adb7", "gzip -9": "#d4d7dd"}
INK, FAINT = "#1f2430", "#e5e7eb"
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "SimHei", "PingFang SC")
Bars = dict[tuple[str, str], tuple[float, float | None, float | None]]  # (group, series) → value, low, high
SMOOTHING = 0.05  # of all points, the width of the moving average of a training curve


def draw_losses(curves: Sequence[Curve], models: Sequence[str], path: Path) -> None:
    """One panel per model: the loss of each logged step faintly, its moving average and the evaluations on top."""
    colors = _model_colors(models)
    names = list(dict.fromkeys(curve.model for curve in curves))
    figure, panels = _canvas(width=4.6 * len(names), height=3.3, panels=len(names))
    for name, axes in zip(names, panels, strict=True):
        color = colors[name]
        for curve in (curve for curve in curves if curve.model == name):
            if curve.label == "training":
                axes.plot(curve.steps, curve.values, color=color, alpha=0.22, linewidth=0.9)
                axes.plot(curve.steps, _smooth(curve.values), color=color, linewidth=1.8, label="training (smoothed)")
            else:
                axes.plot(curve.steps, curve.values, color=INK, linewidth=1.2, marker="o", markersize=3,
                          linestyle="--", label=visible(curve.label))
        axes.set_title(visible(name), fontsize=10, loc="left", color=INK)
        axes.set_xlabel("step")
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("loss (nats per learned token)")
    _save(figure, path)


def draw_bits(rows: Sequence[BitsRow], models: Sequence[str], path: Path) -> None:
    """Bars grouped by category; lower is better; whiskers are 95 % intervals where there are any."""
    systems = list(dict.fromkeys(row.system for row in rows))
    categories = list(dict.fromkeys(row.category for row in rows))
    colors = {**BASELINE_COLORS, **_model_colors(models)}
    values: Bars = {(row.category, row.system): (row.value, row.low, row.high) for row in rows}
    figure, [axes] = _canvas(width=max(5.0, 1.4 + 0.62 * len(systems) * len(categories)), height=3.4, panels=1)
    _bars(axes, categories, systems, colors, values, "{:.2f}")
    axes.set_ylabel("bits per byte (lower is better)")
    _save(figure, path)


def draw_skills(rows: Sequence[SkillRow], models: Sequence[str], path: Path) -> None:
    """Bars grouped by task; higher is better; whiskers are 95 % Wilson intervals."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    values: Bars = {(row.task, row.model): (100 * row.value, 100 * row.low, 100 * row.high) for row in rows}
    figure, [axes] = _canvas(width=max(5.0, 1.4 + 0.28 * (len(models) + 0.6) * len(tasks)), height=3.4, panels=1)
    _bars(axes, tasks, models, _model_colors(models), values, "{:.0f}")
    axes.set_ylim(0, 108)
    axes.set_ylabel("exact match in % (higher is better)")
    _save(figure, path)


def _model_colors(models: Sequence[str]) -> dict[str, str]:
    return {name: MODEL_COLORS[number % len(MODEL_COLORS)] for number, name in enumerate(models)}


def _bars(axes: "Axes", groups: Sequence[str], series: Sequence[str], colors: dict[str, str],
          values: Bars, form: str) -> None:
    """Bars of every (group, series) that has a value, with its number above."""
    width = 0.84 / len(series)
    for number, name in enumerate(series):
        for place, group in enumerate(groups):
            if (group, name) not in values:
                continue
            value, low, high = values[group, name]
            x = place + (number - (len(series) - 1) / 2) * width
            axes.bar(x, value, width * 0.92, color=colors[name], label=name, zorder=2)
            top = value
            if low is not None and high is not None:
                axes.vlines(x, low, high, color=INK, linewidth=1.1, zorder=3)
                top = max(value, high)
            axes.annotate(form.format(value), (x, top), xytext=(0, 2), textcoords="offset points", ha="center",
                          fontsize=7.5, color=INK)
    axes.set_xticks(range(len(groups)), [visible(group) for group in groups])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)
    handles, labels = axes.get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    axes.legend(known.values(), map(visible, known), frameon=False, fontsize=8, ncols=min(6, len(known)), loc="lower left",
                bbox_to_anchor=(0, 1.0), borderaxespad=0.2, handlelength=1, columnspacing=1.2)


def _smooth(values: Sequence[float]) -> list[float]:
    """A centred moving average whose window shrinks at both ends."""
    import numpy as np

    half = int(len(values) * SMOOTHING / 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return ((sums[high] - sums[low]) / (high - low)).tolist()


def _canvas(*, width: float, height: float, panels: int) -> tuple["Figure", list["Axes"]]:
    """A figure without any global state of the drawing library."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, facecolor="white", layout="constrained")
    all_axes = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    for axes in all_axes:
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color("#9ca3af")
        axes.tick_params(colors=INK, labelsize=8, left=False)
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.yaxis.label.set(fontsize=8.5, color=INK)
        axes.xaxis.label.set(fontsize=8.5, color=INK)
    return figure, all_axes


def _save(figure: "Figure", path: Path) -> None:
    from matplotlib import font_manager
    from matplotlib.text import Text

    installed = set(font_manager.get_font_names())
    for text in figure.findobj(Text):
        assert isinstance(text, Text), "only texts were asked for"
        text.set_fontfamily([name for name in FONTS if name in installed])
        text.set_parse_math(False)  # a category such as `$\x$` is a name, not a formula
    figure.savefig(path, metadata={"Software": None})
