"""Finished runs: load one, score it from the store, predict on inputs never seen with the backbone live."""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from pipeline.checks.rows import checked_rows
from pipeline.command_lines import quoted
from pipeline.commands.extract import Say
from pipeline.commands.prepare import of_slot
from pipeline.extract.backbones.live import LiveBackbone
from pipeline.extract.pretrained import Checkpoint
from pipeline.extract.tasks.base import TaskSpec
from pipeline.extract.tasks.completion import conversation_text, form_of
from pipeline.extract.tasks.glue import GLUE
from pipeline.extract.tasks.images import SUFFIXES as PICTURES
from pipeline.extract.tasks.images import image_files
from pipeline.extract.tasks.sheet import read_sheet
from pipeline.extract.tasks.table import cell_text
from pipeline.jobs.job import Job
from pipeline.jobs.joint import Joint
from pipeline.jobs.mixture import Mixture, open_job, own_options
from pipeline.jobs.slots import parts_of, slots_of
from pipeline.jobs.sources import fresh_source, live_backbone, relive
from pipeline.jobs.written import written_scores
from pipeline.owners import recipe_of
from pipeline.recipe import read_recipe
from pipeline.store.errors import StoreError, UserError
from pipeline.store.near import near
from pipeline.train.data.live_source import LiveSource
from pipeline.train.data.source import Source
from pipeline.train.evaluate import evaluate, predict
from pipeline.train.fit.run_files import TUNER, check
from pipeline.train.fit.run_files import load as load_checkpoint
from pipeline.train.fit.state import other_options
from pipeline.train.generate import generate
from pipeline.train.metrics import score
from pipeline.train.mixture import MixedModel
from pipeline.train.model import Model
from pipeline.train.objectives.base import Objective, Report
from pipeline.train.objectives.label_text import LabelText
from pipeline.train.tuners import tuner_class

# Options of a run's recipe that say where things are and not what they are.
ELSEWHERE = ("store", "model", "data", "device", "tier", "host_memory", "scheduler", "imports")


