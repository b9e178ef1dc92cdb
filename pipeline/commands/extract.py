"""`pipeline extract`: a task's rows through the frozen backbone once, into the store."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.checks.doubtful_rows import doubts
from pipeline.checks.rows import token_doubts
from pipeline.checks.stored import kept_name, made_with, own_kept
from pipeline.command_lines import TRAINING_SENSE, command_line, quoted
from pipeline.commands.kept_files import keep
from pipeline.commands.prepare import Making, Split, joint_tables, of_slot, prepare, tables_of
from pipeline.commands.projection import project, widths_text
from pipeline.extract.backbones import Backbone, Inputs, stream_of
from pipeline.extract.backbones.live import LiveBackbone
from pipeline.extract.encoding import arrays_of
from pipeline.extract.extraction import Report, compute, provenance_of
from pipeline.extract.plugins import lasting
from pipeline.extract.pretrained import CONFIG_NOISE, Checkpoint
from pipeline.extract.tasks.base import Task, TaskSpec
from pipeline.extract.tasks.completion import form_of
from pipeline.jobs.slots import parts_of, tasks_of
from pipeline.lookup.recipe import store_path, told_apart, wanted_tuners
from pipeline.lookup.task import need
from pipeline.lookup.task_versions import save_tables, task_id
from pipeline.owners import config_of, options_of
from pipeline.recipe import Recipe
from pipeline.store import Space, Store, bytes_per_value
from pipeline.terminal import counted, size_text
from pipeline.train.tuners import tuner_class

Say = Callable[[str], None]


def run_extract(recipe: Recipe, say: Say, quiet: bool = False, task: Task | None = None) -> dict[str, Any]:
    """Extract what `recipe` asks for; `say` takes the lines a person reads. `task`: rows at hand, instead of those the
    recipe names. Returns what was done, for `--json`."""
    need(recipe, "model", "task")
    if task is None and len(names := tasks_of(recipe)) > 1:
        each = [_extract_task(replace(recipe, task=name), say, quiet, several=True) for name in names]
        done: dict[str, Any] = {"tasks": [told for told, _ in each]}
        first = each[0][1]
    else:
        done, first = _extract_task(recipe, say, quiet, task)
    if task is None and (command := train_command(recipe, done, first)):
        say(f"next: {command}")
    return done


def _extract_task(
    recipe: Recipe, say: Say, quiet: bool, task: Task | None = None, several: bool = False
) -> tuple[dict[str, Any], dict[str, str]]:
    """What was done, and `_first_tuner` of each slot. `several`: it is one of several tasks."""
    started = time.perf_counter()
    made = prepare(recipe, task)
    where = store_path(recipe)
    if "://" not in where and not Path(where).exists():
        for making in made.values():
            _ = making.live.model  # a checkpoint that cannot run leaves no trace
    store, tables = Store.open(where, create=True), tables_of(made)
    first, *others = made.values()
    odd = doubts(joint_tables(tables), first.backbone.modality == "image" and not others)
    warnings = [d for m in made.values() for d in token_doubts(m.checkpoint.tokenizer, m.backbone, m.splits)] + odd
    if left := first.task.provenance.get("left_out"):
        warnings.append(f"{left:,} objects were left out: boxes outside of their image or of no area, broken outlines")
    for sentence in warnings:
        say(f"warning: {sentence}")
    done: dict[str, Done] = {}
    for slot, making in made.items():
        with of_slot(slot):
            done[slot] = _extract(store, making, _of_slot(say, slot), quiet)
    for slot, (space, _) in done.items():
        save_tables(space, tables[slot], made[slot].states)
    report = _finish(say, store, made, done, time.perf_counter() - started)
    some = next(iter(next(iter(tables.values())).values()))
    several = several or len(made) > 1
    first_tuners = {slot: _first_tuner(making, several) for slot, making in made.items()}
    return {**report, "task id": task_id(some.header), "warnings": warnings}, first_tuners


def _first_tuner(making: Making, several: bool) -> str:
    """The first tuner that the slot was extracted for; of `several` slots or tasks, that can share a head; "" for
    none."""
    recipe, backbone = making.recipe, making.backbone
    for name in wanted_tuners(recipe, backbone):
        config = config_of(recipe, name, len(recipe.tuners) > 1)
        if not (several and tuner_class(name, backbone).needs_one_head(config)):
            return name
    return ""


def train_command(recipe: Recipe, done: Mapping[str, Any], first: Mapping[str, str]) -> str:
    """The command that trains from what was extracted, by the `first` tuner that each slot was extracted for; "" where
    there is nothing to train on, or nothing to train."""
    parts = done.get("tasks", [done])
    if not all(first.values()) or any("train" not in part["rows"] or part.get("targets") == "none" for part in parts):
        return ""
    alike = len(set(first.values())) == 1
    tuner = next(iter(first.values())) if alike else ",".join(f"{slot}={name}" for slot, name in first.items())
    known = {option for name in first.values() for option in options_of("tuner", name)}
    own = {k: v for k, v in recipe.tuner_options.items() if k in known}
    left: dict[str, Any] = {f.name: f.default for f in fields(recipe) if f.name in TRAINING_SENSE}
    trained = replace(recipe, tuner=tuner, tuner_options=own, **left)
    line = command_line("train", replace(trained, **_apart(trained, parts)))
    return line if " --tuner " in line else f"{line} --tuner {quoted(tuner)}"  # the default, too, is to be seen


def _apart(recipe: Recipe, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The options that training needs beside its own to find the spaces of `parts`, of which each is a task."""
    store, found, ids = Store.open(store_path(recipe)), dict[str, Any](), dict[str, str]()
    for task, part in zip(tasks_of(recipe), parts, strict=True):
        for slot, own in parts_of(replace(recipe, task=task)).items():
            space = store.space(part["space"][slot] if slot else part["space"])
            options = told_apart(own, space.identity, space.id)
            ids |= {slot: options.pop("space")} if "space" in options else {}
            found |= options
    if ids:
        found["space"] = ids[""] if "" in ids else ",".join(f"{slot}={id}" for slot, id in ids.items())
    return found


