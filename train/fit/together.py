"""`fit_all`: several runs trained in one pass over their samples. A batch is read, decoded and moved once, and every
run that stands at it makes its step on it: those of equal shape as one (`train.fit.stack`), others in turn.

Each run is what it would be alone: weights, optimizer, schedule and checkpoints are its own, and randomness is reseeded
from its own (seed, step) before each of its steps. A run whose loss is not finite leaves; the others go on.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from pipeline.extract.batch import Batch
from pipeline.extract.kernels.memory import keep_freed_memory, return_freed_memory
from pipeline.store.progress import Bar as tqdm
from pipeline.train.evaluate import Scoring, closing, evaluate_all
from pipeline.train.fit.at_work import held, refuse_lost
from pipeline.train.fit.finite import NotFinite
from pipeline.train.fit.signals import Interrupt, Interrupted
from pipeline.train.fit.stack import Stacks, measuring

if TYPE_CHECKING:
    from pipeline.train.fit.loop import Training

T = TypeVar("T")


Judge = Callable[[Sequence["Training"]], Sequence["Training"]]


def fit_all(
    runs: Sequence[Training], progress: bool = True, resume: bool = True, judge: Judge | None = None
) -> list[dict[str, Any] | NotFinite]:
    """Train all of `runs`, which share their sources and their device; see `fit`. Returns what each ended with, in
    order: its metrics, or why it could not go on. Of several runs the metrics tell, too: `stacked`, how many stepped as
    one with it at most, itself included; `in_turn`, why it did not step as one with those that are alike, None where it
    did.

    `judge`: told of the runs that go on whenever epochs have ended; those it returns stop there as losers. With
    `resume`, each goes on where its checkpoint stands; the pass begins with the batch that the first of them is to
    have. Raises Interrupted when all have been saved, UserError for options or files that do not fit.
    """
    ranks, device = runs[0].ranks, runs[0].device
    keep_freed_memory()
    ranks.begin(device)
    forked = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=forked), Interrupt() as interrupt, ExitStack() as open_logs:
            for run in runs:
                open_logs.callback(_closing(run))
            at_once(runs, lambda run: run.begin(resume, interrupt))
            together = _Together(runs, interrupt, progress and ranks.rank == 0, judge)
            open_logs.callback(together.bar.close)
            return together.train()
    finally:
        ranks.end()
        return_freed_memory()


class _Together:
    """Runs that have begun. `active`: those that have not ended; `ended`: what the others ended with."""

    def __init__(
        self, runs: Sequence[Training], interrupt: Interrupt, progress: bool, judge: Judge | None = None
    ) -> None:
        self.runs, self.interrupt, self.judge = runs, interrupt, judge
        self.active, self.ended = list(runs), dict[Any, dict[str, Any] | NotFinite]()
        self.stacks, self.largest = Stacks(), dict.fromkeys(runs, 1)
        self.bar = tqdm(
            total=sum(run.total for run in runs),
            initial=sum(run.state.step for run in runs),
            disable=not progress,
            unit="step",
            file=sys.stderr,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
        )

    def train(self) -> list[dict[str, Any] | NotFinite]:
        if self.settle():
            first, start = min(run.place for run in self.active)
            end = max(run.epochs for run in self.active)
            with closing(self.runs[0].train.epochs(first, end, start)) as stream:
                self.follow(stream, first, start)
        return [self.ended[run] for run in self.runs]

    def follow(self, stream: Iterator[Batch], epoch: int, start: int) -> None:
        """Hand out the batches of `stream`, which begins with batch `start` of `epoch`, until every run has ended."""
        batches = len(self.runs[0].train)
        at, seconds = epoch * batches + start, 0.0
        while self.settle():
            first, start = min(run.place for run in self.active)
            begun = time.perf_counter()
            for batch in stream:  # noqa: B007 (the last one is what is looked for)
                at += 1
                if at > first * batches + start:
                    break
            batch = batch.to(self.runs[0].device)
            seconds = time.perf_counter() - begun
            here = [run for run in self.active if run.place == (first, start)]
            views = _Views(batch)
            made = sum(run.state.step for run in here)
            for group in self.stacks.groups(here):
                self.step(group, views.of(group[0], "train"), seconds, len(here))
            self.bar.update(sum(run.state.step for run in here) - made)
            self.bar.set_postfix(self.shown(here), refresh=False)
            self.check()

    def step(self, group: Sequence[Training], batch: Batch, seconds: float, sharing: int) -> None:
        """Hand `batch` to all of `group`, which step as one where there are several."""
        begun = time.perf_counter()
        due = [run.add(batch, seconds, sharing) for run in group]
        if not all(due):
            return
        entries = self.stacks.step(group) if len(group) > 1 else None
        if entries is not None:
            self.largest |= {run: max(len(group), self.largest[run]) for run in group}
            spent = (time.perf_counter() - begun) / len(group)
            for run, entry in zip(group, entries, strict=True):
                self.made(run, entry, spent)
            return
        for run in group:
            begun = time.perf_counter()
            try:
                made: dict[str, Any] | NotFinite = run.step(run.group)
            except NotFinite as error:
                made = error
            self.made(run, made, time.perf_counter() - begun)

    def made(self, run: Training, entry: dict[str, Any] | NotFinite, seconds: float) -> None:
        if isinstance(entry, NotFinite):
            self.drop(run, entry)
        else:
            run.made(entry, seconds)

    def shown(self, here: Sequence[Training]) -> dict[str, Any]:
        known = {"epoch": here[0].place[0] + 1, "loss": f"{min(run.loss for run in here):.4f}"}
        return known if len(self.runs) == 1 else {**known, "runs": len(self.active)}

    def settle(self) -> bool:
        """Close the epochs that are over and finish the runs that have stopped. Whether any goes on."""
        over = [run for run in self.active if run.state.stopped is None and run.epoch_over]
        begun = time.perf_counter()
        scores = self.scores([run for run in over if run.due], "validation")
        seconds = (time.perf_counter() - begun) / max(1, len(scores))
        at_once([run for run in over if run in self.active], lambda run: run.close_epoch(scores.get(run), seconds))
        if scores and not self.bar.disable:
            self.bar.write(_told(scores), file=sys.stderr)
        for run in self.judge([r for r in self.active if r.state.stopped is None]) if self.judge else ():
            run.state.stopped = "halving"
        stopped = [run for run in self.active if run.state.stopped is not None]
        at_once(stopped, lambda run: run.restore_best())
        tested = self.scores(stopped, "test")
        ended = [run for run in stopped if run in self.active]
        for run, result in zip(ended, at_once(ended, lambda run: run.finish(tested.get(run))), strict=True):
            self.ended[run] = result if len(self.runs) == 1 else {**result, **self.how(run)}
            self.active.remove(run)
        return bool(self.active)

    def how(self, run: Training) -> dict[str, Any]:
        """How `run` stepped beside the others."""
        return {"stacked": self.largest[run], "in_turn": self.stacks.apart.get(run.alike)}

    def scores(self, runs: Sequence[Training], split: str) -> dict[Training, dict[str, float]]:
        """The figures of `runs` on a split, in one pass over it; none where there is no such split."""
        source = getattr(self.runs[0], split)
        if source is None or not runs:
            return {}
        views = _Views()
        one = measuring({run: run.alike for run in runs})
        ways = [
            Scoring(run.model, run.scorer(), run.options.precision, partial(views.view, run, split), stacked=one[run])
            for run in runs
        ]
        found: dict[Training, dict[str, float]] = {}
        ended = self.runs[0].ranks.agree(evaluate_all(ways, source, self.runs[0].device, self.check))
        for run, figures in zip(runs, ended, strict=True):
            if isinstance(figures, NotFinite):
                self.drop(run, figures)
            else:
                found[run] = figures
        return found

    def drop(self, run: Training, error: NotFinite) -> None:
        """`run` cannot go on."""
        run.abandon()
        self.ended[run] = error
        self.active.remove(run)
        self.bar.total = (self.bar.total or 0) - (run.total - run.state.step)

    def check(self) -> None:
        """Between two batches: stop here if asked to, or if a beat found a folder taken over."""
        if any(note.lost for note in held()):
            for run in self.active:
                refuse_lost(run.run_dir)
        if not self.interrupt.asked or not self.active:
            return
        at_once(self.active, lambda run: run.save())
        run = self.active[0]
        what = run.run_dir if len(self.runs) == 1 else f"{len(self.active)} of {len(self.runs)} runs"
        raise Interrupted(
            f"interrupted at step {run.state.step} of {run.total}; {what} can be resumed: give the same command again"
        )


def at_once(runs: Sequence[Training], do: Callable[[Training], T]) -> list[T]:
    """`do` with every run: what each writes is synced to the disk, for which they wait together."""
    if len(runs) < 2:
        return [do(run) for run in runs]
    with ThreadPoolExecutor(min(16, len(runs)), "files-of-run") as pool:
        return list(pool.map(do, runs))


def _closing(run: Training) -> Callable[[], None]:
    """What ends the log of a run, where that has begun."""
    return lambda: run.log.close() if hasattr(run, "log") else None


class _Views:
    """The batch as each run is to see it: the same states, the targets that its own objective learns."""

    def __init__(self, batch: Batch | None = None) -> None:
        self.batch, self._made = batch, dict[int | None, Batch]()

    def view(self, run: Training, split: str, batch: Batch) -> Batch:
        """`batch`, which may be another than before, as `run` is to see it."""
        if batch is not self.batch:
            self.batch = batch
            self._made.clear()
        return self.of(run, split)

    def of(self, run: Training, split: str) -> Batch:
        assert self.batch is not None
        key = None if run.targets is None else id(run.targets.get(split))
        if key not in self._made:
            self._made[key] = run.view(self.batch, split)
        return self._made[key]


def _told(scores: dict[Training, dict[str, float]]) -> str:
    """One line of the best of these."""
    run = max(scores, key=lambda run: run.scorer().value(scores[run]))
    metrics = scores[run]
    kept = {k: v for k, v in metrics.items() if k != "average" or len(metrics) != 2}
    shown = "  ".join(f"{k} {'undefined' if math.isnan(v) else f'{v:.4f}'}" for k, v in kept.items())
    best = "" if len(scores) == 1 else f"best of {len(scores)} runs, {run.run_dir.name}: "
    return f"epoch {run.state.epoch}/{run.options.epochs}  {best}{shown}"
