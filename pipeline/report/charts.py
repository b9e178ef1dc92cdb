"""Charts of a report as inline SVG, drawn by matplotlib. Colours are CSS variables, so that one drawing serves light
and dark pages."""

from __future__ import annotations

import html
import io
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.report.facts import Classes, Setting, Shown, selecting
from pipeline.report.looks import Maps
from pipeline.store.errors import UserError
from pipeline.train.learned import Learned
from pipeline.train.metrics import is_share

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
except ImportError:
    raise UserError(
        "charts need matplotlib: pip install 'activation-pipeline[report]' (or pip install matplotlib)"
    ) from None

# What matplotlib is told, and what stands in the page instead: the page's style gives the values.
INK, FAINT, PAGE = "#010101", "#020202", "#030303"
SERIES = tuple(f"#0400{i:02d}" for i in range(1, 9))
_VARIABLES = {INK: "--ink", FAINT: "--faint", PAGE: "--page"} | {c: f"--s{i}" for i, c in enumerate(SERIES, start=1)}
_STYLE: Any = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "axes.edgecolor": FAINT,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.facecolor": "none",
    "figure.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": FAINT, "grid.alpha": 0.25, "legend.frameon": False, "axes.axisbelow": True,
}  # fmt: skip
_NUMBERS = itertools.count()
_MOST = 24  # characters of a name in a chart
MOST_SERIES = len(SERIES)


def _new(width: float, height: float, across: int = 1, **more: Any) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, across, **more)


def _svg(figure: Figure, title: str) -> str:
    """The figure as an <svg> element whose ids are its own on the page."""
    number = next(_NUMBERS)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"chart {number}"}):
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="c{number}-\1"', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#c{number}-", svg)
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var({name})")
    about = f'role="img" aria-label="{html.escape(title)}" width="{96 * figure.get_figwidth():.0f}"'
    return re.sub(r'^<svg [^>]*viewBox="([^"]+)"[^>]*>', lambda m: f'<svg viewBox="{m[1]}" {about}>', svg, count=1)


def plain(text: str, most: int = _MOST) -> str:
    """`text` as it is to be seen: without the meaning that $ has to matplotlib, cut where it is long."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    shown = shown if len(shown) <= most else f"{shown[: most - 1]}…"
    return shown.replace("\\", "\\\\").replace("$", r"\$") if "$" in shown else shown


def curves(settings: Sequence[Setting]) -> str:
    """Training loss and validation score over epochs: a colour a setting, a faint line a seed, a strong one their
    mean."""
    settings = settings[:MOST_SERIES]
    with matplotlib.rc_context(_STYLE):
        figure, (left, right) = _new(9.8, 3.2, 2)
        percent = _percent([selecting(e["validation"]) for s in settings for run in s.runs for e in run.scores[:1]])
        for colour, setting in zip(SERIES, settings, strict=False):
            _strands(left, [_loss(run) for run in setting.runs], colour)
            _strands(right, [_scores(run, percent) for run in setting.runs], colour, marker="o")
        left.set(xlabel="epoch", ylabel="training loss")
        right.set(xlabel="epoch", ylabel="validation score" + (" × 100" if percent else ""))
        for axis in (left, right):
            axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return _svg(figure, "training loss and validation score over epochs")


Line = tuple[list[float], list[float]]


def _strands(axis: Any, lines: Sequence[Line], colour: str, **more: Any) -> None:
    lines = [line for line in lines if line[0]]
    alone = len(lines) == 1
    for x, y in lines:
        axis.plot(x, y, color=colour, linewidth=1.6 if alone else 0.9, alpha=1 if alone else 0.35,
                  **(more if alone else {}), markersize=3.5)  # fmt: skip
    places = lines[0][0] if lines else []
    if not alone and lines and all(x == places for x, _ in lines):
        means = [float(np.mean([y[i] for _, y in lines])) for i in range(len(places))]
        axis.plot(places, means, color=colour, linewidth=2, markersize=3.5, **more)


def _scores(run: Shown, percent: bool) -> Line:
    known = [(e["epoch"], e["validation"].get(selecting(e["validation"]))) for e in run.scores]
    known = [(x, y) for x, y in known if y is not None]
    return [x for x, _ in known], [(100 if percent else 1) * y for _, y in known]


def _loss(run: Shown) -> Line:
    """The loss over epochs, averaged to at most some 30 points."""
    values = [math.nan if e["loss"] is None else float(e["loss"]) for e in run.steps]
    last = max((e["epoch"] for e in run.steps), default=1)
    share = max(1, len(values) // 30)
    parts = [values[i : i + share] for i in range(0, len(values), share)]
    places = [(min((i + 1) * share, len(values)) / max(1, len(values))) * last for i in range(len(parts))]
    return places, [float(np.mean(part)) for part in parts]


def _percent(figures: Sequence[str]) -> bool:
    """Whether the figures are shares, which are told in percent."""
    return all(is_share(name) for name in figures)


def costs(settings: Sequence[Setting], figure_name: str, what: str) -> str:
    """The score of each setting against its trainable parameters, seconds an epoch and memory, those that are known;
    bars are intervals over seeds."""
    axes_of: list[tuple[str, list[Any]]] = [
        ("trainable parameters", [s.parameters for s in settings]),
        ("seconds an epoch", [s.seconds for s in settings]),
        ("memory of a step, MB", [None if s.memory is None else s.memory / 1e6 for s in settings]),
    ]
    known = [(name, values) for name, values in axes_of if any(values)]
    scale = 100 if _percent([figure_name]) else 1
    with matplotlib.rc_context(_STYLE):
        figure, axes = _new(9.8 if len(known) > 1 else 5.0, 3.2, len(known), sharey=True, squeeze=False)
        for axis, (name, values) in zip(axes[0], known, strict=True):
            for place, (setting, x) in enumerate(zip(settings, values, strict=True)):
                y, spread = setting.means.get(figure_name), setting.spreads.get(figure_name)
                if x and y is not None:
                    axis.errorbar(x, scale * y, yerr=None if spread is None else scale * spread, fmt="o", markersize=6,
                                  elinewidth=1.2, color=SERIES[place % MOST_SERIES])  # fmt: skip
            axis.set(xlabel=name, xscale="log")
            _log_ticks(axis, [x for x in values if x])
        _near_the_means(axes[0][0], [scale * s.means[figure_name] for s in settings if figure_name in s.means])
        axes[0][0].set_ylabel(plain(what, 60) + (" × 100" if scale > 1 else ""))
        return _svg(figure, f"{what} against cost")


def _near_the_means(axis: Any, means: Sequence[float]) -> None:
    """No more of long bars than tells the means apart: with two seeds an interval can be a hundred points."""
    low, high = axis.get_ylim()
    room = 1.2 * (max(means, default=0.0) - min(means, default=0.0))
    if means and room:
        axis.set_ylim(max(low, min(means) - room), min(high, max(means) + room))


def _log_ticks(axis: Any, values: Sequence[float]) -> None:
    """A few round numbers along a logarithmic axis, with some room at both ends."""
    low, high = min(values, default=1) / 1.3, max(values, default=1) * 1.3
    decades = math.log10(high / low)
    steps = (1.0, 2.0, 5.0) if decades < 1.3 else (1.0, 3.0) if decades < 2.3 else (1.0,)
    axis.set_xlim(low, high)
    axis.xaxis.set_major_locator(LogLocator(subs=steps, numticks=8))
    axis.xaxis.set_major_formatter(FuncFormatter(_tick))
    axis.xaxis.set_minor_locator(NullLocator())


def _tick(value: float, _: Any) -> str:
    """ "20k", "1.5M": a number as a label with little room."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def confusion(classes: Classes) -> str:
    """Samples by true and predicted class; shades are shares of the true class."""
    count = len(classes.names)
    shares = classes.matrix / np.maximum(1, classes.matrix.sum(1, keepdims=True))
    size = min(9.0, 2.2 + 0.55 * count)
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure, axis = _new(size, size * 0.85)
        for row, column in itertools.product(range(count), range(count)):
            share = float(shares[row, column])
            axis.add_patch(_cell(column, row, share))
            if count <= 20:
                axis.text(column, row, f"{int(classes.matrix[row, column])}", ha="center", va="center",
                          color=PAGE if share > 0.6 else INK, fontsize=9)  # fmt: skip
        axis.set(xlim=(-0.5, count - 0.5), ylim=(count - 0.5, -0.5), xlabel="predicted", ylabel="true")
        names = [plain(name, 16) for name in classes.names]
        turned = max(map(len, names)) > 8 or count > 4
        axis.set_xticks(range(count), names, rotation=30 if turned else 0, ha="right" if turned else "center")
        axis.set_yticks(range(count), names)
        return _svg(figure, "confusion matrix")