Done = tuple[Space, Report]


def _of_slot(say: Say, slot: str) -> Say:
    return (lambda line: say(f"{slot}: {line}")) if slot else say


def _extract(store: Store, making: Making, say: Say, quiet: bool) -> Done:
    """Compute what one feature space lacks. Its tables come last, when all slots are there."""
    recipe, checkpoint, splits = making.recipe, making.checkpoint, making.splits
    states, options = making.states, making.options
    identity, live, inputs, keys = making.identity, making.live, making.inputs, making.keys
    device, spec, digest = live.device, making.task.spec, identity["weights"]
    kept = _kept_mark(store, identity, checkpoint)
    if not store.has_weights(digest, *(kept_name(name, kept) for name in KEPT_FILES)):
        parts = _kept_files(checkpoint, live, identity)
        store.save_weights(digest, {kept_name(name, kept): content for name, content in parts.items()})
    tokens = recipe.batch_tokens or (32768 if device.type == "cuda" else 4096)
    fit_on = next((s.inputs for s in splits if s.name == "train"), inputs)
    identity, live = project(store, identity, live, fit_on, recipe.seed, tokens, spec.name, say)
    backbone = live.backbone
    space = store.create_space(identity)
    _announce(say, space, splits, inputs, keys, states, backbone, options.format, spec, options.text.max_length)
    if making.candidates and backbone.continues_text:
        say(f"answers: names of the classes, after the prompt {options.text.prompt!r}")
    keep(recipe, spec, store, identity, kept, live, splits, making.candidates, say)
    how: dict[str, Any] = {
        "tokens": tokens,
        "batch_size": recipe.batch_size,
        "seed": recipe.seed,
        "provenance": provenance_of(checkpoint.name, checkpoint.revision, identity, device, making.task.provenance),
        "quiet": quiet,
    }
    if recipe.scheduler:
        from pipeline.extract.cluster import compute_on

        each = estimated_bytes(inputs, states, backbone, options.format) / len(keys)
        model = os.path.abspath(recipe.model) if Path(recipe.model).is_dir() else recipe.model  # noqa: PTH100
        how["imports"] = lasting(recipe.imports)
        report = compute_on(recipe.scheduler, space, inputs, keys, states, model, recipe.device, each, **how)
    else:
        report = compute(space, inputs, keys, states, live, describe=_describer(splits), **how)
    return space, report


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
    distinct = list(dict.fromkeys(keys))
    stored = space.lookup(distinct, states)
    todo = int((~stored.present).sum())
    first = {key: place for place, key in reversed(list(enumerate(keys)))}
    once = inputs.take(np.asarray([first[key] for key in distinct], np.int64))
    size = estimated_bytes(once, states, backbone, fmt)
    say(f"rows: {rows}; {_labels_text(spec)}")
    if many := _too_many_classes(spec, splits):
        say(f"warning: {many}")
    say(
        f"space {space.id[:12]}: {widths_text(list(states), backbone)} as {fmt}, "
        f"{size_text(size / len(distinct))} a sample, {size_text(size)} in all"
    )
    say(
        f"to compute: {todo:,} of {len(distinct):,} distinct samples"
        + ("" if todo else ", everything is in the store already")
    )
    for split in splits:
        if bad := split.inputs.skipped:
            say(f"warning: {split.name}: {len(bad):,} images left out, first: {next(iter(bad.values()))}")
    long, windows, empty = (sum(counts) for counts in zip(*(s.windows for s in splits), strict=True))
    if long:
        without = f"; {empty:,} more hold no token to learn and are left out" if empty else ""
        say(f"{counted(long, 'text')} longer than {longest:,} tokens became {counted(windows, 'sample')}{without}")
    if cut := int(inputs.truncated.sum()):
        limit = int(inputs.lengths[backbone.streams[0]][inputs.truncated].max())
        whose = "--max-length" if limit >= longest else "all that the model takes"
        say(f"warning: {cut:,} of {len(keys):,} texts are longer than {limit:,} tokens ({whose}) and were cut")