@dataclass(repr=False)
class Run:
    """A trained tuner with the space it was trained from."""

    folder: Path
    job: Job | Joint | Mixture
    model: Model
    _live: tuple[LiveBackbone, Checkpoint] | None = None

    @property
    def spec(self) -> TaskSpec:
        return self.job.spec

    @property
    def objective(self) -> Objective:
        """What is learned of the targets. UserError for several tasks at once."""
        return self.single().objective

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, tuner={self.job.recipe.tuner!r}, task={self.spec.name!r})"

    def of(self, task: str) -> Run:
        """The same run as one of its several tasks has it: what `predict` and `evaluate` need."""
        if not isinstance(self.job, Mixture) or not isinstance(self.model, MixedModel):
            raise UserError(f"--task: {self.folder} is a run of one task, {self.spec.name}")
        if task not in self.job.jobs:
            raise UserError(f"--task {task}: {self.folder} has the tasks {', '.join(self.job.jobs)}")
        return Run(self.folder, self.job.jobs[task], self.model.of(task))

    @property
    def metrics(self) -> dict[str, Any]:
        """What training ended with: scores of validation and test, best epoch, trainable parameters, seconds."""
        found: dict[str, Any] = json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
        return found

    def live(self) -> tuple[LiveBackbone, Checkpoint]:
        """The backbone of a run with a single one, loaded once."""
        assert isinstance(self.job, Job)
        self._live = self._live or live_backbone(self.job)
        return self._live

    def evaluate(self, split: str, report: bool = False) -> dict[str, Any]:
        """Metrics of `split` from the store, computed as at the end of training. With `report`, what more there is to
        say of it under that name: precision, recall, F1 and support of each class and the confusion matrix, or a
        summary of the residuals. UserError for a report of an objective that has none, or of several tasks at once."""
        if split not in self.job.tables:
            there = f"{', '.join(self.job.tables)}{near(split, self.job.tables)}"
            raise UserError(f"the store has no {split} rows of {self.spec.name}; it has: {there}")
        more = self._report() if report else None
        source, precision = self.job.source(split), self.job.recipe.train_precision
        figures = evaluate(self.model, source, self.job.scorer(), self.job.device, precision, report=more)
        return {**figures, "report": more.compute()} if more else figures

    def _report(self) -> Report:
        objective = self.single().objective
        if (found := objective.report()) is None:
            raise UserError(f"--report: objective {objective.name} has nothing to report beside its figures")
        return found

    def single(self) -> Job | Joint:
        if isinstance(self.job, Mixture):
            raise UserError(f"{self.folder} has several tasks: choose one with --task, of {', '.join(self.job.jobs)}")
        return self.job

    def generate(self, split: str, most: int | None = None) -> dict[str, Any]:
        """Free generation on `split` with the frozen decoder live: metrics by exact match of the written text (of a
        regression by the number written), and the share of answers that are a target at all. Of a language model: what
        `written_scores` gives, of `most` tokens a text. Raises UserError for runs that write no text."""
        objective = self.single().objective
        if not (isinstance(objective, LabelText) or objective.continues_text):
            raise UserError(
                f"--generate: runs of objective label-text and completion write text; this one's is {objective.name}"
            )
        assert isinstance(self.job, Job)
        live, checkpoint = self.live()
        if live.backbone.continues_text:
            return written_scores(self.job, self.model, (live, checkpoint), split, most)
        assert isinstance(objective, LabelText)
        if most is not None:
            raise UserError(f"--max-new-tokens: {live.backbone.name} backbones write up to the longest label")
        written = generate(self.model, live, relive(self.job, split, checkpoint).inputs)
        texts = checkpoint.tokenizer.batch_decode(written, skip_special_tokens=True)
        answers = [objective.meaning(t) for t in texts]
        labels = [label for label in self.job.tables[split].labels if label is not None]
        if len(labels) < len(texts):
            raise UserError(f"not all {split} rows of {self.spec.name} have labels to score against")
        known = sum(t.strip() in self.spec.texts for t in texts)
        truth, average = objective.truth(labels), not objective.config.metric
        figures = score(objective.metrics, answers, truth, average=average)
        return {**figures, "in_targets": known / len(texts)}

    def predict(
        self,
        texts: Sequence[str | Sequence[str]] | Mapping[str, Sequence[str | Sequence[str]]],
        root: str | Path = "",
        say: Say = lambda text: None,
        out_dir: str | Path | None = None,
    ) -> list[dict[str, Any]]:
        """What is told of each row, the backbone run live: `label` (a class's name, or a number) and its `probability`
        where there is one. A row: the text of each of the task's fields, or the name of an image; where that is one,
        also without a sequence around it. Of a run with several backbones: slot → its rows, or rows that every
        slot reads. `root`: the folder that names of images are relative to. `out_dir`: where what is no line of text
        is written, as it is made (masks, overlays); an entry then names the files. Raises UserError for rows of another
        shape or kind."""
        if out_dir is not None and not self.objective.files:
            raise UserError(f"--out-dir: objective {self.objective.name} writes no files; leave it out")
        texts = texts if isinstance(texts, str | bytes | Mapping) else list(texts)
        if not texts:
            return []
        self.single()
        if isinstance(self.job, Joint):
            source: Source = self.job.fresh_source(texts, str(root), say)
        else:
            assert isinstance(self.job, Job)
            source = fresh_source(self.job, self.live(), texts, str(root), say)
        keep = (lambda place, entry: entry) if out_dir is None else self._saving(texts, Path(root), Path(out_dir))
        entries = predict(self.model, source, self.job.device, self.job.recipe.train_precision, keep=keep)
        if isinstance(source, LiveSource) and len(of := source.inputs.of):  # a row may be several samples
            entries = [
                self.objective.joined([entries[i] for i in np.flatnonzero(of == row)]) for row in range(of[-1] + 1)
            ]
        if out_dir is not None:
            self.objective.save_all(entries, [row[0] for row in checked_rows(texts, self.spec)], Path(out_dir))
        return entries

    def _saving(self, texts: Any, root: Path, folder: Path) -> Callable[[int, dict[str, Any]], dict[str, Any]]:
        """What writes the files of an entry below `folder`, from the place of its image among `texts`."""
        names = [row[0] for row in checked_rows(texts, self.spec)]
        files = file_names(names)
        images = {(root / name).resolve() for name in names}
        for form in self.objective.writes:
            for file in files:
                if (path := folder / form.format(file)).resolve() in images:
                    raise UserError(f"--out-dir {folder}: {path} is an image to be read; name another folder")
        return lambda place, entry: self.objective.save(entry, root / names[place], folder, files[place])


def _alike(folder: Path) -> str:
    """ "; did you mean runs/…?" of the run beside `folder` that is called most like it, or nothing."""
    beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
    runs = sorted(f.name for f in beside if (f / "recipe.yaml").is_file())
    found = difflib.get_close_matches(folder.name, runs, n=1)
    return f"; did you mean {folder.parent / found[0]}?" if found else ""


