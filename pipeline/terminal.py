"""What the command line prints: plain tables, and the same facts for `--json`."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.catalog import families
from pipeline.extract.short_names import SHORT_NAMES
from pipeline.store.errors import UserError


def pairs_text(pairs: Sequence[tuple[str, str]]) -> str:
    """Two columns."""
    wide = max(len(a) for a, _ in pairs)
    return "\n".join(f"{a:<{wide}}  {b}" for a, b in pairs)


def table_text(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, first column to the left, the others to the right."""
    widths = [max(len(str(r[i])) for r in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first = f"{cells[0]:<{widths[0]}}"
        return "  ".join([first, *(f"{c:>{w}}" for c, w in zip(cells[1:], widths[1:], strict=True))]).rstrip()

    return "\n".join([line(head), line(["-" * w for w in widths]), *(line(r) for r in rows)])


def size_text(n: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError


def counted(n: int, what: str) -> str:
    """ "1 block", "2,000 blocks"."""
    return f"{n:,} {what}{'s' * (n != 1)}"


def inputs_text(identity: Mapping[str, Any]) -> str:
    """ "texts up to 128 tokens", "images of 224x224": what a feature space's backbone was shown."""
    if size := identity.get("image_size"):
        kind, *sides = size.split(":")
        shorter = " images with a shorter side of " + " and a longer of at most ".join(sides)
        return {"own": "images of their own size", "short": shorter.strip()}.get(kind, f"images of {size}")
    windows = f", longer ones in windows {identity['stride']} tokens apart" if "stride" in identity else ""
    return f"texts up to {identity['max_length']} tokens{windows}" if identity.get("max_length") else ""


def _metrics(metrics: dict[str, Any] | None) -> str:
    if not metrics:
        return "none"
    shown = {k: "undefined" if v is None or math.isnan(v) else f"{v:.4f}" for k, v in metrics.items()}
    return "  ".join(f"{k} {v}" for k, v in shown.items() if k != "average" or len(shown) != 2)


def layout_text(layout: dict[str, Any]) -> str:
    """The blocks that an order of samples followed, named by their digest."""
    return f"{layout['xxh3'][:12]} ({counted(layout['blocks'], 'block')})"


def metrics_text(result: dict[str, Any]) -> str:
    """The end of a training."""
    return "\n".join(
        [
            f"best epoch {result['best_epoch']}, validation: {_metrics(result['validation'])}",
            f"test: {_metrics(result['test'])}",
            f"{result['trainable_parameters']:,} trainable parameters, {result['seconds_per_epoch']:.1f} s an epoch "
            f"({100 * result['wait_share']:.0f} % of it waiting for data)",
            f"layout of the samples: {layout_text(result['layout'])}",
            f"run: {result['run']}",
            *(f"next: {command}" for command in result.get("next", ())),
        ]
    )


BEST = 3  # objects of an image that a table names; all are in --json, --output and the files of --out-dir
SHOWN = 20  # classes whose confusion matrix is shown whole; of more, so many of the most frequent confusions


def detail_text(report: Mapping[str, Any]) -> str:
    """A report of `evaluate --report`: its table, and what is taken for what."""
    parts = [entries_text(report["rows"])]
    confusion, labels = report.get("confusion"), report.get("labels", ())
    if isinstance(confusion, dict):  # of each label by itself
        head = ("label", "told, there", "told, not there", "not told, there", "neither")
        rows = [(k, str(b[1][1]), str(b[0][1]), str(b[1][0]), str(b[0][0])) for k, b in confusion.items()]
        parts.append(table_text(head, rows))
    elif confusion and len(labels) <= SHOWN:
        counts = [[label, *map(str, row)] for label, row in zip(labels, confusion, strict=True)]
        parts.append(table_text(("is \\ told", *labels), counts))
    elif confusion:
        cells = [(n, i, j) for i, row in enumerate(confusion) for j, n in enumerate(row) if n and i != j]
        most = sorted(cells, key=lambda cell: (-cell[0], cell[1:]))[:SHOWN]
        parts.append(table_text(("is", "told", "rows"), [(labels[i], labels[j], str(n)) for n, i, j in most]))
    return "\n\n".join(parts)


def scores_text(result: dict[str, Any]) -> str:
    """Scores of one split, and its report where there is one."""
    plain = {k: v for k, v in result.items() if isinstance(v, float)}
    lines = [f"{result['split']}: {_metrics(plain)}"]
    generated = dict(result.get("generated", {}))
    if "bleu" in generated:
        overlap = "/".join(f"{100 * generated[name]:.1f}" for name in ("rouge1", "rouge2", "rougeL"))
        lines.append(
            f"{result['split']}, {generated['rows']:,} texts written: exact match {generated['exact_match']:.1%}, "
            f"ROUGE-1/2/L {overlap}, BLEU {generated['bleu']:.1f}; {generated['cut']:,} cut at --max-new-tokens"
        )
    elif generated:
        share = generated.pop("in_targets")
        lines.append(
            f"{result['split']}, free generation, exact match: {_metrics(generated)} ({share:.1%} answers are targets)"
        )
    if "report" in result:
        lines += ["", detail_text(result["report"])]
    return "\n".join(lines)


def models_what() -> dict[str, Any]:
    """Families and short names."""
    return {"families": {name: what for name, (what, _) in families().items()}, "names": SHORT_NAMES}


def models_text() -> str:
    """The same as text."""
    types = {name: f" (model types: {', '.join(types)})" * bool(types) for name, (_, types) in families().items()}
    kinds = [(name, what + types[name]) for name, (what, _) in families().items()]
    return (
        "families\n" + pairs_text(kinds) + "\n\nshort names\n" + pairs_text(list(SHORT_NAMES.items()))
        + "\n\nAny checkpoint folder or hub id of these families will do: --model FOLDER or --model OWNER/NAME"
    )  # fmt: skip


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if value is None:
        return "–"
    if isinstance(value, Mapping):  # of classes, say, the share of each
        return ", ".join(f"{name} {_cell(of)}" for name, of in value.items())
    if isinstance(value, list) and value and all(isinstance(one, Mapping) and "score" in one for one in value):
        best = ", ".join(f"{one['label']} {_cell(one['score'])}" for one in value[:BEST])
        return f"{len(value)}: {best}{', …' if len(value) > BEST else ''}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def entries_text(entries: Sequence[Mapping[str, Any]]) -> str:
    """Predictions as a table, a row a sample."""
    if not entries:
        return "no rows"
    head = list(entries[0])
    return table_text(head, [[_cell(entry[name]) for name in head] for entry in entries])


def write_entries(path: Path, entries: Sequence[Mapping[str, Any]]) -> None:
    """Predictions as JSON lines (.jsonl) or CSV, the file replaced at once. Raises UserError when it cannot be."""
    text = io.StringIO()
    if path.suffix == ".jsonl":
        text.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    else:
        writer = csv.DictWriter(text, list(entries[0]) if entries else [], lineterminator="\n")
        writer.writeheader()
        for entry in entries:
            plain = (str, int, float)
            writer.writerow(
                {k: v if isinstance(v, plain) else json.dumps(v, ensure_ascii=False) for k, v in entry.items()}
            )
    from pipeline.train.fit.log import write_bytes  # late: lists wait for no torch

    try:
        write_bytes(path, text.getvalue().encode())
    except OSError as error:
        raise UserError(f"--output {path}: cannot be written: {error.strerror or error}") from None
