"""`pipeline generate` on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from pipeline.cli.command import command, imports, printable
from pipeline.cli.run_options import DEVICE, IMPORT, MODEL, STORE, TASK


@click.command(short_help="Go on with a text, the backbone live.")
@click.argument("run", metavar="RUN")
@click.option("--prompt", "prompts", multiple=True, help="A text to go on with; may be given again.", metavar="TEXT")
@click.option(
    "--input",
    "input_file",
    default=None,
    help="File of prompts: a .txt with one a line, or a table with a column prompt or messages.",
    metavar="FILE",
)
@TASK
@click.option("--max-new-tokens", default=128, show_default=True, help="Tokens written at most.", metavar="N")
@click.option(
    "--temperature", default=0.0, show_default=True, help="0: always the most likely token; above: drawn.", metavar="T"
)
@click.option("--top-k", type=int, default=None, help="Draw among the K most likely tokens.", metavar="K")
@click.option("--top-p", type=float, default=None, help="Draw among tokens of this probability together.", metavar="P")
@click.option("--seed", default=0, show_default=True, help="Seed of what is drawn.", metavar="N")
@click.option("--stop", "stops", multiple=True, help="Text to stop before; may be given again.", metavar="TEXT")
@click.option("--batch-size", default=16, show_default=True, help="Texts written at once.", metavar="N")
@click.option("--output", default=None, help="Write what --input gives here: .jsonl or .csv.", metavar="FILE")
@STORE
@MODEL
@DEVICE
@IMPORT
@command
def generate(
    as_json: bool,
    run: str,
    prompts: tuple[str, ...],
    input_file: str | None,
    task: str | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stops: tuple[str, ...],
    batch_size: int,
    output: str | None,
    **over: Any,
) -> tuple[Any, str]:
    """Go on with texts: the backbone runs live, the tuner beside it. Of a single prompt the text appears as it is
    written."""
    with imports():
        from pipeline.commands.generate import Writing, read_prompts, write
        from pipeline.extract.kernels.memory import keep_freed_memory
        from pipeline.runs import load_run
        from pipeline.terminal import entries_text, write_entries
        from pipeline.train.continuation import Choice

    how = Writing(max_new_tokens, stops, Choice(temperature, top_k, top_p, seed), batch_size)
    keep_freed_memory()
    loaded = load_run(run, **over)
    loaded = loaded.of(task) if task else loaded
    asked = [*prompts, *(read_prompts(Path(input_file), loaded) if input_file else [])]
    shown = len(asked) == 1 and not as_json and not output
    told = write(loaded, asked, how, (lambda _, text: click.echo(printable(text), nl=False)) if shown else None)
    if output:
        write_entries(Path(output), told)
        return {"run": run, "rows": len(told), "output": output}, f"{len(told):,} texts in {output}"
    one = told[0] if len(told) == 1 else {}
    return {"run": run, "rows": len(told), **one, "generated": told}, "\n" if shown else entries_text(told)
