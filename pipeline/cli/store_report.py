"""What `pipeline store …` prints."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from pipeline.checks.stored import source_of
from pipeline.lookup.task_versions import versions_of
from pipeline.store import Segment, Space, Store
from pipeline.store.format.keys import Keys
from pipeline.store.format.names import is_segment, segment_path, space_path
from pipeline.store.segments.unsealed import lost_manifest
from pipeline.store.tables.table import TableInfo
from pipeline.terminal import counted, inputs_text, pairs_text, size_text, table_text


def status_what(store: Store) -> dict[str, Any]:
    """Facts about a store: its spaces with model, tasks, samples, states, bytes, and who wrote what when."""
    spaces = [_space_what(store, space) for space in store.spaces()]
    return {"store": store.where, "spaces": spaces}


def _space_what(store: Store, space: Space) -> dict[str, Any]:
    segments = space.segments()
    digest = str(space.identity.get("weights", ""))
    known = store.has_weights(digest, "source.json") if digest else False
    source = source_of(store, space) if known else {}
    tasks = _tasks(space)
    names = [n for n in space.files.names(f"{space_path(space.id)}/segments") if is_segment(n)]
    superseded = space.superseded()
    unsealed = set(names) - {s.id for s in segments} - set(superseded)
    lost = [n for n in unsealed if lost_manifest(space.files, segment_path(space.id, n))]
    return {
        "space": space.id,
        "model": ", ".join(source.get("names", ["?"])),
        "revision": source.get("revision", ""),
        "identity": space.identity,
        "samples": Keys.joined(s.keys for s in segments).distinct(),
        "segments": len(segments),
        "states": sorted({n for s in segments for n in s.states}),
        "bytes": sum(s.nbytes for s in segments),
        "tasks": {t["name"]: t["rows"] for t in tasks},
        "tables": tasks,
        "unsealed": len(unsealed) - len(lost),
        "without a manifest": len(lost),
        "superseded": len(superseded),
        "written": _written(segments),
    }


def _tasks(space: Space) -> list[dict[str, Any]]:
    """The tasks with tables: by their names, or where several have one name as NAME@ID."""
    damaged: list[TableInfo] = []
    found = versions_of(space, damaged=damaged)
    count = Counter(v.task for v in found)
    listed: list[dict[str, Any]] = [
        {
            "name": v.name if count[v.task] > 1 else v.task,
            "id": v.name,
            "rows": dict(sorted(v.rows.items())),
            "reads": v.reads,
        }
        for v in sorted(found, key=lambda v: (v.task, v.created))
    ]
    unread = [{"name": f"{t.task} (damaged)", "rows": {t.split: t.rows}, "reads": t.path} for t in damaged]
    return listed + unread


def _written(segments: Sequence[Segment]) -> dict[str, Any]:
    """Who wrote the segments, when, from which data, with what."""
    found = [p for s in segments for p in (s.provenance, *_rewritten(s.provenance))]
    when = sorted(s.created for s in segments)

    def distinct(*path: str) -> list[str]:
        values: dict[str, None] = {}
        for provenance in found:
            value: Any = provenance
            for part in path:
                value = value.get(part) if isinstance(value, dict) else None
            if value not in (None, "", [], {}):
                # One line, and not a long one, whatever a writer has put there.
                values[" ".join(str(value)[:200].split())] = None
        return sorted(values)

    return {
        "first": when[0] if when else None,
        "last": when[-1] if when else None,
        "by": distinct("user"),
        "datasets": distinct("dataset", "dataset"),
        "licences": distinct("dataset", "licence") or distinct("dataset", "license"),
        "devices": distinct("device", "name"),
        "torch": distinct("libraries", "torch"),
        "project": distinct("project"),
    }


def _rewritten(provenance: dict[str, Any]) -> list[Any]:
    """The other provenances that `compact` has put together into one segment."""
    rewritten = provenance.get("rewritten")
    others = rewritten.get("others") if isinstance(rewritten, dict) else None
    return others if isinstance(others, list) else []


def names_text(names: Sequence[str]) -> str:
    """Names of states in their natural order; three or more that count up are told by the first and the last."""
    parts = [name.rpartition(".") for name in names]
    numbered = sorted((stem, int(number)) for stem, _, number in parts if number.isdecimal())
    runs: list[list[int]] = []
    stems: list[str] = []
    for stem, number in numbered:
        if runs and stems[-1] == stem and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
            stems.append(stem)
    told = []
    for stem, run in zip(stems, runs, strict=True):
        shown = [f"{stem}.{number}" for number in run]
        told += [f"{shown[0]} … {shown[-1]}"] if len(shown) > 2 else shown
    return ", ".join(told + sorted(name for name, part in zip(names, parts, strict=True) if not part[2].isdecimal()))


def status_text(what: dict[str, Any]) -> str:
    """The same as text."""
    lines = [f"store {what['store']}: {counted(len(what['spaces']), 'feature space')}"]
    for s in what["spaces"]:
        i, w = s["identity"], s["written"]
        more = [f"{s[k]} {k}" for k in ("unsealed", "without a manifest", "superseded") if s[k]]
        inputs = "".join(f", {text}" for text in [inputs_text(i)] if text)
        lines += [
            "",
            f"space {s['space'][:12]}  {s['model']}  {i.get('format')}, computed in {i.get('precision')}{inputs}",
            f"  {counted(s['samples'], 'sample')}, {counted(len(s['states']), 'state')}, {size_text(s['bytes'])}, "
            + counted(s["segments"], "segment")
            + "".join(f", {m}" for m in more),
            *([f"  states: {names_text(s['states'])}"] if s["states"] else []),
            *(
                f"  {t['name']}: " + ", ".join(f"{k} {v:,}" for k, v in t["rows"].items()) + f"; {t['reads']}"
                for t in s["tables"]
            ),
        ]
        if w["first"]:
            by = f" by {', '.join(w['by'])}" if w["by"] else ""
            lines.append(f"  written {w['first']} to {w['last']}{by} on {', '.join(w['devices']) or '?'}")
        if w["datasets"] or w["licences"]:
            lines.append(
                f"  data: {', '.join(w['datasets']) or '?'}; licence: {', '.join(w['licences']) or 'not stated'}"
            )
        if i.get("prompt"):
            lines.append(f"  prompt: {i['prompt']}")
    return "\n".join(lines)


def usage_text(what: dict[str, Any]) -> str:
    """`du` as a table."""
    rows = []
    for s in what["spaces"]:
        rows.append((f"space {s['space'][:12]}", size_text(s["bytes"])))
        rows += [(f"  {name}", size_text(size)) for name, size in s["states"].items()]
        rows += [(f"  {name}", size_text(s[name])) for name in ("tables",) if s[name]]
        if s["other"]:
            rows.append(("  unsealed or superseded", size_text(s["other"])))
    rows += [(name, size_text(what[name])) for name in ("weights", "quarantine") if what[name]]
    return table_text(("what", "bytes"), rows) if rows else "nothing"


def garbage_text(found: Sequence[Any], deleted: bool) -> str:
    """What `gc` found."""
    if not found:
        return "nothing to remove"
    total = size_text(sum(f.bytes for f in found))
    end = f"removed {len(found)}, {total}" if deleted else f"{len(found)} to remove, {total}; --delete removes them"
    return pairs_text([(f.path, f"{size_text(f.bytes)}, {f.why}") for f in found]) + f"\n{end}"