def _cell(x: float, y: float, share: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=SERIES[0], alpha=round(share, 3), linewidth=0)


def maps(found: Maps) -> str:
    """Samples as t-SNE lays them out before and after, coloured by class."""
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure, axes = _new(7.6, 3.4, 2)
        for axis, points, title in zip(axes, (found.before, found.after), ("before", "after"), strict=True):
            for number in range(len(found.names)):
                own = points[found.classes == number]
                colour = SERIES[number] if number < MOST_SERIES else FAINT
                axis.scatter(own[:, 0], own[:, 1], s=9, color=colour, alpha=0.75, linewidths=0)
            axis.set_title(title, fontsize=10)
            axis.set(xticks=[], yticks=[])
            for side in axis.spines.values():
                side.set_visible(True)
                side.set_alpha(0.4)
        return _svg(figure, "features before and after, by t-SNE")


def scatter(pairs: Sequence[tuple[float, float]]) -> str:
    """Predicted against true numbers."""
    with matplotlib.rc_context(_STYLE):
        figure, axis = _new(4.6, 4.0)
        truth, guess = zip(*pairs, strict=True)
        axis.scatter(truth, guess, s=8, color=SERIES[0], alpha=0.5, linewidths=0)
        ends = [min(truth), max(truth)]
        axis.plot(ends, ends, color=FAINT, linewidth=1)
        axis.set(xlabel="true", ylabel="predicted")
        return _svg(figure, "predicted against true numbers")


def learned(what: Learned) -> str:
    """Numbers as bars, one of each with each as a map."""
    values = np.asarray(what.values.tolist())
    names = [plain(name) for name in what.names]
    with matplotlib.rc_context({**_STYLE, "axes.grid": values.ndim == 1}):
        if values.ndim == 1:
            figure, axis = _new(5.2, 0.8 + 0.24 * len(names))
            axis.barh(range(len(names)), values, color=SERIES[0], height=0.7)
            axis.set_yticks(range(len(names)), names)
            axis.invert_yaxis()
            axis.grid(visible=False, axis="y")
        else:
            size = min(8.0, 2.4 + 0.3 * len(names))
            figure, axis = _new(size, size * 0.85)
            top = float(values.max()) or 1.0
            for row, column in itertools.product(range(len(names)), range(len(names))):
                axis.add_patch(_cell(column, row, max(0.0, float(values[row, column]) / top)))
            axis.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5))
            axis.set_xticks(range(len(names)), names, rotation=90)
            axis.set_yticks(range(len(names)), names)
            for side in axis.spines.values():
                side.set_visible(False)
        return _svg(figure, what.title)
