"""`fit`: train a tuner, keep its best epoch, survive a kill.

At the start, after every `checkpoint_every` steps and every epoch `resume.safetensors` holds the weights, the
optimizer, the place (epoch, batch, step) and the blocks that samples stood in at the start. Randomness is reseeded from
(seed, step) before each step and the order of samples follows from (seed, epoch) and those blocks, so a run that was
killed anywhere and started again, also on a store that was compacted since, gives the losses of one that was not, bit
for bit on the same machine. Price of a checkpoint: four times the trainable parameters in float32, written and synced.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.extract.batch import Batch
from pipeline.store.errors import UserError
from pipeline.train.data.source import Source
from pipeline.train.data.targets import Targets
from pipeline.train.evaluate import Trainable, autocast, evaluate
from pipeline.train.fit import run_files as checkpoint
from pipeline.train.fit.at_work import refuse_lost
from pipeline.train.fit.finite import NotFinite
from pipeline.train.fit.log import RunLog, finite, write_json
from pipeline.train.fit.optimizer import adamw, reseed
from pipeline.train.fit.options import FitOptions
from pipeline.train.fit.ranks import Ranks
from pipeline.train.fit.schedule import scheduler
from pipeline.train.fit.signals import Interrupt, Interrupted
from pipeline.train.fit.state import State, refuse_other_run
from pipeline.train.fit.together import fit_all
from pipeline.train.objectives.base import Scorer

__all__ = ["FitOptions", "Interrupted", "NotFinite", "Trainable", "Training", "evaluate", "fit"]


def fit(
    model: nn.Module,
    train_source: Source,
    validation_source: Source | None,
    test_source: Source | None,
    options: FitOptions,
    run_dir: str | Path,
    scorer: Callable[[], Scorer],
    device: torch.device | str = "cpu",
    progress: bool = True,
    resume: bool = True,
    info: Mapping[str, Any] | None = None,
    record: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train `model` (see `Trainable`) and return what also goes to `run_dir/metrics.json`.

    The epoch with the best validation figures (`Scorer.value`) is restored at the end and scored on `test_source`;
    without a validation source that is the last epoch. `scorer()` gives a fresh scorer. With `resume`, a
    `resume.safetensors` in `run_dir` is continued; it is removed when training is done. `info` goes into the header of
    `tuner.safetensors`. `record` is called when nothing more is refused and what stood in `run_dir` of another run is
    gone: it may write there what the run is made with. Raises NotFinite, Interrupted (the run can be resumed),
    UserError for options or files that do not fit.
    """
    training = Training(
        model, train_source, validation_source, test_source, options, Path(run_dir), scorer, torch.device(device),
        info, record,
    )  # fmt: skip
    (result,) = fit_all([training], progress, resume)
    if isinstance(result, NotFinite):
        raise result
    return result


