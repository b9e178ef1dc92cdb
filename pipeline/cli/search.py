"""`pipeline search` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.cli.command import command, imports, voice
from pipeline.cli.run_options import DEVICE, IMPORT, STORE
from pipeline.store.errors import UserError


@click.command(short_help="Stored images of a text, stored texts of an image.")
@click.argument("run", metavar="RUN")
@click.option("--query", default=None, help="A text: what of the other slot belongs to it?", metavar="TEXT")
@click.option("--image", default=None, help="An image, likewise.", metavar="FILE")
@click.option("--slot", default="", help="Whose the query is, where several slots read such.", metavar="SLOT")
@click.option("--top", default=10, show_default=True, type=click.IntRange(min=1), help="How many to tell.", metavar="N")
@click.option("--split", default="", help="Among these splits, with commas between. Default: all.", metavar="NAMES")
@STORE
@click.option("--model", default=None, help="The checkpoints, where they have moved.", metavar="SLOT=NAME,…")
@DEVICE
@IMPORT
@command
def search(
    as_json: bool,
    run: str,
    query: str | None,
    image: str | None,
    slot: str,
    top: int,
    split: str,
    **over: Any,
) -> tuple[Any, str]:
    """Rank what a run's store holds of one slot by how well it belongs to a query of the other: images for a text,
    captions for an image. The query's backbone runs live; the others' states come from the store."""
    with imports():
        from pipeline.commands.search import Query, run_search
        from pipeline.runs import load_run
        from pipeline.terminal import entries_text

    if (query is None) == (image is None):
        raise UserError("search: give one of --query TEXT and --image FILE")
    loaded = load_run(run, **over)
    splits = [name.strip() for name in split.split(",") if name.strip()]
    asked = Query(query, None if image is None else Path(image), slot)
    told = run_search(loaded, asked, top, splits, voice(as_json))
    return told, entries_text(told["results"])
