"""`pipeline report`: runs, sweeps and tables as one HTML file that needs nothing beside it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from pipeline.report.facts import (
    Details,
    Setting,
    Shown,
    details,
    read_runs,
    read_table,
    recipe_lines,
    run_folders,
    selecting,
    settings_of,
    sweep_rows,
)
from pipeline.store.errors import UserError
from pipeline.terminal import counted, size_text
from pipeline.train.fit.log import write_bytes
from pipeline.train.metrics import is_share, smaller_is_better

Say = Callable[[str], None]
LOOKED_INTO = 4  # runs that a report shows predictions of


def run_report(given: Sequence[str], output: Path, say: Say, **elsewhere: Any) -> tuple[dict[str, Any], str]:
    """Write the report of what is `given`: run folders, sweeps, folders of runs, tables of `compare`. `elsewhere`: see
    `load_run`. UserError for what is none of these, and where the file cannot be written."""
    from pipeline.report import charts

    if output.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"-o {output}: a report is an .html file")
    if not output.parent.is_dir():
        raise UserError(f"-o {output}: no such folder: {output.parent}")
    found = _found(given)
    runs = read_runs(found.folders, found.rows)
    tasks = {str(run.recipe.get("task")) for run in runs}
    if len(tasks) > 1:
        raise UserError(f"the runs are of several tasks ({', '.join(sorted(tasks))}): a report is of one")
    settings = _ranked(settings_of(runs))
    chosen = _chosen(settings)
    looked = []
    for run in chosen:
        say(f"looking into {run.folder}")
        looked.append(_looked(details(run, **elsewhere), charts))
    parts = [_table(settings, "Scores", charts)] if settings else []
    alone = not settings and len(found.tables) == 1
    parts += [_table(_ranked(rows), "Scores" if alone else f"Table: {name}", charts) for name, rows in found.tables]
    page = _page(
        title=f"{Path(next(iter(tasks))).name}: report" if tasks else f"{found.tables[0][0]}: methods side by side",
        made=time.strftime("%Y-%m-%d %H:%M"),
        facts=_facts(runs),
        tables=parts,
        curves=charts.curves(settings) if runs else "",
        left_out=max(0, len(settings) - charts.MOST_SERIES),
        runs=looked,
    )
    try:
        write_bytes(output, page.encode())
    except OSError as error:
        raise UserError(f"-o {output}: cannot be written: {error.strerror or error}") from None
    result = {"output": str(output), "runs": [str(f) for f in found.folders], "bytes": len(page.encode())}
    return result, f"{output}: {counted(len(runs), 'run')}, {size_text(len(page.encode()))}; open it in a browser"


@dataclass
class Given:
    """Run `folders`, `tables` of compare with their names, and of sweeps each run's `rows` of the table."""

    folders: list[Path] = field(default_factory=list)
    tables: list[tuple[str, list[Setting]]] = field(default_factory=list)
    rows: dict[Path, dict[str, Any]] = field(default_factory=dict)


def _found(given: Sequence[str]) -> Given:
    out = Given()
    for name in given:
        path = Path(name)
        if path.is_file():
            out.tables.append((path.name, read_table(path)))
            continue
        found = run_folders(path)
        if not found:
            what = "no such file or folder" if not path.exists() else "there is no finished run in it"
            raise UserError(f"{name}: {what}; give run folders, a sweep's folder, or a table of `pipeline compare`")
        out.rows |= sweep_rows(path)
        out.folders += [folder for folder in found if folder not in out.folders]
    return out


def _chosen(settings: Sequence[Setting]) -> list[Shown]:
    """Of each of the best settings by dev its best run."""

    def value(run: Shown) -> float:
        return -math.inf if math.isnan(run.dev) else run.dev

    best = [max(setting.runs, key=value) for setting in settings]
    return sorted(best, key=value, reverse=True)[:LOOKED_INTO]


def _facts(runs: Sequence[Shown]) -> list[tuple[str, str]]:
    if not runs:
        return []
    first = runs[0].recipe
    facts = [("task", first.get("task")), ("backbone", first.get("model")), ("store", first.get("store"))]
    return [(k, _near(str(v))) for k, v in facts if v]


def _near(path: str) -> str:
    """A path below the working directory as it is called from there; anything else as it is."""
    here = Path(path)
    return str(here.relative_to(Path.cwd())) if here.is_absolute() and here.is_relative_to(Path.cwd()) else path


