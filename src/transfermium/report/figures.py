"""Figures as for print: one style, colours that colour-blind readers can tell apart, no state of pyplot."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from ..evaluate import PRINTED

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6A4C93", "#E69F00", "#56B4E9", "#4D4D4D")  # after Okabe, Ito
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "h")
INK, SOFT = "#1c2128", "#59636e"
MOST_ROWS = 120  # of a curve; more are averaged in groups
DPI = 220  # of what is drawn as pixels
MOST_VECTORS = 400  # points drawn as shapes; more are drawn as pixels

RC = {
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "transfermium",
    "text.color": INK,
    "text.parse_math": False,  # a label may contain a dollar
    "xtick.color": SOFT,
    "xtick.labelcolor": INK,
    "xtick.major.width": 0.7,
    "ytick.color": SOFT,
    "ytick.labelcolor": INK,
    "ytick.major.width": 0.7,
}

Point = tuple[float, float, float, float, Sequence[float]]  # labels, mean, low, high, one value per seed


@contextmanager
def styled() -> Iterator[None]:
    """Our style and no other, whatever the user's matplotlibrc says."""
    with matplotlib.style.context(["default", RC]):
        yield


@styled()
def loss_curves(metrics_rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Weighted training terms and the validation loss against the step, on a logarithmic axis.

    Long runs are averaged in groups of steps; a band holds the middle 80 % of each group.
    """
    fig, axes = _figure(5.9, 2.8)
    ends = []
    for number, (name, (steps, losses)) in enumerate(_terms(metrics_rows).items()):
        colour = COLOURS[number % len(COLOURS)]
        groups = np.array_split(np.arange(len(steps)), min(len(steps), MOST_ROWS))
        x = np.array([steps[g].mean() for g in groups])
        y = np.array([losses[g].mean() for g in groups])
        axes.plot(x, y, color=colour, linewidth=1.1)
        if len(steps) > MOST_ROWS:
            low, high = (np.array([np.quantile(losses[g], q) for g in groups]) for q in (0.1, 0.9))
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        ends.append((name, x[-1], y[-1], colour))

    checked = [(row["step"], row["valid"]) for row in metrics_rows if _positive(row.get("valid"))]
    if checked:
        x, y = np.array(checked, float).T
        axes.plot(x, y, color=INK, marker="o", markersize=3.2, zorder=3)
        best = int(y.argmin())
        axes.plot(x[best], y[best], "o", color="white", mec=INK, mew=1.3, markersize=7, zorder=4)
        ends.append(("validation", x[-1], y[-1], INK))
    axes.set(xlabel="optimiser step", ylabel="loss", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    _plain_log_ticks(axes.yaxis)
    _label_ends(axes, ends)
    return fig


@styled()
def parity(points: Mapping[str, Any], title: str, errors: Mapping[str, Any] | None = None) -> Figure:
    """Predictions against labels, on equal axes, with MAE, RMSE and R²; in the units that tables print.

    Args:
        points: "label", "prediction" (of equal length) and "unit", as in validation.json.
        errors: "mae", "rmse" and perhaps "r2" of the whole set, where the points are only some of it.
    """
    unit, factor = PRINTED.get(points["unit"], (points["unit"], 1.0))
    label, prediction = (np.asarray(points[name], float) * factor for name in ("label", "prediction"))
    known = np.isfinite(label) & np.isfinite(prediction)
    label, prediction = label[known], prediction[known]
    fig, axes = _figure(3.0, 3.05)
    axes.set_aspect("equal")
    axes.set_title(title)
    axes.set(xlabel=_with_unit("label", unit), ylabel=_with_unit("prediction", unit))
    if len(label) == 0:
        return fig

    both = np.concatenate([label, prediction])
    low, high = both.min(), both.max()
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    limits = (low - margin, high + margin)
    axes.plot(limits, limits, color=SOFT, linewidth=0.8, dashes=(4, 3), zorder=1)
    colours = [(COLOURS[0], opacity) for opacity in _opacity(label, prediction, limits)]
    axes.scatter(label, prediction, s=11, c=colours, linewidths=0, zorder=2, rasterized=len(label) > MOST_VECTORS)
    axes.set(xlim=limits, ylim=limits)
    wide = len(_number(low)) > 6  # long tick labels would run into each other
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(2 if wide else 4))
        axis.set_major_formatter(FuncFormatter(_number))

    measures = _scores(label, prediction) if errors is None else {k: errors[k] * factor for k in ("mae", "rmse")}
    r2 = measures.get("r2") if errors is None else errors.get("r2")
    lines = [f"{name.upper()} {measures[name]:.4g} {unit}".rstrip() for name in ("mae", "rmse")]
    lines += [f"R² {r2:.3f}"] if r2 is not None else []
    above = _crowd(label, prediction, limits) <= _crowd(prediction, label, limits)
    box = {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.5}
    axes.text(
        0.03 if above else 0.97, 0.98 if above else 0.03, "\n".join(lines), transform=axes.transAxes, fontsize=8,
        ha="left" if above else "right", va="top" if above else "bottom", linespacing=1.35, bbox=box,
    )  # fmt: skip
    return fig


@styled()
def label_curves(series: Mapping[str, Sequence[Point]], x_label: str, y_label: str) -> Figure:
    """Error against the number of labels: a point per seed, the mean as a line, low to high as a band.

    The horizontal axis is logarithmic; zero labels, where there are any, stand one halving left of the fewest. The
    vertical axis is logarithmic where errors differ by more than a factor of four, else it starts at zero.

    Args:
        series: arm to its points; low and high may be NaN or None where there is no interval.
    """
    fig, axes = _figure(5.9, 3.7)
    sizes = sorted({float(point[0]) for points in series.values() for point in points})
    fewest = min((n for n in sizes if n > 0), default=2.0)
    ends = []
    for number, (arm, points) in enumerate(series.items()):
        if not points:
            continue
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        points = sorted(points, key=lambda point: point[0])
        x = np.array([point[0] or fewest / 2 for point in points], float)
        mean, low, high = (np.array([_or_nan(point[i]) for point in points]) for i in (1, 2, 3))
        axes.fill_between(x, low, high, color=colour, alpha=0.14, linewidth=0)
        aside = 1.025 ** (number - (len(series) - 1) / 2)  # seeds of two arms do not hide each other
        for n, point in zip(x, points, strict=True):
            seeds = np.asarray(point[4], float)
            axes.plot(np.full(len(seeds), n * aside), seeds, marker, color=colour, alpha=0.45, markersize=3.4, mew=0)
        axes.plot(x, mean, color=colour, marker=marker, markersize=6, markeredgecolor="white", zorder=3)
        ends.append((arm, x[-1], mean[-1], colour))

    values = np.array([value for points in series.values() for p in points for value in (p[1], *p[4])], float)
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > 4 * values.min():
        axes.set_yscale("log")
        _plain_log_ticks(axes.yaxis)
    elif len(values) and values.min() >= 0:
        axes.set_ylim(0, 1.08 * values.max() or 1.0)
        axes.yaxis.set_major_formatter(FuncFormatter(_number))
    axes.set(xlabel=x_label, ylabel=y_label, xscale="log")
    axes.xaxis.set_major_locator(FixedLocator([n or fewest / 2 for n in sizes]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: "0" if n < fewest else f"{n:,.0f}"))
    if sizes:
        axes.set_xlim((fewest / 2 if sizes[0] == 0 else fewest) / 1.15, max(sizes[-1], fewest) * 1.15)
    axes.grid(axis="y", color="#e6e9ed", linewidth=0.6)
    axes.set_axisbelow(True)
    _label_ends(axes, ends)
    return fig


@styled()
def forest(panels: Mapping[str, Sequence[tuple[str, float, float, float]]]) -> Figure:
    """Ratios with their intervals, one line each, in panels side by side; one, where nothing is gained, is marked.

    Args:
        panels: title to rows of (name, ratio, low, high); all panels have the same names in the same order.
    """
    names = list(dict.fromkeys(row[0] for rows in panels.values() for row in rows))
    columns = min(len(panels), 3)
    lines = math.ceil(len(panels) / columns)
    fig = Figure(figsize=(1.6 + 2.1 * columns, lines * (0.65 + 0.26 * len(names))), layout="constrained", dpi=DPI)
    grid = fig.subplots(lines, columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for number, (title, rows) in enumerate(panels.items()):
        axes, ends = grid.flat[number], []
        axes.axvline(1.0, color=SOFT, linewidth=0.8, linestyle=(0, (4, 3)))
        for name, ratio, low, high in rows:
            y = -names.index(name)
            colour = COLOURS[2] if high < 1 else COLOURS[1] if low > 1 else COLOURS[7]
            axes.plot([low, high], [y, y], color=colour, linewidth=1.4, solid_capstyle="butt")
            axes.plot(ratio, y, "o", color=colour, markersize=5, markeredgecolor="white", zorder=3)
            ends += [(low, y, "<", colour), (high, y, ">", colour)]
        finite = [v for _, ratio, low, high in rows for v in (ratio, low, high) if math.isfinite(v) and v > 0]
        middle = [row[1] for row in rows]
        left = max(min([1.0, *finite]), 0.6 * min([1.0, *middle]))  # an interval of two seeds may span decades
        right = min(max([1.0, *finite]), 1.6 * max([1.0, *middle]))
        axes.set(xscale="log", title=title, xlim=(left / 1.04, right * 1.04), ylim=(0.6 - len(names), 0.6))
        for end, y, arrow, colour in ends:
            if not left <= end <= right:  # the interval goes on beyond the panel
                axes.plot(min(max(end, left / 1.02), right * 1.02), y, arrow, color=colour, markersize=4, clip_on=False)
        axes.set_yticks([-i for i in range(len(names))], names)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color="#e6e9ed", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(_number))
    return fig


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of one panel; inches."""
    fig = Figure(figsize=(width, height), layout="constrained", dpi=DPI)
    return fig, fig.add_subplot()


def _terms(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps and values of each training term."""
    names = dict.fromkeys(name for row in rows for name in row if name not in NOT_TERMS)
    pairs = {name: [(row["step"], row[name]) for row in rows if _positive(row.get(name))] for name in names}
    return {name: (np.array(p, float)[:, 0], np.array(p, float)[:, 1]) for name, p in pairs.items() if p}


NOT_TERMS = ("step", "epoch", "lr", "valid", "elapsed", "cpu", "edges at once", "went back")  # of a row of metrics


def _label_ends(axes: Axes, ends: Sequence[tuple[str, float, float, str]]) -> None:
    """Names at the right of the lines, moved apart where they would touch; limits are final afterwards."""
    ends = [end for end in ends if math.isfinite(end[2])]
    if not ends:
        return
    axes.set_xlim(axes.get_xlim())
    axes.set_ylim(axes.get_ylim())
    to_axes = axes.transData + axes.transAxes.inverted()
    texts = ["\n".join(textwrap.wrap(name, 24)) or name for name, *_ in ends]
    heights = [to_axes.transform((x, y))[1] for _, x, y, _ in ends]
    line = 12 / 72 * DPI / axes.get_window_extent().height  # of text, as a fraction of the axes
    room = [line * (text.count("\n") + 1) for text in texts]
    for end, text, height in zip(ends, texts, _apart(heights, room), strict=True):
        _, x, y, colour = end
        leader = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "linestyle": (0, (1, 1.5))}
        axes.annotate(
            text, (x, y), (1.025, height), textcoords="axes fraction", color=colour, va="center", fontweight="bold",
            fontsize=8, annotation_clip=False, arrowprops={**leader, "shrinkA": 1, "shrinkB": 4},
        )  # fmt: skip


def _apart(heights: Sequence[float], room: Sequence[float]) -> list[float]:
    """Heights changed as little as pushing neighbours apart needs, so that each has its room."""
    result = np.array(heights, float)
    order = np.argsort(result, kind="stable")
    for _ in range(200):
        for a, b in pairwise(order):
            overlap = (room[a] + room[b]) / 2 - (result[b] - result[a])
            if overlap > 1e-6:
                result[a] -= overlap / 2
                result[b] += overlap / 2
    return [float(height) for height in result]


def _crowd(x: np.ndarray, y: np.ndarray, limits: tuple[float, float]) -> int:
    """How many points lie in the upper left corner."""
    span = limits[1] - limits[0]
    return int(((x < limits[0] + 0.55 * span) & (y > limits[1] - 0.25 * span)).sum())


def _opacity(x: np.ndarray, y: np.ndarray, limits: tuple[float, float]) -> list[float]:
    """Lower where points crowd, so that dense regions keep their shape."""
    cells = [np.clip(((v - limits[0]) / (limits[1] - limits[0]) * 40).astype(int), 0, 39) for v in (x, y)]
    cell = cells[0] * 40 + cells[1]
    crowd = np.bincount(cell, minlength=1600)[cell]
    opacity: list[float] = np.clip(1.4 / np.sqrt(crowd), 0.12, 0.75).round(2).tolist()
    return opacity


def _scores(label: np.ndarray, prediction: np.ndarray) -> dict[str, float]:
    difference = prediction - label
    square, variance = float(np.square(difference).mean()), float(label.var())
    scores = {"mae": float(np.abs(difference).mean()), "rmse": math.sqrt(square)}
    return {**scores, "r2": 1 - square / variance} if variance > 0 else scores


def _plain_log_ticks(axis: Axis) -> None:
    """Numbers such as 0.02 and 500; also between powers of ten where the axis spans little."""
    low, high = axis.get_view_interval()
    decades = math.log10(high / low) if 0 < low < high else 0.0
    between = (1.0,) if decades > 2.5 else (1.0, 2.0, 5.0) if decades > 0.7 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    axis.set_major_locator(LogLocator(subs=between))
    axis.set_major_formatter(FuncFormatter(_number))
    axis.set_minor_formatter(NullFormatter())


def _number(value: float, _: Any = None) -> str:
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    return f"{value:,.6f}".rstrip("0").rstrip(".").replace("-", "−")


def _with_unit(name: str, unit: str) -> str:
    return f"{name} ({unit})" if unit else name


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def _or_nan(value: Any) -> float:
    return math.nan if value is None else float(value)
