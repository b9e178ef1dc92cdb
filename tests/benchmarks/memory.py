"""Peak memory of a training step, computed from tensors: cached and live SHERL, LoRA, full fine-tuning.

    python tests/benchmarks/memory.py [--shapes t5-base,t5-large,t5-3b] [--batch-size 100]
    python tests/benchmarks/memory.py --shapes llama-3.2-1b,qwen3-0.6b --batch-size 16      language models

Each step (forward, backward, clipping) runs on the meta device, where a tensor has a size but no memory, and
every storage is counted from its making to its end; so a model that does not fit this machine is counted as well. The
figure is what a device would hold: weights, gradients, Adam's moments, the batch, what the backward pass keeps and what
comes and goes within the step. The next batch and the blocks of a cached run wait in host memory and, like an
allocator's overhead, are not in it. RTE-length text: positions of the batch as a tokenizer trained on RTE
cuts it, else 77 on average.
"""

from __future__ import annotations

import argparse
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pipeline.cost.flops import NoValues, backbone_model, meta_batch, surrogate_loss, tuner_model
from pipeline.cost.known_shapes import known_config
from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.registry import backbone_for
from pipeline.lookup.objective import class_objective
from pipeline.terminal import table_text
from pipeline.train.baselines.methods import BaselineModel, baseline
from pipeline.train.objectives.linear_entropy import summed_entropy
from pipeline.train.tuners import tuner_class, tuner_config
from tests.benchmarks import results, setting

STEPS = 2  # the second one begins with what the first has left


