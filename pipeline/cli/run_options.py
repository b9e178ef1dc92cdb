"""Options of commands that are given a run."""

from __future__ import annotations

import click

IMPORT = click.option(
    "--import",
    "imports",
    default=None,
    help="Modules to import first, where those of the run have moved.",
    metavar="MODULES",
)
STORE = click.option("--store", default=None, help="The store, where it is not the run's own.", metavar="FOLDER")
MODEL = click.option("--model", default=None, help="The checkpoint, where it has moved.", metavar="NAME")
DEVICE = click.option("--device", default=None, type=click.Choice(["auto", "cpu", "cuda"]), help="Where to compute.")
TASK = click.option("--task", default=None, help="Of a run with several tasks: which one.", metavar="NAME")
