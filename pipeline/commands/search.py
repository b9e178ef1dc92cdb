"""`pipeline search`: what of a run's stored samples belongs to a text or an image that was never seen.

The query goes through its own backbone, live, and its tower; what it is compared with is embedded from stored states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.commands.extract import Say
from pipeline.commands.prepare import of_slot
from pipeline.extract.batch import Batch
from pipeline.jobs.joint import Joint
from pipeline.jobs.sources import fresh
from pipeline.runs import Run
from pipeline.store.errors import UserError
from pipeline.train.data.live_source import LiveSlot
from pipeline.train.evaluate import autocast, closing
from pipeline.train.objectives import objective_class, objective_names
from pipeline.train.objectives.retrieval import Retrieval


@dataclass(frozen=True)
class Query:
    """A text, or an image's file. `slot`: the one it is of, "" where that is clear."""

    text: str | None = None
    image: Path | None = None
    slot: str = ""


@dataclass(frozen=True)
class Found:
    """Stored samples of one slot. `names`: the text or the file name of each; `splits`: where each stands first;
    `embedded`: (n, D)."""

    names: list[str]
    splits: list[str]
    embedded: Tensor


def run_search(run: Run, query: Query, top: int, splits: Sequence[str], say: Say) -> dict[str, Any]:
    """The `top` samples most similar to `query` among those of the `splits` of the run's task (all where none is
    named), each distinct one once. Raises UserError for a run that compares no slots, a slot or split that is not
    there, and an image that cannot be read."""
    job = ranking_job(run)
    slot = _slot_of(job, query)
    (other,) = (name for name in job.jobs if name != slot)
    for split in splits:
        if split not in job.tables:
            raise UserError(f"--split {split}: the run's task has {', '.join(job.tables)}")
    asked = _embedded_query(run, job, slot, query, say)
    found = embedded_samples(run, job, other, splits or list(job.tables))
    similar = found.embedded @ asked
    order = torch.argsort(similar, descending=True, stable=True)[:top].tolist()
    results = [
        {"rank": place, other: found.names[i], "similarity": round(float(similar[i]), 6), "split": found.splits[i]}
        for place, i in enumerate(order, 1)
    ]
    return {"run": str(run.folder), "query": query.text or str(query.image), "among": len(similar), "results": results}


def ranking_job(run: Run) -> Joint:
    """The job of a run whose objective compares two slots. UserError for any other."""
    if isinstance(run.job, Joint) and isinstance(run.job.objective, Retrieval):
        return run.job
    able = ", ".join(name for name in objective_names() if issubclass(objective_class(name), Retrieval))
    raise UserError(f"search: {run.folder} compares no slots with each other; runs that do have the objective {able}")


def _slot_of(job: Joint, query: Query) -> str:
    """The slot that the query is of."""
    kind = "text" if query.image is None else "image"
    able = [slot for slot, part in job.jobs.items() if part.found.backbone.modality == kind]
    if query.slot and query.slot not in able:
        raise UserError(f"--slot {query.slot}: slots of this run that read {kind}: {', '.join(able) or 'none'}")
    if not query.slot and len(able) != 1:
        which = f"say which with --slot: {', '.join(able)}" if able else "give the other kind"
        raise UserError(f"search: {len(able) or 'no'} slots of this run read {kind}; {which}")
    return query.slot or able[0]


def _embedded_query(run: Run, job: Joint, slot: str, query: Query, say: Say) -> Tensor:
    """(D,), on the host."""
    if query.image is not None and not query.image.exists():  # videos are folders
        raise UserError(f"--image {query.image}: no such file")
    if query.image is None and not (query.text or "").strip():
        raise UserError("--query: the text is blank")
    place = None if query.image is None else query.image.resolve()
    row, root = (query.text, "") if place is None else (place.name, str(place.parent))
    with of_slot(slot):
        part = fresh(job.jobs[slot], job.live()[slot], [row], root, say)
        batch = LiveSlot(job.live()[slot][0], part.inputs, job.jobs[slot].states).compute(np.arange(1))
    return _embed(run, slot, Batch.joined({slot: batch}, {slot: np.arange(1)}))[0]


def embedded_samples(run: Run, job: Joint, slot: str, splits: Sequence[str]) -> Found:
    """The distinct samples of `slot` in `splits`, embedded from stored states."""
    names, where, vectors, seen = [], [], [], set[str]()
    for split in splits:
        source, table = job.source(split), job.jobs[slot].tables[split]
        first = np.unique(source.places[slot], return_index=True)[1]
        with closing(source.each([slot])) as batches:
            for batch in batches:
                rows = _embed(run, slot, batch)
                for number, vector in zip(batch.index.tolist(), rows, strict=True):
                    row = int(first[number])
                    if table.keys[row] not in seen:
                        seen.add(table.keys[row])
                        names.append(" | ".join(table.texts[row]))
                        where.append(split)
                        vectors.append(vector)
    return Found(names, where, torch.stack(vectors))


def _embed(run: Run, slot: str, batch: Batch) -> Tensor:
    run.model.eval()
    with torch.inference_mode(), autocast(run.job.device, run.job.recipe.train_precision):
        return run.model.embed(slot, batch.to(run.job.device)).float().cpu()
