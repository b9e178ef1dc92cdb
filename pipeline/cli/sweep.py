"""`pipeline sweep` on the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from pipeline.catalog import is_baseline
from pipeline.cli.command import command, voice
from pipeline.cli.options import build_recipe, split_names, takes
from pipeline.commands.grid import Sweep, parse_grid, read_sweep
from pipeline.commands.grid import trials as points
from pipeline.option_names import option_name
from pipeline.owners import names_of
from pipeline.recipe import Recipe
from pipeline.store.errors import UserError
from pipeline.values import parse_seeds

_OF_RATE = ("lr", "schedule", "warmup_steps", "warmup_ratio")


def asked_for(
    methods: str | None, words: Sequence[str], sweep_file: str | None, seeds: str | None
) -> tuple[Sweep, dict[str, Any]]:
    """The sweep of a command line and of its file, whose values the line's replace; and the options that the file gives
    to all runs."""
    sweep, common = read_sweep(sweep_file) if sweep_file else (Sweep({}), {})
    grid = {**sweep.grid, **parse_grid(words)}
    tuners = split_names(methods) if methods else sweep.tuners
    if methods:
        grid.pop("tuner", None)
    return replace(sweep, grid=grid, tuners=tuners, seeds=parse_seeds(seeds) if seeds else sweep.seeds), common


class SweepCommand(takes("train", "tuner", "seed", "out", "overwrite", "tensorboard")):  # type: ignore[misc]
    """Its tuners are those of --tuner, of the grid and of the sweep file."""

    looks_at = ("methods", "words", "sweep_file")

    def tuners(self, given: Mapping[str, Any], recipe: Recipe) -> list[str]:
        sweep, _ = asked_for(given.get("methods"), given.get("words") or (), given.get("sweep_file"), None)
        return [name for name in sweep.methods() if name in names_of("tuner")]


@click.command(short_help="Many runs in one pass over the store.", cls=SweepCommand)
@click.option("--tuner", "methods", default=None, help="Tuners and baselines, with commas between.", metavar="NAMES")
@click.option(
    "--grid",
    "words",
    multiple=True,
    help="Values of an option, all combinations of which are trained: lr=1e-3,3e-3. Again for each option. A value "
    "that is a list has + between its parts: layers=0+2+4,1+3+5.",
    metavar="OPTION=VALUES",
)
@click.option("--seeds", default=None, help="Seeds of each point, with commas between. Default: 0.", metavar="NUMBERS")
@click.option(
    "--sweep",
    "sweep_file",
    default=None,
    help="A YAML file with grid, runs, seeds and common options, such as configs/ablations/*.yaml; the line wins.",
    metavar="FILE",
)
@click.option("--folds", default=None, type=int, help="Cross-validate: each run K times, once for each of K parts of "
              "the training and validation rows, by which it is chosen (--fold of `train`).", metavar="K")  # fmt: skip
@click.option("--search", "how", default=None, type=click.Choice(("tpe", "random")),
              help="Draw points of the grid (Optuna, extra `search`) in rounds, each of which is one pass. Values of "
              "the grid may be ranges: lr=1e-4..1e-2:log.")  # fmt: skip
@click.option("--trials", default=None, type=int, help="Points that --search draws in all. Default: 20.", metavar="N")
@click.option("--round", "size", default=None, type=int, help="Of them at a time. Default: 4.", metavar="N")
@click.option("--halving", default=None, type=int, help="Successive halving: at epochs E/N^k of E the best 1/N of the "
              "settings go on, the others stop.", metavar="N")  # fmt: skip
@click.option("--lr-range", "highest", default=None, type=float, help="A learning-rate range test instead: each run "
              "goes through one epoch (or --epochs) while its rate rises to this; where the loss falls fastest is "
              "told.", metavar="RATE")  # fmt: skip
@click.option("--refit", is_flag=True, help="Train the best setting once more, on training and validation rows.")
@click.option(
    "--out", default=None, help="Folder of the runs and their table. Default: sweeps/TASK-TUNERS.", metavar="FOLDER"
)
@command
def sweep(
    as_json: bool,
    recipe_file: str | None,
    methods: str | None,
    words: tuple[str, ...],
    seeds: str | None,
    sweep_file: str | None,
    folds: int | None,
    how: str | None,
    trials: int | None,
    size: int | None,
    halving: int | None,
    highest: float | None,
    refit: bool,
    out: str | None,
    **options: Any,
) -> tuple[Any, str]:
    """Train every combination of a grid with every seed. Each batch is read, decoded and moved once for all runs; each
    run equals its single run, whose command is printed. All share one order of samples: --order-seed, else the first
    seed's. The same command goes on with a sweep that was stopped; with more values it trains what is new.
    """
    asked, common = asked_for(methods, words, sweep_file, seeds)
    named = asked.methods()
    known = [name for name in named if name in names_of("tuner")]
    file = [(f"sweep {sweep_file}", common)] if common else []
    base = build_recipe("train", options, recipe_file, known, *file)
    if folds is not None and folds < 2:
        raise UserError(f"--folds {folds}: at least 2")
    asked = replace(asked, folds=folds)
    folder = Path(out or f"sweeps/{Path(base.task).stem}-{'-'.join(named)}")
    if how is None and not (trials is None and size is None):
        raise UserError("--trials and --round are for --search: give it, or leave them out")
    if highest is not None:
        if how or halving or refit or folds or "lr" in asked.grid or any(is_baseline(name) for name in named):
            raise UserError("--lr-range tests tuners by itself: leave searches, folds, refits, baselines and lr out")
        if said := [option_name(name) for name in _OF_RATE if options.get(name) is not None]:
            raise UserError(f"--lr-range says how the rate goes: leave {', '.join(said)} out")
        fixed: dict[str, Any] = {"schedule": "rising", "lr": highest, "warmup_steps": 0, "warmup_ratio": None}
        base = replace(base, **fixed, epochs=base.epochs or 1)
        folder = Path(out) if out else folder.with_name(f"{folder.name}-lr-range")
    runs = [] if how else points(asked, base)
    from pipeline.commands.proposals import Asked, Search  # these load torch
    from pipeline.commands.sweep import Extras, run_sweep

    search = None
    if how:
        search = Search(asked, base, Asked(how, 20 if trials is None else trials, 4 if size is None else size), folder)
    return run_sweep(
        runs, folder, voice(as_json), quiet=as_json, extras=Extras(search, halving, refit, highest is not None)
    )
