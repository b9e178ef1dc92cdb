"""Several training processes, as `torchrun` starts them: each reads its share of every batch, gradients are averaged.

The environment says which process this is (RANK, WORLD_SIZE, LOCAL_RANK). Every gradient is weighted by what it comes
from, so the step is the one that a single process would make, up to rounding. Only rank 0 writes to the run's
folder; all ranks evaluate alike, and go by the figures of rank 0.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from pipeline.store.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process is `rank` of `world`."""

    rank: int = 0
    world: int = 1

    @classmethod
    def from_environment(cls) -> Ranks:
        """What torchrun says; one process alone without it. Raises UserError for numbers that make no sense."""
        try:
            rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        except ValueError:
            raise UserError("RANK and WORLD_SIZE in the environment must be integers, as torchrun sets them") from None
        if not 0 <= rank < world:
            raise UserError(f"RANK={rank} WORLD_SIZE={world} in the environment: start the processes with torchrun")
        return cls(rank, world)

    def begin(self, device: torch.device) -> None:
        """Meet the other processes: over NCCL on GPUs, else gloo. Nothing where there is one process."""
        if self.world == 1 or dist.is_initialized():
            return
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")

    def end(self) -> None:
        """Leave the group."""
        if self.world > 1 and dist.is_initialized():
            dist.destroy_process_group()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def any(self, mine: bool, device: torch.device) -> bool:
        """Whether it is so on any rank."""
        if self.world == 1:
            return mine
        flag = torch.tensor(float(mine), device=device)
        dist.all_reduce(flag)
        return bool(flag)

    def average(self, parameters: Sequence[Tensor], weight: float, loss: float, stop: bool) -> tuple[float, bool]:
        """Replace each gradient by its mean over all ranks; a parameter that has none on any rank gets none, so that
        the optimizer leaves it alone, as in a single process.

        `weight`, `loss`: what this rank's batches count for (their samples, say), and their mean loss. Returns the mean
        loss over all, and whether any rank was asked to `stop`.
        """
        if self.world == 1:
            return loss, stop
        device = parameters[0].device
        own = [float(p.grad is not None) for p in parameters]
        facts = torch.tensor([loss * weight if weight else 0.0, weight, stop, *own], dtype=torch.float64, device=device)
        dist.all_reduce(facts)
        summed, counted, stopped, *known = facts.tolist()
        total = counted or 1.0  # all batches may count for nothing: then so does the step
        moved = [p for p, ranks in zip(parameters, known, strict=True) if ranks]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in moved]
        flat = torch.cat([g.reshape(-1).float() for g in grads] or [facts.new_zeros(0)]) * (weight / total)
        dist.all_reduce(flat)
        at = 0
        for parameter, grad in zip(moved, grads, strict=True):
            grad.copy_(flat[at : at + grad.numel()].view_as(grad))
            parameter.grad = grad
            at += grad.numel()
        return summed / total, bool(stopped)

    def agree(self, value: T) -> T:
        """Rank 0's `value`, on all ranks: what they decide by must be equal to the last bit."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, 0)
        return box[0]

    def share(self, buffers: Sequence[Tensor]) -> None:
        """Give all ranks the `buffers` of rank 0: running statistics, which each has of its own share of the batches,
        and by which all must evaluate alike."""
        for buffer in buffers if self.world > 1 else ():
            dist.broadcast(buffer, 0)
