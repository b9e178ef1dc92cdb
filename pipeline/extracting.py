"""`pipeline extract`: a task's rows through the frozen backbone once, into the store."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from pipeline.doubts import doubts
from pipeline.extract.backbones import Backbone, Inputs, TextOptions, stream_of
from pipeline.extract.backbones.capabilities import WritesText
from pipeline.extract.backbones.live import LiveBackbone
from pipeline.extract.checkpoint import CONFIG_NOISE, Checkpoint, resolve
from pipeline.extract.encoding import arrays_of
from pipeline.extract.identity import PRECISIONS, space_identity
from pipeline.extract.plugins import lasting
from pipeline.extract.projection import Projection
from pipeline.extract.run import Report, compute, provenance_of
from pipeline.extract.tasks.base import SPLITS, Rows, Task, TaskSpec
from pipeline.extract.tasks.images import contents
from pipeline.keepsakes import keep
from pipeline.projecting import project, widths_text
from pipeline.recipe import Recipe
from pipeline.resolve import device_of, need, open_task, refuse_full_readers, space_options, store_path, wanted_states
from pipeline.rows import refuse_other_kind, refuse_unknown_ids, token_doubts
from pipeline.store import Space, Store, TaskTable, bytes_per_value
from pipeline.store.errors import UserError
from pipeline.stored import kept_name, made_with, own_kept
from pipeline.unused import refuse_for_kind
from pipeline.versions import save_tables, task_id

Say = Callable[[str], None]


@dataclass
class Split:
    """One split ready for the backbone. `inputs` and `keys` are in the order of `rows`; `total` before any limit."""

    name: str
    rows: Rows
    inputs: Inputs
    keys: list[str]
    total: int


def prepare_split(
    backbone: Backbone,
    tokenizer: Any,
    spec: TaskSpec,
    name: str,
    rows: Rows,
    options: TextOptions,
    candidates: Sequence[Sequence[int]],
    total: int | None = None,
) -> Split:
    """Tokenise a split. Training rows of a text-to-text backbone get their own target's decoder positions, other rows
    those that scoring all targets needs. Raises UserError for rows that the backbone cannot read."""
    refuse_other_kind(backbone, rows.texts, options.root, f"the {name} rows of {spec.name}")
    options = replace(options, words=spec.target == "tags")
    if options.views > 1 and name == "train":
        rows = with_views(rows, options.views)
    inputs = prepared(backbone, tokenizer, spec, name, rows, options, candidates)
    refuse_unknown_ids(backbone, inputs, f"the {name} rows of {spec.name}")
    if inputs.skipped:
        rows = rows.take([i for i in range(len(rows)) if i not in inputs.skipped])
    return Split(name, rows, inputs, inputs.keys(), len(rows) if total is None else total)


def candidates_of(backbone: Backbone, tokenizer: Any, spec: TaskSpec) -> list[list[int]]:
    """Token ids of each target text; none where the backbone does not write text."""
    return backbone.candidates(tokenizer, spec.texts) if isinstance(backbone, WritesText) else []


def prepared(
    backbone: Backbone,
    tokenizer: Any,
    spec: TaskSpec,
    split: str,
    rows: Rows,
    options: TextOptions,
    candidates: Sequence[Sequence[int]],
) -> Inputs:
    """The rows of a split as inputs; those of a backbone that writes text as `prepare_split` says."""
    if not isinstance(backbone, WritesText):
        return backbone.prepare(tokenizer, rows.texts, options)
    gold = None
    if split == "train" and candidates:
        gold = [spec.target_index(label) for label in rows.labels if isinstance(label, int | float)]
    return backbone.prepare(tokenizer, rows.texts, options, candidates, gold)


def with_views(rows: Rows, views: int) -> Rows:
    """Each picture `views` times, with the number of the view as a second field: 0 is the plain picture."""
    several = rows.take([i for i in range(len(rows)) for _ in range(views)])
    several.texts = [(name, str(i % views)) for i, (name, *_) in enumerate(several.texts)]
    return several


def load_backbone(
    checkpoint: Checkpoint,
    precision: str,
    attention: str,
    device: torch.device,
    projection: Projection | None = None,
) -> LiveBackbone:
    """The checkpoint's backbone, loaded when first used; what it hands out is projected as the feature space's states
    are. One that writes text has a row for each token, no more."""
    backbone = checkpoint.backbone.projected(projection)

    def load() -> Any:
        model = backbone.load(checkpoint.folder, PRECISIONS[precision], attention, device)
        if isinstance(backbone, WritesText):
            backbone.keep_tokens(model, checkpoint.tokens)
        return model

    return LiveBackbone(backbone, load, device)


def run_extract(recipe: Recipe, say: Say, quiet: bool = False, task: Task | None = None) -> dict[str, Any]:
    """Extract what `recipe` asks for; `say` takes the lines a person reads. `task`: rows at hand, instead of those the
    recipe names. Returns what was done, for `--json`."""
    need(recipe, "model", "task")
    started = time.perf_counter()
    device = device_of(recipe)
    checkpoint = resolve(recipe.model)
    backbone, states = checkpoint.backbone, wanted_states(recipe, checkpoint.backbone)
    refuse_full_readers(recipe, recipe.tuners, backbone)
    refuse_for_kind(recipe, backbone)
    task = task or open_task(recipe)
    options = space_options(recipe, task.spec)
    task = with_contents(task, backbone, options.text)
    identity = space_identity(checkpoint, options)
    candidates = candidates_of(backbone, checkpoint.tokenizer, task.spec)
    splits = [
        _split(backbone, checkpoint, task, name, recipe.limit, options.text, candidates)
        for name in _splits(task, recipe)
    ]
    inputs = Inputs.concat([s.inputs for s in splits])
    keys = [k for s in splits for k in s.keys]
    live = load_backbone(checkpoint, options.precision, options.attention, device)
    where, digest = store_path(recipe), identity["weights"]
    if "://" not in where and not Path(where).exists():
        _ = live.model  # a checkpoint that cannot run leaves no trace
    store = Store.open(where, create=True)
    kept = _kept_mark(store, identity, checkpoint)
    if not store.has_weights(digest, *(kept_name(name, kept) for name in KEEPSAKES)):
        parts = _keepsakes(checkpoint, live, identity)
        store.save_weights(digest, {kept_name(name, kept): content for name, content in parts.items()})
    tokens = recipe.batch_tokens or (32768 if device.type == "cuda" else 4096)
    fit_on = next((s.inputs for s in splits if s.name == "train"), inputs)
    identity, live = project(store, identity, live, fit_on, recipe.seed, tokens, task.spec.name, say)
    backbone = live.backbone
    space = store.create_space(identity)
    tables = {s.name: _table(task, s, candidates, checkpoint, splits) for s in splits}
    odd = doubts(tables, backbone.modality == "image")
    _announce(say, space, splits, inputs, keys, states, backbone, options.format, task.spec, options.text.max_length)
    warnings = [*token_doubts(checkpoint.tokenizer, backbone, splits), *odd]
    for sentence in warnings:
        say(f"warning: {sentence}")
    keep(recipe, task.spec, store, identity, kept, live, splits, candidates, say)
    how: dict[str, Any] = {
        "tokens": tokens,
        "batch_size": recipe.batch_size,
        "seed": recipe.seed,
        "provenance": provenance_of(checkpoint.name, checkpoint.revision, identity, device, task.provenance),
        "quiet": quiet,
    }
    if recipe.scheduler:
        from pipeline.extract.distributed import compute_on

        each = estimated_bytes(inputs, states, backbone, options.format) / len(keys)
        model = os.path.abspath(recipe.model) if Path(recipe.model).is_dir() else recipe.model  # noqa: PTH100
        how["imports"] = lasting(recipe.imports)
        report = compute_on(recipe.scheduler, space, inputs, keys, states, model, recipe.device, each, **how)
    else:
        report = compute(space, inputs, keys, states, live, describe=_describer(splits), **how)
    save_tables(space, tables, states)
    report.seconds = time.perf_counter() - started
    done = _finish(say, store, space, task, splits, states, report)
    return {**done, "task id": task_id(next(iter(tables.values())).header), "warnings": warnings}


def _splits(task: Task, recipe: Recipe) -> list[str]:
    names = list(recipe.split) or [s for s in SPLITS if s in task.splits]
    if not names:
        raise UserError(f"task {task.spec.name} has no rows to extract: {'; '.join(task.absent.values())}")
    for name in names:
        task.rows(name)
    return names


def _split(
    backbone: Backbone,
    checkpoint: Checkpoint,
    task: Task,
    name: str,
    limit: int | None,
    options: TextOptions,
    candidates: Sequence[Sequence[int]],
) -> Split:
    rows = task.rows(name)
    if not len(rows):
        raise UserError(f"task {task.spec.name}: the {name} split is empty")
    head = rows.head(limit)
    return prepare_split(backbone, checkpoint.tokenizer, task.spec, name, head, options, candidates, len(rows))


def estimated_bytes(inputs: Inputs, states: Sequence[str], backbone: Backbone, fmt: str) -> float:
    """Bytes of `states` of `inputs` (methods §6.2): positions × width × bytes a value, summed over states."""
    values = sum(float(inputs.lengths[stream_of(n)].sum()) * backbone.state_width(n) for n in states)
    return values * bytes_per_value(fmt)


def _announce(
    say: Say,
    space: Space,
    splits: Sequence[Split],
    inputs: Inputs,
    keys: Sequence[str],
    states: Sequence[str],
    backbone: Backbone,
    fmt: str,
    spec: TaskSpec,
    longest: int,
) -> None:
    rows = ", ".join(
        f"{s.name} {len(s.rows):,}" + (f" of {s.total:,}" if len(s.rows) < s.total else "") for s in splits
    )
    stored = space.lookup(list(dict.fromkeys(keys)), states)
    todo = int((~stored.present).sum())
    size = estimated_bytes(inputs, states, backbone, fmt)
    say(f"rows: {rows}; {_labels_text(spec)}")
    if many := _too_many_classes(spec, splits):
        say(f"warning: {many}")
    say(
        f"space {space.id[:12]}: {widths_text(list(states), backbone.width, backbone.projection)} as {fmt}, "
        f"{size / len(keys) / 1e3:,.1f} kB a sample, {size / 1e9:.3f} GB in all"
    )
    say(
        f"to compute: {todo:,} of {len(set(keys)):,} distinct samples"
        + ("" if todo else ", everything is in the store already")
    )
    for split in splits:
        if bad := split.inputs.skipped:
            say(f"warning: {split.name}: {len(bad):,} pictures left out, first: {next(iter(bad.values()))}")
    if cut := int(inputs.truncated.sum()):
        limit = int(inputs.lengths[backbone.streams[0]][inputs.truncated].max())
        whose = "--max-length" if limit >= longest else "all that the model takes"
        say(f"warning: {cut:,} of {len(keys):,} texts are longer than {limit:,} tokens ({whose}) and were cut")


def _labels_text(spec: TaskSpec) -> str:
    """What the label is taken for: a column of numbers with one word among them would be hundreds of classes."""
    if spec.target == "none":
        return "no label: rows are for `stream` alone, not for training (--label COLUMN)"
    if spec.target == "number":
        return "label: a number"
    few = ", ".join(spec.labels[:4]) + (", …" if len(spec.labels) > 4 else "")
    what = {"class": "classes", "classes": "classes, any number of them a row", "tags": "tags, one a word"}[spec.target]
    return f"label: {len(spec.labels):,} {what} ({few})"


def _too_many_classes(spec: TaskSpec, splits: Sequence[Split]) -> str:
    """A warning where classes have hardly any rows, "" otherwise."""
    rows = max(s.total for s in splits)
    if spec.target != "class" or len(spec.labels) * 2 <= rows or len(spec.labels) < 20:
        return ""
    return (
        f"{len(spec.labels):,} classes for {rows:,} rows: is it the right column? --objective regression is for numbers"
    )


def _describer(splits: Sequence[Split]) -> Callable[[str], str]:
    def describe(key: str) -> str:
        for split in splits:
            if key in split.keys:
                row = split.keys.index(key)
                text = " | ".join(split.rows.texts[row])
                return f"{split.name} row {row} ({text[:60]!r}{'…' if len(text) > 60 else ''})"
        return f"sample {key}"

    return describe


KEEPSAKES = ("tail.safetensors", "config.json", "source.json")


def _keepsakes(checkpoint: Checkpoint, live: LiveBackbone, identity: dict[str, Any]) -> dict[str, Any]:
    """What training needs of a checkpoint: tail weights and configuration, and the names it goes by."""
    source = {"names": sorted({checkpoint.name}), "revision": checkpoint.revision, "family": checkpoint.backbone.name}
    return {
        "tail.safetensors": arrays_of(live.backbone.tail_weights(live.model)),
        "config.json": _config(checkpoint),
        "source.json": {**source, "made_with": made_with(identity)},
    }


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    return {**checkpoint.config.to_dict(), "model_type": checkpoint.config.model_type}


def _kept_mark(store: Store, identity: dict[str, Any], checkpoint: Checkpoint) -> str:
    """The mark that this extraction keeps its files under: none, unless the files without one are another space's. Of
    those of an earlier version, which do not say whose they are, the configuration is compared."""
    digest = identity["weights"]
    if not store.has_weights(digest, *KEEPSAKES):
        return ""
    there = store.load_json(digest, "source.json").get("made_with")
    if isinstance(there, dict):
        return "" if there == made_with(identity) else own_kept(identity)
    old, new = store.load_json(digest, "config.json"), json.loads(json.dumps(_config(checkpoint)))
    same = all(old[name] == new[name] for name in old.keys() & new.keys() - CONFIG_NOISE)
    return "" if same else own_kept(identity)


def task_tables(checkpoint: Checkpoint, task: Task, recipe: Recipe, options: TextOptions) -> dict[str, TaskTable]:
    """The task tables an extraction would store, without one."""
    backbone = checkpoint.backbone
    task = with_contents(task, backbone, options)
    candidates = candidates_of(backbone, checkpoint.tokenizer, task.spec)
    names = [s for s in SPLITS if s in task.splits]
    splits = [_split(backbone, checkpoint, task, name, recipe.limit, options, candidates) for name in names]
    return {s.name: _table(task, s, candidates, checkpoint, splits) for s in splits}


def with_contents(task: Task, backbone: Backbone, options: TextOptions) -> Task:
    """A task with pictures, what their files hold being part of its provenance: they may change under their names."""
    if backbone.modality != "image":
        return task
    held = contents(Path(options.root), (t[0] for rows in task.splits.values() for t in rows.texts))
    return replace(task, provenance={**task.provenance, "contents": held})


def _table(
    task: Task, split: Split, candidates: Sequence[Sequence[int]], checkpoint: Checkpoint, splits: Sequence[Split]
) -> TaskTable:
    header = {
        "task": task.spec.name,
        "split": split.name,
        "rows": len(split.rows),
        "total": split.total,
        "spec": task.spec.to_dict(),
        "version": task.version,
        "candidates": [list(c) for c in candidates],
        "decoder": "gold" if split.name == "train" and candidates else "trie" if candidates else "",
        "model": checkpoint.name,
        "beside": {s.name: len(s.rows) for s in splits},
        "provenance": task.provenance,
        "origin": task.origin,
        "truncated": int(split.inputs.truncated.sum()),
        "created": datetime.now(UTC).isoformat(timespec="milliseconds"),
    }
    rows = split.rows
    texts, metas = [list(t) for t in rows.texts], [dict(meta) for meta in split.inputs.metas]
    return TaskTable(header, split.keys, list(rows.labels), texts, list(rows.ids), metas)


def _finish(
    say: Say, store: Store, space: Space, task: Task, splits: Sequence[Split], states: Sequence[str], report: Report
) -> dict[str, Any]:
    rate = report.computed / report.seconds if report.seconds else 0.0
    where = os.path.relpath(store.path) if store.files.local else store.where
    say(
        f"done: {report.computed:,} samples computed, {report.bytes / 1e9:.3f} GB in {report.segments} segments, "
        f"{report.seconds:.1f} s ({rate:,.0f} samples/s); store {where}"
    )
    return {
        "store": store.where,
        "space": space.id,
        "task": task.spec.name,
        "rows": {s.name: len(s.rows) for s in splits},
        "states": list(states),
        "samples": report.samples,
        "computed": report.computed,
        "bytes": report.bytes,
        "segments": report.segments,
        "truncated": report.truncated,
        "skipped": sum(len(s.inputs.skipped) for s in splits),
        "seconds": round(report.seconds, 3),
    }
