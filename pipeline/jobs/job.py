"""`Job`: a recipe with its feature space, task tables, tuner and sources looked up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from pipeline.checks.rows import refuse_other_kind
from pipeline.checks.stored import kept_of
from pipeline.command_lines import NotExtracted
from pipeline.commands.kept_files import make_start, start_file, stored_late, stored_start
from pipeline.commands.prepare import Making, prepare, tables_of
from pipeline.extract.backbones import Backbone
from pipeline.extract.backbones.tail import Tail
from pipeline.extract.tasks.base import TaskSpec
from pipeline.jobs.extracted import as_extracted, first_views, limited, picture_options, views_of, with_columns
from pipeline.jobs.folds import folded
from pipeline.jobs.sources import Live, batch_size_of, grouped, live_backbone, relive, sources, store_source
from pipeline.lookup.objective import make_objective
from pipeline.lookup.recipe import Found, Unstored, device_of, find_space, store_path
from pipeline.lookup.task import need
from pipeline.lookup.task_versions import AmbiguousTask, stored_tables
from pipeline.owners import config_of
from pipeline.recipe import Recipe
from pipeline.store import Space, Store, TaskTable, digest_json
from pipeline.store.errors import SeveralSpaces, StoreError, UserError
from pipeline.store.tables.table import version_of
from pipeline.terminal import counted, inputs_text
from pipeline.train.configs import ObjectiveConfig
from pipeline.train.data.source import Source
from pipeline.train.data.targets import Targets
from pipeline.train.model import Model, late_weights, tail_for
from pipeline.train.objectives import Objective, Scorer
from pipeline.train.tuners import TunerConfig, fitting_tuner, tuner_class


@dataclass
class Job:
    """A recipe with everything it names looked up."""

    recipe: Recipe
    found: Found
    tables: dict[str, TaskTable]
    spec: TaskSpec
    config: TunerConfig
    states: list[str]
    device: torch.device
    live: Live | None = None
    late: dict[int, dict[str, torch.Tensor]] = field(default_factory=dict)  # live layers before the last
    first: Callable[[], dict[str, torch.Tensor]] | None = None  # weights that training starts from

    @property
    def version(self) -> str:
        """Which version of the task its tables are of."""
        return version_of(next(iter(self.tables.values())).header)

    @cached_property
    def objective(self) -> Objective:
        """What is learned of the targets."""
        header = next(iter(self.tables.values())).header
        backbone = self.found.backbone
        tuner = tuner_class(self.recipe.tuner, backbone)
        return make_objective(self.recipe, self.spec, header.get("candidates", ()), backbone, tuner, self.training)

    @property
    def training(self) -> list[Any]:
        """The targets of the training rows."""
        return self.tables["train"].labels if "train" in self.tables else []

    @property
    def configs(self) -> dict[str, TunerConfig]:
        """The tuner's options, by slot: of the only one here."""
        return {"": self.config}

    @property
    def paper(self) -> bool:
        """Whether the papers' protocol for text-to-text backbones gives the defaults."""
        return self.found.backbone.writes_text

    @property
    def backbones(self) -> list[Backbone]:
        """Of its backbones."""
        return [self.found.backbone]

    @property
    def spaces(self) -> Any:
        """What a run keeps of the feature space that it reads: its id."""
        return self.found.space.id

    @property
    def model_name(self) -> str:
        return str(self.found.source["names"][0])

    @property
    def batch_size(self) -> int:
        return batch_size_of(self.recipe, self.paper, self.spec.target)

    @property
    def grouped(self) -> bool:
        """Whether batches hold samples of like length."""
        return grouped(self.recipe, self.paper)

    @property
    def each(self) -> list[Job]:
        """What there is of each task: itself alone."""
        return [self]

    def scorer(self) -> Scorer:
        """A scorer that has seen nothing yet."""
        return self.objective.scorer()

    def targets(self, split: str) -> Targets | None:
        """The targets of a split; None where a row has none."""
        return targets_of(self.objective, self.tables[split], self.tables[split].metas)

    def tail(self) -> Tail:
        """The frozen live end of the space's backbone, with the layers that the tuner needs."""
        attention = self.found.space.identity["attention"]
        return tail_for(self.recipe.tuner, self.config, self.found.backbone, attention, self.found.tail, self.late)

    def model(self, seed: int | None = None, tail: Tail | None = None) -> Model:
        """The tuner on the space's tail, weights drawn from `seed`. `tail`: that of another model on the same space
        with the same late layers, for they can share it."""
        tail = tail or self.tail()
        model = Model.build(self.recipe.tuner, self.config, self.found.backbone, tail, self.objective, seed)
        if seed is not None and self.first is not None:
            model.tuner.begin(self.first())
        return model

    def source(self, split: str) -> Source:
        """Batches of `split` from the store."""
        return store_source(self, split, self.batch_size)

    def sources(self, live: bool) -> dict[str, Source]:
        """A source for each split, from the store or with the backbone in the loop."""
        return sources(self, *(live_backbone(self) if live else (None, None)))

    def as_extracted(self) -> Recipe:
        """The recipe of the extraction that it reads."""
        return as_extracted(self.recipe, self.found)

    def describe(self) -> list[str]:
        """A line about the space it reads."""
        identity = self.found.space.identity
        return [
            f"space {self.found.space.id[:12]}: {self.model_name}, {counted(len(self.states), 'state')}, "
            f"{identity['format']}, computed in {identity['precision']}, {inputs_text(identity)}"
        ]

    def resolved(self) -> dict[str, Any]:
        """Options with their defaults filled in by what was found."""
        identity = self.found.space.identity
        return {
            "model": self.recipe.model or self.model_name,
            "space": self.found.space.id,
            "views": views_of(self.tables["train"]) if "image_size" in identity else None,
            "tuner_options": stated(self.config),
            **rows_options(self.recipe, self.spec, self.tables["train"].header),
            **{k: identity[k] for k in ("format", "projection", "precision", "attention")},
            **{k: identity[k] for k in ("max_length", "truncation_side")},
            "stride": identity.get("stride"),
            **picture_options(identity),
        }


