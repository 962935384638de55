"""The report's pictures as PNG files: training curves, bits per byte beside the baselines, exact match by task, and
preferences with rewards.

The same figures give the same bytes: no dates are written, and nothing depends on a screen. A model has one colour in
all pictures, by its place among the models; a judge has its own.

    draw_bits(report.bits, report.model_names, folder / "bits_per_byte.png")
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from danlu.core.terminal import visible
from danlu.evals.figures import BitsRow, Curve, PreferenceRow, RewardRow, SkillRow, system_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MODEL_COLORS = ("#0b6e99", "#d1495b", "#edae49", "#6a4c93", "#2a9d8f", "#8d6a4f")
BASELINE_COLORS = {"n-gram": "#6b7280", "xz -9": "#a8adb7", "gzip -9": "#d4d7dd"}
JUDGE_COLOR = "#3f4756"
INK, FAINT = "#1f2430", "#e5e7eb"
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Source Han Sans SC", "WenQuanYi Zen Hei", "SimHei", "PingFang SC")
Bars = dict[tuple[str, str], tuple[float, float | None, float | None]]  # (group, series) → value, low, high
SMOOTHING = 0.05  # of all points, the width of the moving average of a training curve
RAW = ("training", "reward")  # curves of single steps, which are smoothed
PANELS_PER_ROW = 3
MOST_IN_LEGEND = 6  # names beside each other
WIDEST = 11.5  # inches: a wider picture would be shrunk until nobody can read it


def draw_losses(curves: Sequence[Curve], models: Sequence[str], path: Path) -> None:
    """One panel per model: the loss (or reward) of each logged step faintly, its moving average and the evaluations."""
    from matplotlib.ticker import MaxNLocator

    colors = _model_colors(models)
    names = list(dict.fromkeys(curve.model for curve in curves))
    per_row = min(PANELS_PER_ROW, len(names))
    figure, panels = _canvas(width=4.6 * per_row, height=3.3 * -(-len(names) // per_row), panels=len(names),
                             per_row=per_row)
    unit = ""
    for name, axes in zip(names, panels, strict=True):
        color = colors.get(name, JUDGE_COLOR)  # what is none of the models is the judge
        own = [curve for curve in curves if curve.model == name]
        for curve in own:
            if curve.label in RAW:
                axes.plot(curve.steps, curve.values, color=color, alpha=0.22, linewidth=0.9)
                axes.plot(curve.steps, _smooth(curve.values), color=color, linewidth=1.8,
                          label=f"{curve.label} (smoothed)")
            else:
                axes.plot(curve.steps, curve.values, color=INK, linewidth=1.2, marker="o", markersize=3,
                          linestyle="--", label=visible(curve.label))
        axes.set_title(visible(name), fontsize=10, loc="left", color=INK)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.legend(frameon=False, fontsize=8)
        if own[0].unit != unit:  # else the axis says what the one before it says
            unit = own[0].unit
            axes.set_ylabel(unit)
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
    width = min(WIDEST, max(5.0, 1.4 + 0.28 * (len(models) + 0.6) * len(tasks)))
    figure, [axes] = _canvas(width=width, height=3.4, panels=1)
    _bars(axes, tasks, models, _model_colors(models), values, "{:.0f}")
    axes.set_ylim(0, 108)
    axes.set_ylabel("exact match in % (higher is better)")
    _save(figure, path)


def draw_preferences(preferences: Sequence[PreferenceRow], rewards: Sequence[RewardRow], models: Sequence[str],
                     path: Path) -> None:
    """Beside each other, as far as they are there: how often each prefers the chosen answer, and each one's mean score."""
    systems = list(dict.fromkeys((row.kind, row.system) for row in preferences))
    categories = list(dict.fromkeys(row.category for row in preferences))
    widths = [max(3.6, 1.2 + 0.34 * len(systems) * len(categories))] if preferences else []
    widths += [max(2.8, 1.2 + 0.62 * len(rewards))] if rewards else []
    figure, panels = _canvas(width=sum(widths), height=3.6, panels=len(widths), widths=widths)
    colors = _model_colors(models)
    if preferences:
        names = {key: system_label(*key) for key in systems}
        values: Bars = {(row.category, names[row.kind, row.system]): (100 * row.value, 100 * row.low, 100 * row.high)
                        for row in preferences}
        bars = {names[key]: JUDGE_COLOR if key[0] == "judge" else colors[key[1]] for key in systems}
        _bars(panels[0], categories, list(names.values()), bars, values, "{:.0f}")
        panels[0].axhline(50, color=INK, linewidth=0.9, linestyle=":", zorder=4)  # a coin
        panels[0].set_ylim(0, 108)
        panels[0].set_ylabel("prefers the chosen answer, in %")
    if rewards:
        means: Bars = {(row.model, row.model): (row.score, row.low, row.high) for row in rewards}
        _bars(panels[-1], [row.model for row in rewards], [row.model for row in rewards], colors, means, "{:.2f}",
              grouped=False)
        panels[-1].axhline(0, color="#9ca3af", linewidth=0.8, zorder=1)
        panels[-1].set_ylabel("judge's mean score of a sampled answer")
    _save(figure, path)