class Storages(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, weakref.ref[Any]] = {}
        self.now = self.peak = 0

    def add(self, *tensors: Any) -> None:
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.alive:
                self.alive[key] = weakref.ref(storage, lambda _, key=key, size=size: self._end(key, size))
                self.now += size
                self.peak = max(self.peak, self.now)

    def _end(self, key: int, size: int) -> None:
        self.now -= size
        del self.alive[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add(*tree_leaves(out))
        return out


def step_of(model: Any, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """One step as the training loop makes it, but for the optimizer's arithmetic, which looks at values: its two
    moments of each trainable value are there from the beginning."""
    trained = [p for p in model.parameters() if p.requires_grad]
    moments = [torch.empty_like(p) for p in trained for _ in range(2)]

    def step() -> None:
        for parameter in trained:
            parameter.grad = None
        loss().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        moments[0].add_(0)  # alive until here

    step.moments = moments  # type: ignore[attr-defined]
    return step


def peak(resident: list[Any], step: Callable[[], None]) -> int:
    """Bytes at most while `step` runs; `resident`: modules and tensors that are there before it."""
    with counted([*resident, *step.moments]) as storages:  # type: ignore[attr-defined]
        for _ in range(STEPS):
            step()
    return storages.peak


@contextmanager
def counted(resident: list[Any]) -> Iterator[Storages]:
    with NoValues(), Storages() as storages:
        for item in resident:
            storages.add(*(item.parameters() if isinstance(item, nn.Module) else [item]))
            storages.add(*(item.buffers() if isinstance(item, nn.Module) else []))
        yield storages


def classes_of(backbone: Backbone) -> int:
    """Of a language model none: it learns the tokens of the text."""
    return 0 if backbone.continues_text else 2


def cached(backbone: Backbone, name: str, lengths: dict[str, np.ndarray], **options: Any) -> tuple[int, int]:
    """(peak bytes, trainable parameters) of a step on states at hand."""
    config = tuner_config(name, options)
    states = tuner_class(name, backbone).states(config, backbone)
    model = tuner_model(backbone, name, config, classes_of(backbone))
    batch = meta_batch(backbone, lengths, states, torch.float16)
    step = step_of(model, lambda: surrogate_loss(model, batch))
    return peak([model, model.tuner.tail, *batch.states.values()], step), model.trainable_parameters()


def live(backbone: Backbone, name: str, lengths: dict[str, np.ndarray]) -> tuple[int, int]:
    """The same with the backbone in the step."""
    config = tuner_config(name, {})
    states = tuner_class(name, backbone).states(config, backbone)
    model, frozen = tuner_model(backbone, name, config, classes_of(backbone)), backbone_model(backbone, "sdpa").float()

    def loss() -> torch.Tensor:
        batch = meta_batch(backbone, lengths, [])
        with torch.no_grad():
            batch.states = backbone.run(frozen, batch, states)
        return surrogate_loss(model, batch)

    return peak([model, model.tuner.tail, frozen], step_of(model, loss)), model.trainable_parameters()


def inside(backbone: Backbone, name: str, lengths: dict[str, np.ndarray]) -> tuple[int, int]:
    """A method that trains inside the backbone."""
    objective = class_objective(backbone, tuner_class("sherl"), ((0, 1), (1, 1))[: classes_of(backbone)])
    with torch.device("meta"):
        model = BaselineModel(baseline(name), backbone, backbone_model(backbone, "sdpa").float(), objective).train()
    batch = meta_batch(backbone, lengths, [])

    def loss() -> torch.Tensor:
        (rows,) = model(batch).values()
        tokens = torch.zeros(len(rows), dtype=torch.long, device="meta")
        if backbone.continues_text:
            return summed_entropy(rows, tokens, model.tuner.logits, backbone.config.vocab_size, name != "full")
        return F.cross_entropy(model.tuner.logits(rows).float(), tokens)

    return peak([model], step_of(model, loss)), model.trainable_parameters()


METHODS: dict[str, Callable[[Backbone, dict[str, np.ndarray]], tuple[int, int]]] = {
    "SHERL, cached": lambda f, n: cached(f, "sherl", n),
    "SHERL, cached, --recompute": lambda f, n: cached(f, "sherl", n, recompute=True),
    "SHERL, live": lambda f, n: live(f, "sherl", n),
    "LST, cached": lambda f, n: cached(f, "lst", n),
    "LST, live": lambda f, n: live(f, "lst", n),
    "LoRA, live": lambda f, n: inside(f, "lora", n),
    "full fine-tuning": lambda f, n: inside(f, "full", n),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="t5-base,t5-large,t5-3b")
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--dry", action="store_true", help="do not write RESULTS.md")
    args = parser.parse_args()
    texts, words = setting.positions(args.batch_size)
    rows = []
    for shape in args.shapes.split(","):
        backbone = backbone_for(known_config(shape))
        lengths = {"encoder": texts, "decoder": np.full(args.batch_size, 2, np.int64)}
        if backbone.continues_text:
            lengths = {"decoder": texts}
        found = {name: method(backbone, lengths) for name, method in METHODS.items()}
        reference, sherl = found["full fine-tuning"][0], found["SHERL, live"][0]
        for name, (size, trainable) in found.items():
            cells = (f"{trainable:,}", f"{size / 1e9:.2f}", f"{size / sherl:.3f}", f"{size / reference:.3f}")
            rows.append((shape, name, *cells))
            print(*rows[-1], flush=True)
    beside = "" if backbone.continues_text else ", two decoder positions"
    head = ["shape", "method", "trainable", "peak GB", "÷ live SHERL", "÷ full fine-tuning"]
    about = (
        f"Batch {args.batch_size}, {words}, {texts.mean():.1f} positions on average{beside}, float32, "
        "cached states in float16 as stored. Computed from tensors, not measured: every storage of a step on the meta "
        "device (see the file)."
    )
    print(f"\n{about}\n" + table_text(head, [list(r) for r in rows]))
    if not args.dry:
        command = " ".join(["python tests/benchmarks/memory.py", *sys.argv[1:]])
        title = "Training memory" + (", language models" if backbone.continues_text else "")
        results.write(title, command, f"{about}\n\n{results.markdown(head, rows)}")


if __name__ == "__main__":
    main()