def targets_of(objective: Objective, table: TaskTable, metas: Sequence[Mapping[str, Any]]) -> Targets | None:
    """Targets of a table's rows, with what is known of each; None where a row has none."""
    labelled = objective.unlabelled or None not in table.labels
    return Targets(objective, table.labels, metas or None) if labelled else None


def stated(config: TunerConfig | ObjectiveConfig) -> dict[str, Any]:
    """The options of a config that say something, the defaults among them: a later version may have others."""
    return {k: v for k, v in asdict(config).items() if v not in (None, ())}


def agreed(configs: Sequence[TunerConfig | ObjectiveConfig], asked: Mapping[str, Any]) -> dict[str, Any]:
    """The options that say something in one value for all `configs` that have them; of others what was `asked`."""
    found = [stated(config) for config in configs]
    known = {k: v for options in found for k, v in options.items()}
    same = {k: v for k, v in known.items() if all(getattr(c, k, v) == v for c in configs)}
    return {**asked, **same}


def rows_options(recipe: Recipe, spec: TaskSpec, header: Mapping[str, Any]) -> dict[str, Any]:
    """How the rows were split and numbers made into texts, also where the store decided it."""
    made, values = header.get("provenance", {}), spec.values if spec.target == "number" else ()
    stepped = len(values) > 1 and made.get("source") != "table"  # of a table the step follows from its range
    grid = values[1] - values[0] if stepped else recipe.grid
    columns = tuple(made.get("columns", ())) or recipe.columns
    return {"stratify": bool(made.get("stratified")) or recipe.stratify, "grid": grid, "columns": columns}


def load_job(recipe: Recipe, version: str | None = None, space: str | None = None) -> Job:
    """Look up space, task tables (those of `version` where given), tuner. `space`: the id of a finished run's, which
    then is not asked for by the recipe's options. A live run needs no store: what is not there is made from the
    checkpoint and the task's own files. Raises UserError for whatever does not fit."""
    need(recipe, "task")
    tuner_class(recipe.tuner)
    try:
        found = find_space(recipe, space)
        assert isinstance(found.space, Space)
        tables = found_tables(recipe, found, version)
    except (AmbiguousTask, SeveralSpaces):
        raise
    except StoreError as error:
        if not recipe.live:
            raise
        asked = space or recipe.space or ""
        if (job := unstored_job(recipe, asked)) is None:
            raise StoreError(f"{recipe.model} makes another feature space live than {asked[:12]}; {error}") from None
        return job
    return stored_job(recipe, found, tables, space is not None)