def _model_colors(models: Sequence[str]) -> dict[str, str]:
    return {name: MODEL_COLORS[number % len(MODEL_COLORS)] for number, name in enumerate(models)}


def _bars(axes: "Axes", groups: Sequence[str], series: Sequence[str], colors: dict[str, str],
          values: Bars, form: str, grouped: bool = True) -> None:
    """Bars of every (group, series) that has a value, with its number above (below a bar that hangs down).

    Not `grouped`: every group has one bar, which stands in the middle and is named below it.
    """
    width = 0.84 / len(series) if grouped else 0.7
    for number, name in enumerate(series):
        for place, group in enumerate(groups):
            if (group, name) not in values:
                continue
            value, low, high = values[group, name]
            x = place + ((number - (len(series) - 1) / 2) * width if grouped else 0)
            axes.bar(x, value, width * 0.92, color=colors[name], label=name, zorder=2)
            end = value
            if low is not None and high is not None:
                axes.vlines(x, low, high, color=INK, linewidth=1.1, zorder=3)
                end = min(value, low) if value < 0 else max(value, high)
            below = value < 0
            axes.annotate(form.format(value).replace("-", "−"), (x, end), xytext=(0, -2 if below else 2),
                          textcoords="offset points", ha="center", va="top" if below else "bottom", fontsize=7.5,
                          color=INK)
    axes.set_xticks(range(len(groups)), [visible(group) for group in groups])
    axes.tick_params(axis="x", length=0)
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.12)
    if not grouped:
        return
    handles, labels = axes.get_legend_handles_labels()
    known = list(dict(zip(labels, handles, strict=True)).items())
    columns = min(MOST_IN_LEGEND, len(known))
    known = [item for column in range(columns) for item in known[column::columns]]  # it is filled column by column
    axes.legend([handle for _, handle in known], [visible(label) for label, _ in known], frameon=False, fontsize=8,
                ncols=columns, loc="lower left", bbox_to_anchor=(0, 1.0), borderaxespad=0.2, handlelength=1,
                columnspacing=1.2)


def _smooth(values: Sequence[float]) -> list[float]:
    """A centred moving average whose window shrinks at both ends."""
    import numpy as np

    half = int(len(values) * SMOOTHING / 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return ((sums[high] - sums[low]) / (high - low)).tolist()


def _canvas(*, width: float, height: float, panels: int, per_row: int | None = None,
            widths: Sequence[float] | None = None) -> tuple["Figure", list["Axes"]]:
    """A figure without any global state of the drawing library. `widths` are the columns', relative to each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, facecolor="white", layout="constrained")
    per_row = per_row or panels
    grid = figure.add_gridspec(-(-panels // per_row), per_row, width_ratios=widths)
    all_axes = [figure.add_subplot(grid[divmod(number, per_row)]) for number in range(panels)]
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
