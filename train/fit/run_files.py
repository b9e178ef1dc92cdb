"""Files of a run: `tuner.safetensors` (the result) and `resume.safetensors` (all that a killed run needs to go on).

Both are safetensors files: tensors plus one JSON text in the header. Nothing is pickled. A file is written beside its
name, synced and renamed, so that a reader sees the old or the new one and never a part. A digest of all that is in it
stands in the header and is checked when it is read. Random-number states are not kept: the loop reseeds from
(seed, step) before every step, so they follow from the step count.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from pipeline.store.errors import Notice, UserError
from pipeline.store.format.digest import Digest, canonical_json
from pipeline.train.fit.at_work import refuse_lost

TUNER = "tuner.safetensors"
RESUME = "resume.safetensors"
_HEADER, _DIGEST = "pipeline", "xxh3"


def save(path: Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write `tensors` and the JSON-able `info` to `path`, atomically. Raises UserError when the disk refuses, or
    where the folder is no longer this process's."""
    refuse_lost(path.parent)
    kept = {name: t.detach().to("cpu").contiguous().clone() for name, t in tensors.items()}
    text = json.dumps(info)
    about = {_HEADER: text, _DIGEST: _digest(kept, text)}
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        save_file(kept, partial, metadata=about)
        partial.chmod(mode)  # newer safetensors lets the owner alone read it; a run is for the team
        replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error}; free some space or choose another --out") from error


def replace(partial: Path, path: Path) -> None:
    """Move the finished file `partial` over `path` so that it survives a crash of the machine. UserError where the
    folder is no longer this process's, see `at_work`; `partial` is then removed."""
    for folder_or_file, move in ((partial, True), (path.parent, False)):
        handle = os.open(folder_or_file, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        if move:
            try:
                refuse_lost(path.parent)  # after the sync, which may take long
            except UserError:
                partial.unlink(missing_ok=True)
                raise
            partial.replace(path)


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of `path`, on the CPU, and its info. Raises UserError for a missing, foreign or damaged file. A file
    from before there were digests is taken as it is, with a Notice."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if not {_HEADER} <= about.keys() <= {_HEADER, _DIGEST}:
            raise ValueError("its header is not that of a run's file")
        if _DIGEST in about and about[_DIGEST] != _digest(tensors, about[_HEADER]):
            raise ValueError("it differs from its digest")
        info = json.loads(about[_HEADER])
        if not isinstance(info, dict):
            raise ValueError("its header is not that of a run's file")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: is this a run folder, and did training get this far?") from None
    except (OSError, SafetensorError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is damaged or no safetensors file ({what}): copy it anew, or delete it and train"
        ) from error
    if _DIGEST not in about:
        warnings.warn(
            f"{path} is of an older version and has no digest: damage to this run's files would not be noticed",
            Notice,
            stacklevel=2,
        )
    return tensors, info


def _digest(tensors: Mapping[str, Tensor], info: str) -> str:
    """xxh3-128 of the info's text and of each tensor's name, type, shape and bytes, by name."""
    state = Digest(canonical_json(info))
    for name, tensor in sorted(tensors.items()):
        state.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
        state.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return str(state.hexdigest())


def save_tuner(path: Path, state: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """The trained parameters of a tuner, by name."""
    save(path, state, info)


def check(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Raises UserError naming the first tensors that are missing, unknown or of another shape than in the model."""
    hint = "was it trained with another tuner, backbone or task?"
    for what, names in (
        ("lacks", sorted(expected.keys() - tensors.keys())),
        ("holds unknown", sorted(tensors.keys() - expected.keys())),
    ):
        if names:
            some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise UserError(f"{path} {what} tensors {some}: {hint}")
    for name, want in expected.items():
        if tensors[name].shape != want.shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)} but the model needs {tuple(want.shape)}: {hint}"
            )


# Of a resumable checkpoint: present weights, best weights so far (may be empty), the optimizer's tensors, and for each
# split the block of each sample that the order of the run follows.
PARTS = ("model", "best", "optimizer", "layout")


def save_run(path: Path, parts: Mapping[str, Mapping[str, Tensor]], info: Mapping[str, Any]) -> None:
    """A resumable checkpoint: tensors by name for each of `PARTS`."""
    save(path, {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}, info)


def load_run(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Undo `save_run`: parts and info."""
    tensors, info = load(path)
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        if part not in parts:
            raise UserError(f"{path} is not a resumable checkpoint (it holds {name}): choose another --out")
        parts[part][rest] = tensor
    return parts, info


def optimizer_state(optimizer: Optimizer, names: list[str]) -> dict[str, Tensor]:
    """The optimizer's tensors as `<key>/<parameter>`; `names` are the parameters in the order of its groups."""
    state = optimizer.state_dict()["state"]
    return {f"{key}/{names[i]}": torch.as_tensor(value) for i, entry in state.items() for key, value in entry.items()}


def load_optimizer_state(optimizer: Optimizer, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Undo `optimizer_state`; parameters that have no tensors (never stepped) stay fresh."""
    place = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        key, _, name = full.partition("/")
        if name not in place:
            raise UserError(f"the checkpoint has optimizer state of {name}, which the model does not train")
        state.setdefault(place[name], {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