def stored_job(recipe: Recipe, found: Found, tables: dict[str, TaskTable], finished: bool) -> Job:
    """A job on what was found in the store. `finished`: of a run that was trained on all the views that its table has,
    whatever an earlier version wrote in its recipe."""
    if recipe.live:
        _ = found.tail  # now, since what is not there such a run makes
    job = make_job(replace(recipe, views=None) if finished else recipe, found, tables)
    store, digest = Store.open(store_path(recipe)), found.space.identity["weights"]
    named = replace(recipe, model=recipe.model or found.source["names"][0])
    cls = tuner_class(recipe.tuner, found.backbone)
    kept = kept_of(store, found.space.identity)
    job.late = stored_late(named, store, digest, kept, cls.late_layers(job.config, found.backbone))
    if start := cls.start(job.config, found.backbone):
        if recipe.fold and start.fisher:
            raise UserError(f"--fold {recipe.fold}: Fisher information of all training rows has seen those held out")
        keys, labels = (tables["train"].keys, tables["train"].labels) if "train" in tables else ([], [])
        file = start_file(start, recipe.task, keys, labels, found.space.identity["precision"], kept)
        job.first = lambda: stored_start(named, store, digest, start, file)
    return job


def found_tables(recipe: Recipe, found: Found, version: str | None = None) -> dict[str, TaskTable]:
    """The stored tables of the recipe's task. StoreError with the command to run where none fits."""
    assert isinstance(found.space, Space)
    try:
        return stored_tables(found.space, recipe, found.backbone.modality == "image", version)
    except AmbiguousTask:
        raise
    except StoreError as error:
        raise NotExtracted(str(error), with_columns(as_extracted(recipe, found), found.space)) from None


def make_job(
    recipe: Recipe,
    found: Found,
    tables: dict[str, TaskTable],
    live: Live | None = None,
) -> Job:
    """A job on tables at hand; the recipe's limit is for its training rows."""
    if "train" in tables:
        tables = {**tables, "train": limited(first_views(tables["train"], recipe.views), recipe.limit)}
    if recipe.fold:
        if "train" in tables and views_of(tables["train"]) > 1:
            raise UserError(f"--fold {recipe.fold}: views of one image would stand on both sides; give --views 1")
        tables = folded(tables, recipe.fold)
    spec = TaskSpec.from_dict(next(iter(tables.values())).header["spec"])
    if found.backbone.modality == "text":  # a store of earlier versions may hold names of images read as text
        for split, table in tables.items():
            refuse_other_kind(found.backbone, table.texts, "", f"the stored {split} rows of {spec.name}")
    config = config_of(recipe, recipe.tuner)
    tuner = fitting_tuner(recipe.tuner, config, found.backbone)
    states = tuner.states(config, found.backbone)
    projection, kind = found.backbone.projection, found.space.identity.get("projection", "none")
    if projection is not None and not tuner.reads(kind) and projection.basis.keys() & set(states):
        raise UserError(f"tuner {recipe.tuner} reads full states; this feature space keeps {kind}: extract without it")
    return Job(recipe, found, tables, spec, config, states, device_of(recipe), live)


def unstored_job(recipe: Recipe, space: str = "") -> Job | None:
    """A live job without a store: tables and tail come from the task's files and the checkpoint. None where that makes
    another feature space than the one asked for by the beginning of its id, `space`."""
    found = unstored_jobs(recipe, {"": space})
    return None if found is None else found[""]


def unstored_jobs(recipe: Recipe, spaces: Mapping[str, str]) -> dict[str, Job] | None:
    """Slot → its live job without a store, see `unstored_job`. `spaces`: slot → the beginning of an id."""
    need(recipe, "model", "task")
    asked = replace(recipe, tuners=tuple(recipe.tuner.split(",")), split=())
    if (recipe.projection or "none") != "none":
        raise UserError("--projection: what extract fitted is kept in a store, and there is none here; extract first")
    for upright in (True, False):  # a run of an earlier version did not turn images
        made = prepare(asked, upright=upright)
        if all(digest_json(m.identity).startswith(spaces.get(slot, "")) for slot, m in made.items()):
            break
    else:
        return None
    tables = tables_of(made)
    given: dict[str, Any] = {"tuners": recipe.tuners, "split": recipe.split}
    return {slot: _unstored(replace(m.recipe, **given), m, tables[slot]) for slot, m in made.items()}


def _unstored(recipe: Recipe, making: Making, tables: dict[str, TaskTable]) -> Job:
    checkpoint, live, backbone = making.checkpoint, making.live, making.backbone
    tail = backbone.tail_weights(live.model)
    space = Unstored(digest_json(making.identity), making.identity)
    job = make_job(
        recipe, Found(space, backbone, lambda: tail, {"names": [checkpoint.name]}), tables, (live, checkpoint)
    )
    job.late = late_weights(recipe.tuner, job.config, backbone, live.model)
    if start := tuner_class(recipe.tuner, backbone).start(job.config, backbone):
        train = relive(job, "train", checkpoint) if start.fisher else None
        job.first = lambda: make_start(start, backbone, live.model, job.objective, train, live.device)
    return job