def _number(name: str, value: float | None, spread: float | None = None) -> str:
    if value is None:
        return ""
    share = is_share(name)
    shown = f"{100 * value:.1f}" if share else f"{value:.4g}"
    more = "" if spread is None else f" ± {100 * spread:.1f}" if share else f" ± {spread:.2g}"
    return shown + more


def _judged(settings: Sequence[Setting]) -> str:
    """The figure that settings are compared by: of the test split, else of validation, or a table's own."""
    figures = list(dict.fromkeys(name for s in settings for name in s.means))
    for split in ("test", "validation"):
        if name := selecting([f.partition(" ")[2] for f in figures if f.startswith(f"{split} ")]):
            return f"{split} {name}"
    return figures[0] if figures else ""  # of a table, which has no splits


def _ranked(settings: Sequence[Setting]) -> list[Setting]:
    """The best first."""
    judged = _judged(settings)
    sign = -1 if smaller_is_better(judged) else 1
    return sorted(settings, key=lambda s: sign * s.means[judged] if judged in s.means else -math.inf, reverse=True)


def _table(settings: Sequence[Setting], title: str, charts: Any) -> dict[str, Any]:
    """A table's head, cells and chart."""
    figures = list(dict.fromkeys(name for s in settings for name in s.means))
    shown = [f for f in figures if not f.endswith("average") or not any(
        g != f and g.split()[0] == f.split()[0] for g in figures)]  # fmt: skip
    memory = any(s.memory for s in settings)
    head = ["setting", "seeds", *shown, "trainable", "s / epoch", *(["memory of a step"] if memory else [])]
    rows = [
        [
            s.label, str(s.seeds), *(_number(f, s.means.get(f), s.spreads.get(f)) for f in shown),
            f"{s.parameters:,}" if s.parameters is not None else "",
            f"{s.seconds:.2f}" if s.seconds is not None else "",
            *([f"{s.memory / 1e6:,.1f} MB" if s.memory else ""] if memory else []),
        ]
        for s in settings
    ]  # fmt: skip
    several = any(s.seeds > 1 for s in settings)
    interval = "± is half of the 95 % interval of the mean over seeds (Student's t); a chart cuts long ones."
    note = interval if several else "One seed each."
    judged = _judged(settings)
    alone = [f for f in shown if f.split()[:1] == judged.split()[:1]]
    chart = (
        charts.costs(settings, judged, alone[0] if len(alone) == 1 else judged) if len(settings) > 1 and judged else ""
    )
    return {"title": title, "head": head, "rows": rows, "note": note, "chart": chart, "colours": charts.MOST_SERIES,
            "abouts": [(s.label, s.about) for s in settings if s.about]}  # fmt: skip


def _looked(found: Details, charts: Any) -> dict[str, Any]:
    """A run's section."""
    classes = found.classes
    rows = [] if classes is None else classes.rows
    return {
        "title": f"{found.shown.label}, seed {found.shown.seed}",
        "folder": str(found.shown.folder),
        "missing": found.missing,
        "split": found.split,
        "confusion": charts.confusion(classes) if classes is not None and len(classes.names) <= 40 else "",
        "classes": [(n, f"{100 * p:.1f}", f"{100 * r:.1f}", f"{100 * f:.1f}", str(c)) for n, p, r, f, c in rows],
        "scatter": charts.scatter(found.pairs) if found.pairs else "",
        "mistakes": found.mistakes,
        "wrong": found.wrong,
        "samples": found.samples,
        "learned": [{"title": w.title, "about": w.about, "chart": charts.learned(w)} for w in found.learned],
        "maps": charts.maps(found.maps) if found.maps else "",
        "maps_about": found.maps.about if found.maps else "",
        "maps_key": list(enumerate(found.maps.names[: charts.MOST_SERIES], start=1)) if found.maps else [],
        "others": found.others,
        "costs": found.costs,
        "store": found.store,
        "options": recipe_lines(found.shown),
    }


def _page(**content: Any) -> str:
    """The template filled in; what comes from users and data is escaped."""
    try:
        from jinja2 import Environment
    except ImportError:
        raise UserError("a report needs jinja2: pip install 'activation-pipeline[report]'") from None

    text = resources.files("pipeline.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    page: str = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text).render(content)
    return page