class Training:
    """One run: a model, what it is trained on and how, and where it stands. It is handed batches, see `fit_all`.

    `targets`: by split, what the model learns of the samples where the batches it is handed hold something else, or
    nothing. `alike`: equal for runs whose models are one function of their batches and parameters, which may then step
    as one (`train.fit.stack`); "" for one that steps alone.
    """

    log: RunLog
    interrupt: Interrupt
    targets: Mapping[str, Targets] | None = None
    alike: str = ""

    def __init__(
        self,
        model: nn.Module,
        train: Source,
        validation: Source | None,
        test: Source | None,
        options: FitOptions,
        run_dir: Path,
        scorer: Callable[[], Scorer],
        device: torch.device,
        info: Mapping[str, Any] | None = None,
        record: Callable[[], None] = lambda: None,
    ) -> None:
        self.ranks = Ranks.from_environment()
        self.saved = run_dir / checkpoint.RESUME
        if self.ranks.rank:
            # The others train alike and write where nobody looks.
            self.elsewhere = tempfile.TemporaryDirectory()
            run_dir = Path(self.elsewhere.name)
        self.model: Any = model.to(device)
        self.train, self.validation, self.test = train, validation, test
        self.options, self.run_dir, self.scorer, self.device = options, run_dir, scorer, device
        self.info, self.record = dict(info or {}), record
        if not len(train):
            raise UserError("the training split has no samples: give another split or a larger limit")
        self.optimizer, self.names = adamw(model, options)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        trained = model.trainable_state() if self.ranks.world > 1 else {}  # type: ignore[operator]
        self.buffers = [buffer for name, buffer in model.named_buffers() if name in trained]
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.precision == "float16")
        self.total = options.steps(len(train))
        self.state = State()
        self.best: dict[str, Tensor] = {}
        self.loss = math.nan  # of the latest step
        self.group: list[Batch] = []  # of the optimizer step to come
        self._spent = self._waited = 0.0  # seconds on the batches of this group

    def begin(self, resume: bool, interrupt: Interrupt) -> None:
        """Make the folder ready, or take up what stands in it."""
        self.interrupt = interrupt
        refuse_lost(self.run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        found = resume and self.saved.exists() and self.restore(self.saved)
        self.ranks.wait()  # Before rank 0 changes what the others read.
        if not found:
            for name in (checkpoint.RESUME, checkpoint.TUNER, "metrics.json"):
                (self.run_dir / name).unlink(missing_ok=True)
        self.record()
        state, options = self.state, self.options
        warmup = options.warmup(self.total)
        self.schedule = scheduler(self.optimizer, options.schedule, warmup, self.total, step=state.step)
        self.log = RunLog(self.run_dir, state, () if self.ranks.rank else options.reporters, self.identity())
        if resume and not found:
            self.save(begun=False)  # the layout of the start, should the store be compacted before the next checkpoint
        self.model.train()

    @property
    def place(self) -> tuple[int, int]:
        """Epoch and batch, from 0, that it is to be handed next."""
        return self.state.epoch, self.state.batch + len(self.group)

    @property
    def epoch_over(self) -> bool:
        """Whether the epoch it stands in has no step left."""
        return self.state.step == self.total or self.state.batch == len(self.train)

    @property
    def epochs(self) -> int:
        """Epochs that it goes through unless it stops early; the last may be cut short."""
        return -(-self.total // self.steps_an_epoch)

    @property
    def steps_an_epoch(self) -> int:
        """Optimizer steps of a whole epoch."""
        return -(-len(self.train) // self.options.accumulate)

    def add(self, batch: Batch, seconds: float, sharing: int) -> bool:
        """The batch at `place`. Whether it is the last one of its group, so that a step is due. `seconds`: what it took
        to get it. `sharing`: how many runs are handed it, each of which bears its share of that time."""
        self.group.append(batch)
        self._waited += batch.wait_seconds / sharing
        self._spent += seconds / sharing
        return len(self.group) == self.options.accumulate or self.state.batch + len(self.group) == len(self.train)

    def made(self, entry: dict[str, Any], seconds: float) -> None:
        """The step of the group is made, in `seconds`; `entry`: what is logged of it."""
        state = self.state
        state.step, state.batch = state.step + 1, state.batch + len(self.group)
        self.group = []
        self._spent += seconds
        entry |= {"seconds": self._spent, "wait_seconds": self._waited}
        state.seconds += self._spent
        state.wait_seconds += self._waited
        self._spent = self._waited = 0.0
        self.log.step(entry)
        self.loss = entry["loss"]
        if state.step % self.options.checkpoint_every == 0 and not self.epoch_over:
            self.save()

    def view(self, batch: Batch, split: str) -> Batch:
        """`batch` of `split` with the targets that this run learns, where it holds others."""
        targets = None if self.targets is None else self.targets.get(split)
        if targets is None:
            return batch
        own = replace(batch, targets=None)
        targets.fill(own, own.index, own.device)
        return own

    def step(self, group: list[Batch]) -> dict[str, Any]:
        """One optimizer step on the mean loss over all of `group`."""
        state, options = self.state, self.options
        number, lr = state.step + 1, self.optimizer.param_groups[0]["lr"]
        reseed(options.seed + 1_000_003 * self.ranks.rank, state.step, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        self.model.begin_step(state.step, self.total, self.steps_an_epoch)
        # This rank's share of a last batch may be empty.
        group = [batch.to(self.device) for batch in group if len(batch)]
        weights = [self.model.weight(batch) for batch in group]
        total = sum(weights)
        mean, trouble = 0.0, ""
        for batch, weight in zip(group, weights, strict=True):
            share = weight / total if total else 0.0
            with autocast(self.device, options.precision):
                loss = self.model.loss(batch)
            value = float(loss.detach())
            if not math.isfinite(value):
                trouble = f"the loss is {value}"
                break
            self.scaler.scale(loss if len(group) == 1 else loss * share).backward()
            mean += value * share
        # A rank that stopped alone would leave the others waiting for its gradients.
        if self.ranks.any(bool(trouble), self.device):
            raise NotFinite(self.advice(trouble or "another rank's loss is not finite", number, lr))
        mean, self.interrupt.asked = self.ranks.average(self.parameters, total, mean, self.interrupt.asked)
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, options.clip or math.inf))
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise NotFinite(self.advice(f"the gradient's norm is {norm}", number, lr))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.ranks.share(self.buffers)
        self.model.stepped()
        self.schedule.step()
        return self.entry(number, mean, lr, norm)

    def entry(self, number: int, loss: float, lr: float, norm: float) -> dict[str, Any]:
        """What is logged of step `number`."""
        return {"step": number, "epoch": self.state.epoch + 1, "loss": loss, "lr": lr, "grad_norm": norm}

    def advice(self, what: str, number: int, lr: float) -> str:
        options = self.options
        precise = "" if options.precision == "float32" else f", precision float32 instead of {options.precision}"
        clip = ", clip 1.0" if not options.clip else ""
        return (
            f"{what} at step {number} (epoch {self.state.epoch + 1}, lr {lr:.3g}); training stopped before this step: "
            f"try a smaller lr than {options.lr:g}, a longer warm-up{clip}{precise}"
        )

    @property
    def due(self) -> bool:
        """Whether the end of this epoch is to be scored on the validation split."""
        options = self.options
        every = (self.state.epoch + 1) % options.eval_every == 0
        return self.validation is not None and (self.last_epoch or every)

    @property
    def last_epoch(self) -> bool:
        return self.state.epoch + 1 == self.options.epochs or self.state.step == self.total

    def close_epoch(self, metrics: dict[str, float] | None, seconds: float) -> None:
        """Remember the best, move on to the next epoch or stop. `metrics`: of the validation split where `due`, which
        took `seconds`."""
        state, options, last = self.state, self.options, self.last_epoch
        if metrics is not None:
            state.evaluations += 1
            told = {"step": state.step, "epoch": state.epoch + 1, "validation": metrics, "seconds": seconds}
            self.log.evaluation(told)
            state.since_best += 1
            if state.best_epoch is None or self.better(metrics):
                self.keep(metrics)
            if options.patience is not None and state.since_best >= options.patience:
                state.stopped = "patience"
        elif self.validation is None and last:
            self.keep({})
        if last:
            state.stopped = "max_steps" if state.epoch + 1 < options.epochs or state.batch < len(self.train) else "done"
        state.epoch, state.batch = state.epoch + 1, 0
        self.save()

    def better(self, metrics: dict[str, float]) -> bool:
        """A NaN is never better than a figure. Where no epoch has one (JSON gave NaN back as None) the last stands, as
        where nothing is measured."""
        scorer = self.scorer()
        new, best = scorer.value(metrics), scorer.value(self.state.best)
        return math.isnan(best) or new > best

    def keep(self, metrics: dict[str, float]) -> None:
        """The present weights are the best so far."""
        state = self.state
        state.best_epoch, state.best, state.since_best = state.epoch + 1, metrics, 0
        self.best = {name: t.detach().cpu().clone() for name, t in self.model.trainable_state().items()}
        self.write_best()

    def write_best(self) -> None:
        """`tuner.safetensors` as of the best epoch so far."""
        state, epoch = self.state, self.state.best_epoch
        step = min(state.step, (epoch or 0) * self.steps_an_epoch)
        about = {"layout": self.train.order.layout(), "epoch": epoch, "step": step, "validation": finite(state.best)}
        checkpoint.save_tuner(self.run_dir / checkpoint.TUNER, self.best, {**self.info, **about})

    def restore_best(self) -> None:
        """Back to the best epoch."""
        self.model.load_trainable(self.best)
        # Of a resumed run the file is from before: gone or damaged since, perhaps. What is scored is what is kept.
        self.write_best()

    def finish(self, test: dict[str, float] | None) -> dict[str, Any]:
        """Write metrics.json; `test`: the scores of the test split, by the weights of the best epoch."""
        state = self.state
        if test is not None:
            self.log.evaluation({"step": state.step, "epoch": state.best_epoch, "test": test})
        result = {
            "best_epoch": state.best_epoch,
            "validation": state.best or None,
            "test": test,
            "trainable_parameters": sum(p.numel() for p in self.parameters),
            "epochs": state.epoch,
            "steps": state.step,
            "stopped": state.stopped,
            "layout": self.train.order.layout(),
            "seconds": state.seconds,
            "seconds_per_epoch": state.seconds / max(1, state.step) * self.steps_an_epoch,
            "wait_share": state.wait_seconds / state.seconds if state.seconds else 0.0,
        }
        refuse_lost(self.run_dir)
        write_json(self.run_dir / "metrics.json", result)
        (self.run_dir / checkpoint.RESUME).unlink(missing_ok=True)
        return finite(result)

    def abandon(self) -> None:
        """Of a run that is not finite: resuming would end here again, and only stand in the way of other options."""
        refuse_lost(self.run_dir)
        (self.run_dir / checkpoint.RESUME).unlink(missing_ok=True)

    def save(self, begun: bool = True) -> None:
        """Write the checkpoint; `begun`: whether it may be one of a step, which is not given up for other options."""
        self.state.scaler, self.state.log = self.scaler.state_dict(), self.log.written()
        checkpoint.save_run(
            self.run_dir / checkpoint.RESUME,
            {
                "model": self.model.trainable_state(),
                "best": self.best,
                "optimizer": checkpoint.optimizer_state(self.optimizer, self.names),
                "layout": {n: torch.from_numpy(s.order.block.astype("int32")) for n, s in self.sources().items()},
            },
            {
                "state": finite(asdict(self.state)),
                "run": {**self.identity(), "order": self.train.order.digest()},
                "begun": begun,
            },
        )

    def restore(self, path: Path) -> bool:
        """Undo `save`. Raises UserError naming an option that has changed since; False instead for a run that had not
        begun, since nothing is lost by starting anew."""
        parts, about = checkpoint.load_run(path)
        try:
            state, saved = State(**about["state"]), dict(about["run"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{path} is not a checkpoint of this version ({error}): choose another --out") from None
        layout = {name: block.numpy().astype("int64") for name, block in parts["layout"].items()}
        try:
            self.refuse_other(saved, layout)
        except UserError:
            if about.get("begun", True):
                raise
            return False
        for name, block in layout.items():
            if not np.array_equal(self.sources()[name].order.block, block):
                self.sources()[name].follow(block)
        checkpoint.check(parts["model"], self.model.trainable_state(), path)
        self.model.load_trainable(parts["model"])
        checkpoint.load_optimizer_state(self.optimizer, self.names, parts["optimizer"])
        self.scaler.load_state_dict(state.scaler)
        self.state, self.best = state, parts["best"]
        return True

    def refuse_other(self, saved: Mapping[str, Any], layout: Mapping[str, np.ndarray]) -> None:
        """UserError where the run `saved` over the blocks `layout` is not this one on whatever blocks. A checkpoint of
        an older version has no layout, and its order must be that of now."""
        refuse_other_run(saved, self.identity(), self.run_dir)
        sources = self.sources()
        for name in dict.fromkeys((*sources, *layout)) if layout else ():
            now, then = sources[name].n if name in sources else 0, len(layout.get(name, ()))
            if now != then:
                said = f"{self.run_dir} holds an unfinished run with {then:,} {name} samples, now {now:,}"
                raise UserError(f"{said}: choose another --out")
        order = replace(self.train.order, block=layout.get("train", self.train.order.block))
        refuse_other_run(saved, {"order": order.digest()}, self.run_dir)

    def sources(self) -> dict[str, Source]:
        """The sources there are, by split."""
        found = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: source for name, source in found.items() if source is not None}

    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to be resumed, as JSON gives it back."""
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self.options).items()}
        order = self.train.order
        return {**options, "samples": order.n, "batch_size": order.batch_size, "order_seed": order.seed, **self.info}
