"""Finished runs: load one, score it from the store, predict on inputs never seen with the backbone live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from extract.backbones.live import Backbone
from extract.checkpoint import Checkpoint
from extract.tasks.base import Rows, TaskSpec
from extract.tasks.glue import GLUE
from extract.tasks.images import pictures
from extract.tasks.sheet import read_sheet
from pipeline.extracting import prepare_split
from pipeline.job import (
    Job,
    batch_size_of,
    live_backbone,
    load_job,
    relive,
    store_source,
    text_options,
)
from pipeline.recipe import Recipe, read_recipe
from store.errors import StoreError, UserError
from train.checkpoint import TUNER, load_tuner
from train.checkpoint import load as load_checkpoint
from train.evaluate import evaluate, predict
from train.generate import generate
from train.live import LiveSource
from train.metrics import score
from train.model import Model
from train.order import Order


@dataclass
class Run:
    """A trained tuner with the space it was trained from."""

    folder: Path
    job: Job
    model: Model
    _live: tuple[Backbone, Checkpoint] | None = None

    @property
    def spec(self) -> TaskSpec:
        return self.job.spec

    def live(self) -> tuple[Backbone, Checkpoint]:
        """The backbone, loaded once."""
        self._live = self._live or live_backbone(self.job)
        return self._live

    def evaluate(self, split: str) -> dict[str, float]:
        """Metrics of `split` from the store."""
        if split not in self.job.tables:
            raise UserError(f"the store has no {split} rows of {self.spec.name}; it has: {', '.join(self.job.tables)}")
        source = store_source(self.job, split, self._batch_size())
        return evaluate(self.model, source, self.job.objective.scorer(), self.job.device)

    def generate(self, split: str) -> dict[str, Any]:
        """Free generation on `split` with the frozen decoder live: metrics by exact match of the written text, and the
        share of answers that are a target at all. Raises UserError on backbones that write no text."""
        if not self.job.objective.wants.text_head:
            raise UserError(
                "--generate: only runs of objective label-text write text; this one's is " + self.job.objective.name
            )
        backbone, checkpoint = self.live()
        written = generate(self.model, backbone, relive(self.job, split, checkpoint).inputs)
        texts = checkpoint.tokenizer.batch_decode(written, skip_special_tokens=True)
        targets = {t: i for i, t in enumerate(self.spec.targets)}
        chosen: list[Any] = [self._value(targets.get(t.strip())) for t in texts]
        labels = self.job.tables[split].labels
        if any(label is None for label in labels):
            raise UserError(f"the {split} rows of {self.spec.name} have no labels to score against")
        known = sum(c is not None for c in chosen)
        return {**score(self.spec.metrics, chosen, labels), "in_targets": known / len(chosen)}

    def predict(self, texts: Sequence[Sequence[str]], root: str | Path = "") -> list[dict[str, Any]]:
        """What is told of each text, text pair or picture, the backbone run live: `label` (a class's name, or a number)
        and its `probability` where there is one. `root`: the folder that names of pictures are relative to."""
        if not texts:
            return []
        backbone, checkpoint = self.live()
        rows = Rows([tuple(t) for t in texts], [None] * len(texts))
        candidates = next(iter(self.job.tables.values())).header.get("candidates", [])
        options = replace(text_options(self.job.found), root=str(root))
        part = prepare_split(backbone.family, checkpoint.tokenizer, self.spec, "predict", rows, options, candidates)
        # Sorted by length, so that batches hold little padding; `predict` puts the answers back in order.
        order = Order(part.inputs.tokens(), self._batch_size())
        source = LiveSource(backbone, part.inputs, None, self.job.states, order)
        return predict(self.model, source, self.job.device)

    def _value(self, target: int | None) -> Any:
        if target is None:
            return None
        return target if self.spec.kind == "classification" else self.spec.values[target]

    def _batch_size(self) -> int:
        return batch_size_of(self.job.recipe, self.job.paper)


def load_run(folder: str | Path, **overrides: Any) -> Run:
    """The run in `folder`. `overrides`: options of the recipe that are different here (store, device, model).

    Raises UserError when the folder is not a finished run, or its feature space is not in the store.
    """
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder}: not a run folder, it has no recipe.yaml")
    if not (folder / TUNER).is_file():
        raise UserError(f"{folder}: the run has no trained tuner yet; `pipeline train --recipe {folder}/recipe.yaml`")
    recipe = Recipe.from_mapping(read_recipe(folder / "recipe.yaml"), str(folder / "recipe.yaml"))
    recipe = replace(recipe, limit=None, **{k: v for k, v in overrides.items() if v is not None})
    version = load_checkpoint(folder / TUNER)[1].get("rows")
    try:
        job = load_job(recipe, version)
    except StoreError as error:
        raise StoreError(f"{folder}: {error}") from None
    model = job.model()
    state, about = load_tuner(folder / TUNER, model.trainable_state())
    if about.get("space") != job.found.space.id:
        raise UserError(
            f"{folder}: trained from feature space {about.get('space')}, the store gives {job.found.space.id}"
        )
    model.load_trainable(state)
    return Run(folder, job, model.to(job.device))


def read_inputs(
    path: Path, spec: TaskSpec, text: str | None = None, text_pair: str | None = None
) -> tuple[list[Any], list[tuple[str, ...]]]:
    """Ids and fields of a file's rows. An id is what stands in a column `id`, else the row's number from 1, or the name
    of a picture. Fields: columns named by `text` and `text_pair`, or by the task's own field names.

    GLUE's files are understood in their own layout; a folder gives the pictures below it. Raises UserError for a
    missing column or a bad file.
    """
    if path.is_dir():
        names = [p.relative_to(path).as_posix() for p in pictures(path)]
        return names, [(name,) for name in names]
    glue = GLUE.get(spec.name)
    sheet = read_sheet(path)
    if glue and glue.header and text is None and not set(spec.fields) <= set(sheet.columns):
        sheet = read_sheet(path, list(glue.header))
    columns = []
    for i, field in enumerate(spec.fields):
        asked = (text, text_pair)[i]
        also = tuple(names[0] for names in glue.columns[i : i + 1]) if glue and glue.columns else ()
        name = asked or next((n for n in (field, *also) if n in sheet.columns), field)
        columns.append(["" if v is None else str(v) for v in sheet.column(name)])
    rows = [tuple(row) for row in zip(*columns, strict=True)]
    return sheet.column("id") if "id" in sheet.columns else list(range(1, len(rows) + 1)), rows
