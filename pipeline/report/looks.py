"""What a report measures of a run by running it: features before and after training's part, the cost of inference."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.commands.compare import backbone_parameters, step_memory
from pipeline.extract.batch import Batch
from pipeline.jobs.job import Job
from pipeline.terminal import size_text
from pipeline.train.evaluate import closing
from pipeline.train.model import Model

POINTS = 400  # samples of a map of features


@dataclass
class Maps:
    """t-SNE maps of the same samples. `before`, `after`: (n, 2); `classes`: (n,) of each sample; `names`: of classes;
    `about`: what stands before and after."""

    before: np.ndarray
    after: np.ndarray
    classes: np.ndarray
    names: Sequence[str]
    about: str


def maps_of(model: Model, batches: Iterable[Batch], names: Sequence[str]) -> Maps | None:
    """Maps of the features of the first `POINTS` samples; None for targets that are no class, or too few samples."""
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    model.eval()
    with torch.inference_mode():
        for batch in batches:
            if batch.targets is None or "label" not in batch.targets:
                return None
            before, after = model.tuner.around(batch)
            found.append((before.float().cpu(), after.float().cpu(), batch.targets["label"].cpu()))
            if sum(len(labels) for *_, labels in found) >= POINTS:
                break
    if sum(len(labels) for *_, labels in found) < 10:
        return None
    rows = [torch.cat(part)[:POINTS].numpy() for part in zip(*found, strict=True)]
    return Maps(_flat(rows[0]), _flat(rows[1]), rows[2], names, model.tuner.around_what)


def _flat(features: np.ndarray) -> np.ndarray:
    """(n, width) → (n, 2) by t-SNE, the same in every report."""
    from sklearn.manifold import TSNE

    spread = features.std(0).max()
    if not np.isfinite(features).all() or spread == 0:
        return np.zeros((len(features), 2), np.float32)
    perplexity = min(30.0, (len(features) - 1) / 3)
    return np.asarray(TSNE(2, perplexity=perplexity, init="pca", max_iter=500, random_state=0).fit_transform(features))


class Clock:
    """Seconds and, on a GPU, the peak of memory of what is done within `measured`."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.peak = device, 0.0, 0.0

    @contextmanager
    def measured(self) -> Any:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        begun = time.perf_counter()
        yield
        self.seconds = time.perf_counter() - begun
        if cuda:
            self.peak = float(torch.cuda.max_memory_allocated(self.device))


def cost_facts(job: Job, model: Model, split: str, clock: Clock, samples: int) -> list[tuple[str, str]]:
    """Memory and time of a run: name, value. `clock` has timed the predictions of `samples`. The model has gradients
    afterwards. On a CPU memory is counted, on a GPU measured."""
    with closing(job.source(split).sequential()) as batches:
        batch = next(iter(batches)).to(job.device)
    tail = model.tuner.tail
    weights = sum(t.nbytes for part in (model, tail) for t in (*part.parameters(), *part.buffers()))
    held = sum(t.nbytes for t in (*batch.states.values(), *batch.columns.values()))
    how = "measured" if clock.peak else "counted"
    inference = clock.peak or float(weights + held)
    training = step_memory(model, batch, [tail])
    backbone = 4 * backbone_parameters(job.found.backbone)
    return [
        ("inference from stored states", f"{1e3 * clock.seconds / max(1, samples):.2f} ms a sample on {_name(job)}, "
         f"batches of {len(batch)}, reading included"),
        (f"memory of it, {how}", f"{size_text(inference)}: tuner and live end {size_text(weights)}, the batch"),
        (f"memory of a training step, {how}", size_text(training)),
        ("on inputs never seen", f"the backbone beside it: {size_text(backbone)} of weights in float32"),
    ]  # fmt: skip


def _name(job: Job) -> str:
    if job.device.type == "cuda":
        return torch.cuda.get_device_name(job.device)
    return f"a CPU, {torch.get_num_threads()} threads"
