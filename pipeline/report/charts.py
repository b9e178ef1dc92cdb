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
from pipeline.store.errors import UserError
from pipeline.train.learned import Learned

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
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
    """Training loss and validation score over epochs: a colour a setting, a line a seed."""
    settings = settings[:MOST_SERIES]
    with matplotlib.rc_context(_STYLE):
        figure, (left, right) = _new(9.5, 3.4, 2)
        for colour, setting in zip(SERIES, settings, strict=False):
            for place, run in enumerate(setting.runs):
                name = plain(setting.label) if place == 0 else None
                epochs, losses = _loss(run)
                left.plot(epochs, losses, color=colour, linewidth=1.2, alpha=0.85, label=name)
                known = [(e["epoch"], e["validation"].get(selecting(e["validation"]))) for e in run.scores]
                known = [(x, y) for x, y in known if y is not None]
                if known:
                    right.plot(*zip(*known, strict=True), color=colour, linewidth=1.2, alpha=0.85, marker="o",
                               markersize=2.5, label=name)  # fmt: skip
        left.set(xlabel="epoch", ylabel="training loss")
        right.set(xlabel="epoch", ylabel="validation score")
        if len(settings) > 1:
            figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(settings)))
        return _svg(figure, "training loss and validation score over epochs")


def _loss(run: Shown) -> tuple[list[float], list[float]]:
    """The loss over epochs, averaged to at most some 120 points."""
    values = [math.nan if e["loss"] is None else float(e["loss"]) for e in run.steps]
    last = max((e["epoch"] for e in run.steps), default=1)
    share = max(1, len(values) // 120)
    parts = [values[i : i + share] for i in range(0, len(values), share)]
    places = [(min((i + 1) * share, len(values)) / max(1, len(values))) * last for i in range(len(parts))]
    return places, [float(np.mean(part)) for part in parts]


def costs(settings: Sequence[Setting], figure_name: str, what: str) -> str:
    """The score of each setting against its trainable parameters, seconds an epoch and memory, those that are known;
    bars are intervals over seeds."""
    axes_of: list[tuple[str, list[Any]]] = [
        ("trainable parameters", [s.parameters for s in settings]),
        ("seconds an epoch", [s.seconds for s in settings]),
        ("memory of a step, MB", [None if s.memory is None else s.memory / 1e6 for s in settings]),
    ]
    known = [(name, values) for name, values in axes_of if any(values)]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _new(3.2 * len(known) + 0.6, 3.6, len(known), sharey=True, squeeze=False)
        for axis, (name, values) in zip(axes[0], known, strict=True):
            for place, (setting, x) in enumerate(zip(settings, values, strict=True)):
                y = setting.means.get(figure_name)
                if x and y is not None:
                    axis.errorbar(x, y, yerr=setting.spreads.get(figure_name), fmt="o", markersize=5, capsize=2,
                                  color=SERIES[place % MOST_SERIES], label=plain(setting.label))  # fmt: skip
            axis.set(xlabel=name, xscale="log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=5))
            axis.xaxis.set_major_formatter(FuncFormatter(_tick))
            axis.xaxis.set_minor_formatter(NullFormatter())
        axes[0][0].set_ylabel(plain(what, 60))
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
        return _svg(figure, f"{what} against cost")


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
        axis.set_xticks(range(count), names, rotation=45 if count > 4 else 0, ha="right" if count > 4 else "center")
        axis.set_yticks(range(count), names)
        return _svg(figure, "confusion matrix")


def _cell(x: float, y: float, share: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=SERIES[0], alpha=round(share, 3), linewidth=0)


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