def load_run(folder: str | Path, **overrides: Any) -> Run:
    """The run in `folder`. `overrides`: options of the recipe that are different here, those of `ELSEWHERE`.

    Raises UserError for other overrides, when the folder is not a finished run, a file of it is damaged, or its feature
    space is not in the store. A run of a version that wrote no digests loads with a Notice.
    """
    if other := sorted(overrides.keys() - set(ELSEWHERE)):
        raise UserError(f"{other[0]}: a run is read as it was trained; what may differ here: {', '.join(ELSEWHERE)}")
    folder = Path(folder)
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder}: not a run folder, it has no recipe.yaml{_alike(folder)}")
    if not (folder / TUNER).is_file():
        again = f"pipeline train --recipe {quoted(str(folder / 'recipe.yaml'))} --out {quoted(str(folder))}"
        raise UserError(f"{folder}: the run has no trained tuner yet; run: {again}")
    kept = read_recipe(folder / "recipe.yaml", record=True)
    moved = {"imports": imports} if (imports := overrides.pop("imports", None)) is not None else {}
    recipe = recipe_of("train", (str(folder / "recipe.yaml"), kept), ("load_run()", moved), record=True)
    recipe = replace(recipe, limit=None, views=None, **{k: v for k, v in overrides.items() if v is not None})
    state, about = load_checkpoint(folder / TUNER)
    told = {} if slots_of(recipe) else tuner_class(recipe.tuner).kept_options(state)
    recipe = replace(recipe, tuner_options={**told, **recipe.tuner_options})
    try:
        job = open_job(recipe, about.get("rows"), about.get("space"))
    except StoreError as error:
        raise StoreError(f"{folder}: {error}") from None
    for name, trained, told in other_options(about.get("chosen") or {}, own_options(job)):
        raise UserError(
            f"{folder}: recipe.yaml says {name} {told!r}, {TUNER} was trained with {trained!r}: they are of two runs; "
            "restore one of them, or train again"
        )
    model = job.model()
    check(state, model.trainable_state(), folder / TUNER)
    model.load_trainable(state)
    return Run(folder, job, model.to(job.device))


def file_names(images: Sequence[str]) -> list[str]:
    """What files made of `images` are called: as these, without the suffix where that leaves them distinct, and with a
    number where nothing else does."""
    paths = [PurePosixPath(image.replace("\\", "/")) for image in images]
    plain = [str(path.with_suffix("")) for path in paths]
    if any(path.is_absolute() or ".." in path.parts for path in paths):
        plain = [path.stem for path in paths]
    seen = Counter(dict(zip(paths, plain, strict=True)).values())
    named: dict[PurePosixPath, str] = {}
    taken: set[str] = set()
    for path, name in zip(paths, plain, strict=True):
        if path not in named:
            first = name if seen[name] == 1 else f"{name}{path.suffix}"
            numbered = (f"{first}-{number}" for number in count(2))
            named[path] = next(name for name in chain([first], numbered) if name not in taken)
            taken.add(named[path])
    return [named[path] for path in paths]


def refuse_data(data: str | None, given: Path, job: Job | Joint | Mixture) -> None:
    """UserError where `data` is no folder, or nothing is named from it: no backbone reads images, or `given` is an
    image or a folder of them."""
    if data is None:
        return
    if not Path(data).is_dir():
        raise UserError(f"--data {data}: no such folder")
    if not any(b.modality == "image" for b in job.backbones) or given.is_dir() or given.suffix.lower() in PICTURES:
        raise UserError("--data: it is the folder of images that a table names, and there are none here")


def read_rows(
    path: Path, job: Job | Joint | Mixture, text: str | None = None, text_pair: str | None = None
) -> tuple[list[Any], Any]:
    """`read_inputs` for what `Run.predict` takes: of a run with several backbones slot → rows. `text` and `text_pair`
    may then be SLOT=COLUMN,…"""
    if not isinstance(job, Joint):
        return read_inputs(path, job.spec, text, text_pair)
    ids: list[Any] = []
    rows = {}
    asked = replace(job.recipe, text=text, text_pair=text_pair, image=None)
    for slot, part in parts_of(asked).items():
        with of_slot(slot):
            ids, rows[slot] = read_inputs(path, job.jobs[slot].spec, part.text, part.text_pair)
    return ids, rows


def read_inputs(
    path: Path, spec: TaskSpec, text: str | None = None, text_pair: str | None = None
) -> tuple[list[Any], list[tuple[str, ...]]]:
    """Ids and fields of a file's rows. An id is what stands in a column `id`; where nothing does, the row's number from
    1, or the name of an image. Fields: columns named by `text` and `text_pair`, or by the task's own field names.

    GLUE's files are understood in their own layout; a folder gives the images below it, an image itself. Raises
    UserError for a missing column or text, a bad file or a folder without images.
    """
    if path.is_dir():
        if not (found := image_files(path)):
            raise UserError(f"{path}: there are no images in this folder")
        names = [p.relative_to(path).as_posix() for p in found]
        return names, [(name,) for name in names]
    if path.suffix.lower() in PICTURES and path.is_file():
        return [path.name], [(path.name,)]
    glue = GLUE.get(spec.name)
    sheet = read_sheet(path)
    if glue and glue.header and text is None and not set(spec.fields) <= set(sheet.columns):
        sheet = read_sheet(path, list(glue.header))
    columns = []
    for i, field in enumerate(spec.fields):
        asked = (text, text_pair)[i]
        also = tuple(names[0] for names in glue.columns[i : i + 1]) if glue and glue.columns else ()
        name = asked or next((n for n in (field, *also) if n in sheet.columns), field)
        read = conversation_text if form_of(spec) == "messages" else cell_text
        columns.append([read(sheet, row, value, name) for row, value in enumerate(sheet.column(name))])
    rows = [tuple(row) for row in zip(*columns, strict=True)]
    named = sheet.column("id") if "id" in sheet.columns else [None] * len(rows)
    return [place if name in (None, "") else name for place, name in enumerate(named, 1)], rows