def _labels_text(spec: TaskSpec) -> str:
    """What the label is taken for: a column of numbers with one word among them would be hundreds of classes."""
    if spec.target == "mask":
        return f"label: masks of {len(spec.labels):,} classes ({_few(spec.labels)}); other values are no class"
    if spec.target in ("boxes", "instances"):
        outlines = " with their outlines" if spec.target == "instances" else ""
        return f"label: objects of {len(spec.labels):,} classes ({_few(spec.labels)}){outlines}"
    if spec.target == "none":
        return "no label: rows are for `stream` alone, not for training (--label COLUMN)"
    if spec.target == "pair":
        return "no label: what the slots read of a row belongs together"
    if spec.target == "number":
        return "label: a number"
    if spec.target == "tokens":
        learned = {"text": "all of", "completion": "of the completions of", "messages": "the assistant's in"}
        return f"targets: tokens, {learned[form_of(spec)]} the texts"
    what = {"class": "classes", "classes": "classes, any number of them a row", "tags": "tags, one a word"}[spec.target]
    return f"label: {len(spec.labels):,} {what} ({_few(spec.labels)})"


def _few(labels: Sequence[str]) -> str:
    return ", ".join(labels[:4]) + (", …" if len(labels) > 4 else "")


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
                text = " | ".join(split.rows.texts[row] or ("a later window of the row before",))
                return f"{split.name} row {row} ({text[:60]!r}{'…' if len(text) > 60 else ''})"
        return f"sample {key}"

    return describe


KEPT_FILES = ("tail.safetensors", "config.json", "source.json")


def _kept_files(checkpoint: Checkpoint, live: LiveBackbone, identity: dict[str, Any]) -> dict[str, Any]:
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
    if not store.has_weights(digest, *KEPT_FILES):
        return ""
    there = store.load_json(digest, "source.json").get("made_with")
    if isinstance(there, dict):
        return "" if there == made_with(identity) else own_kept(identity)
    old, new = store.load_json(digest, "config.json"), json.loads(json.dumps(_config(checkpoint)))
    same = all(old[name] == new[name] for name in old.keys() & new.keys() - CONFIG_NOISE)
    return "" if same else own_kept(identity)


def _finish(
    say: Say,
    store: Store,
    made: Mapping[str, Making],
    done: Mapping[str, Done],
    seconds: float,
) -> dict[str, Any]:
    reports = [report for _, report in done.values()]
    computed, size = sum(r.computed for r in reports), sum(r.bytes for r in reports)
    segments, rate = sum(r.segments for r in reports), computed / seconds if seconds else 0.0
    where = os.path.relpath(store.path) if store.files.local else store.where
    say(
        f"done: {computed:,} samples computed, {size_text(size)} in {counted(segments, 'segment')}, "
        f"{seconds:.1f} s ({rate:,.0f} samples/s); store {where}"
    )
    first = next(iter(made.values()))
    return {
        "store": store.where,
        "space": _of_slots({slot: space.id for slot, (space, _) in done.items()}),
        "task": first.task.spec.name,
        "targets": first.task.spec.target,
        "rows": {s.name: len(s.rows) for s in first.splits},
        "states": _of_slots({slot: making.states for slot, making in made.items()}),
        "samples": sum(r.samples for r in reports),
        "computed": computed,
        "bytes": size,
        "segments": segments,
        "truncated": sum(r.truncated for r in reports),
        "windows": sum(s.windows[1] for s in first.splits),
        "skipped": sum(len(s.inputs.skipped) for making in made.values() for s in making.splits),
        "seconds": round(seconds, 3),
    }


def _of_slots(found: Mapping[str, Any]) -> Any:
    """By slot; the thing itself where there is a single backbone."""
    return found[""] if "" in found else dict(found)
