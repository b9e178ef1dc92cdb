"""The command line: one function a command, no logic."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from pipeline.catalog import BASELINES
from pipeline.cli.command import Commands, command, imports, voice
from pipeline.cli.generate import generate
from pipeline.cli.options import build_recipe, split_names, takes, tuners_among
from pipeline.cli.run_options import DEVICE, IMPORT, MODEL, STORE, TASK
from pipeline.cli.search import search
from pipeline.cli.store import store
from pipeline.cli.sweep import sweep
from pipeline.extract.kernels import spin_briefly

EPILOG = """\b
Start here (no network needed after installation):
  pipeline demo
\b
Your own table on a small real encoder:
  pipeline extract --model minilm --task my.csv --text sentence --label label
  pipeline train   --model minilm --task my.csv --tuner lst
\b
A paper's setting, on the machine with the big GPU, then anywhere:
  pipeline extract --model t5-base --task rte
  pipeline train   --recipe configs/sherl-t5-base.yaml --task rte
"""


def _quiet_libraries() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _version(context: click.Context, option: click.Parameter, given: bool) -> None:
    if given and not context.resilient_parsing:
        from pipeline.store.version import project_version

        click.echo(f"pipeline, version {project_version()}")
        context.exit()


@click.group(
    cls=Commands,
    epilog=EPILOG,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version and exit."
)
@click.pass_context
def main(context: click.Context) -> None:
    """Extract once on the big GPU, train anywhere.

    Runs a frozen backbone once over a task, keeps its hidden states in a shared store, and trains side networks (SHERL,
    LST) from the store, as often as you like, on any machine.
    """
    _quiet_libraries()
    spin_briefly()
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@main.command(short_help="Run the backbone once, store its states.", cls=takes("extract"))
@command
def extract(as_json: bool, recipe_file: str | None, **options: Any) -> tuple[Any, str]:
    """Run the backbone once over a task and store its hidden states."""
    with imports():
        from pipeline.commands.extract import run_extract

    return run_extract(build_recipe("extract", options, recipe_file), voice(as_json), quiet=as_json), ""


@main.command(short_help="Train a tuner from the store.", cls=takes("train"))
@command
def train(as_json: bool, recipe_file: str | None, **options: Any) -> tuple[Any, str]:
    """Train a tuner from the store; the backbone is not loaded."""
    with imports():
        from pipeline.commands.train import run_train
        from pipeline.terminal import metrics_text

    result = run_train(build_recipe("train", options, recipe_file), voice(as_json), quiet=as_json)
    return result, metrics_text(result)


@main.command(short_help="What a run will cost, before it is paid.", cls=takes("train"))
@click.option("--budget", default=None, help="Disk that the states may take, such as 100GB.", metavar="SIZE")
@click.option("--memory", default=None, help="Memory that training may take, such as 8GB.", metavar="SIZE")
@click.option("--measure", is_flag=True, help="Measure this machine anew; its rates are remembered with their date.")
@command
def plan(
    as_json: bool, recipe_file: str | None, budget: str | None, memory: str | None, measure: bool, **options: Any
) -> tuple[Any, str]:
    """Bytes, seconds, memory and break-even of caching, from a config.json and rates measured on this machine."""
    with imports():
        from pipeline.cost.plan import run_plan
        from pipeline.store.sizes import parse_size

    disk, room = (None if size is None else float(parse_size(size)) for size in (budget, memory))
    return run_plan(build_recipe("train", options, recipe_file), disk, room, measure)


@main.command(short_help="Measure what plan predicted.", cls=takes("train"))
@command
def bench(as_json: bool, recipe_file: str | None, **options: Any) -> tuple[Any, str]:
    """A small run of the same work: predicted, measured and their ratio. At most 128 rows unless --limit says more."""
    with imports():
        from pipeline.commands.bench import run_bench

    return run_bench(build_recipe("train", options, recipe_file), voice(as_json))


@main.command(
    short_help="Tuners and live baselines in one table.",
    cls=takes("train", "tuner", "seed", names_tuners="methods"),  # --tuners and --seeds say it; ignored, they'd mislead
)
@click.option(
    "--tuners",
    "methods",
    default="probe,sherl,lst,unipt,lora,full",
    show_default=True,
    help=f"Tuners, and live baselines: {', '.join(BASELINES)}. Of several backbones also SLOT=NAME+SLOT=NAME.",
    metavar="NAMES",
)
@click.option("--seeds", default=None, help="Seeds of each, with commas between. Default: 0.", metavar="NUMBERS")
@click.option(
    "--preset",
    default="ours",
    show_default=True,
    type=click.Choice(["ours", "paper"]),
    help="Settings of the live baselines; paper: what LST and SHERL set beside themselves on T5.",
)
@click.option("--csv", "csv_file", default=None, help="Also write the table here.", metavar="FILE")
@command
def compare(
    as_json: bool,
    recipe_file: str | None,
    methods: str,
    seeds: str | None,
    preset: str,
    csv_file: str | None,
    **options: Any,
) -> tuple[Any, str]:
    """Train several methods on one task and print trainable parameters, memory, seconds an epoch and the metric."""
    with imports():
        from pipeline.commands.compare import default_folder, run_compare
        from pipeline.values import parse_seeds

    recipe = build_recipe("train", options, recipe_file, tuners_among(methods))
    names = split_names(methods)
    numbers = [recipe.seed] if seeds is None else parse_seeds(seeds)
    return run_compare(recipe, names, numbers, default_folder(recipe), csv_file, voice(as_json), preset)


@main.command()
@click.argument("run", metavar="RUN")
@click.option("--split", default=None, help="Split to score. Default: test, else validation.")
@click.option("--report", is_flag=True, help="Also each class by itself and the confusion matrix, or the residuals.")
@TASK
@click.option(
    "--generate", is_flag=True, help="Also write freely, the backbone live: exact match; of completions ROUGE and BLEU."
)
@click.option("--max-new-tokens", type=click.IntRange(1), help="--generate: tokens written. Default: 128.", metavar="N")
@STORE
@click.option("--model", default=None, help="Checkpoint for --generate, where it has moved.", metavar="NAME")
@DEVICE
@IMPORT
@command
def evaluate(
    as_json: bool, run: str, split: str | None, report: bool, task: str | None, generate: bool, **overrides: Any
) -> tuple[Any, str]:
    """Score a finished run from the store."""
    with imports():
        from pipeline.extract.kernels.memory import keep_freed_memory
        from pipeline.runs import load_run
        from pipeline.store.errors import UserError
        from pipeline.terminal import scores_text
        from pipeline.train.fit.log import finite

    if (most := overrides.pop("max_new_tokens")) and not generate:
        raise UserError("--max-new-tokens: it is for --generate")
    keep_freed_memory()
    loaded = load_run(run, **overrides)
    loaded = loaded.of(task) if task else loaded
    split = split or ("test" if "test" in loaded.job.tables else "validation")
    result: dict[str, Any] = {"run": run, "split": split, **loaded.evaluate(split, report)}
    if generate:
        result["generated"] = loaded.generate(split, most)
    return finite(result), scores_text(result)


@main.command(short_help="One HTML file about runs, sweeps and tables.")
@click.argument("given", metavar="RUN…", nargs=-1, required=True)
@click.option("-o", "--output", default="report.html", show_default=True, help="The file.", metavar="FILE")
@click.option("--store", default=None, help="The store, where it is not the runs' own.", metavar="FOLDER")
@DEVICE
@IMPORT
@command
def report(as_json: bool, given: tuple[str, ...], output: str, **elsewhere: Any) -> tuple[Any, str]:
    """Write one self-contained HTML file about run folders, sweeps, folders of runs and tables of compare: curves,
    scores over seeds, confusion, mistakes, what the tuners learned, what it cost. Predictions come from the store."""
    with imports():
        from pipeline.report.html import run_report

    return run_report(given, Path(output), voice(as_json), **elsewhere)


@main.command(short_help="Predict on new inputs, the backbone live.")
@click.argument("run", metavar="RUN")
@click.option(
    "--input",
    "input_file",
    required=True,
    help="File with new rows (.csv, .tsv, .jsonl; images are named from its folder), an image, or a folder of images.",
    metavar="FILE",
)
@TASK
@click.option("--text", default=None, help="Column with the text. Default: the task's own.", metavar="COLUMN")
@click.option("--text-pair", default=None, help="Column with the second text.", metavar="COLUMN")
@click.option("--data", default=None, help="Folder of a table's images. Default: the table's own.", metavar="FOLDER")
@click.option(
    "--output",
    default=None,
    help="Write predictions here: .csv, or .jsonl. Default: a table on stdout.",
    metavar="FILE",
)
@click.option(
    "--out-dir",
    default=None,
    help="Of masks and objects: write them here, as PNG or COCO's JSON, and overlays to look at.",
    metavar="FOLDER",
)
@STORE
@MODEL
@DEVICE
@IMPORT
@command
def predict(
    as_json: bool,
    run: str,
    input_file: str,
    task: str | None,
    text: str | None,
    text_pair: str | None,
    data: str | None,
    output: str | None,
    out_dir: str | None,
    **over: Any,
) -> tuple[Any, str]:
    """Predict on inputs never seen: the backbone runs live, the tuner cannot tell."""
    with imports():
        from pipeline.extract.kernels.memory import keep_freed_memory
        from pipeline.runs import load_run, read_rows, refuse_data
        from pipeline.store.errors import UserError
        from pipeline.terminal import entries_text, write_entries

    keep_freed_memory()
    loaded = load_run(run, **over)
    loaded = loaded.of(task) if task else loaded
    given = Path(input_file)
    refuse_data(data, given, loaded.job)
    root = Path(data) if data else given if given.is_dir() else given.parent
    ids, rows = read_rows(given, loaded.job, text, text_pair)
    if loaded.objective.files and out_dir is None:
        raise UserError(f"--out-dir is missing: objective {loaded.objective.name} writes files, name a folder for them")
    told = loaded.predict(rows, root, voice(as_json), out_dir)
    found = [{"id": name, **entry} for name, entry in zip(ids, told, strict=True)]
    if output:
        write_entries(Path(output), found)
        return {"run": run, "rows": len(found), "output": output}, f"{len(found):,} predictions in {output}"
    return {"run": run, "rows": len(found), "predictions": found}, entries_text(found)


@main.command(short_help="This machine, the installation, the store.")
@click.option("--store", default="", help="The store. Default: $PIPELINE_STORE, else ./activations.", metavar="FOLDER")
@command
def doctor(as_json: bool, store: str) -> tuple[Any, str]:
    """Versions, devices, memory, measured rates, the store's health, and what to install for what. Changes nothing; a
    file of 256 MB is written and removed to time the disk."""
    from pipeline.commands.doctor import run_doctor

    return run_doctor(store)


@main.command(short_help="The whole way on a generated task, in minutes.")
@click.option(
    "--out", default="demo", show_default=True, help="Folder for the demo's store and runs.", metavar="FOLDER"
)
@click.option("--seed", default=0, show_default=True, help="Seed of the training.")
@command
def demo(as_json: bool, out: str, seed: int) -> tuple[Any, str]:
    """Extract, train and compare on a generated task with a real encoder; a few minutes on two cores, no network."""
    with imports():
        from pipeline.commands.demo import run_demo

    return run_demo(Path(out), seed, voice(as_json), quiet=as_json)


@main.command()
@command
def models(as_json: bool) -> tuple[Any, str]:
    """Backbones: families and short names."""
    from pipeline.extract.plugins import load_installed
    from pipeline.terminal import models_text, models_what

    load_installed()
    return models_what(), models_text()


@main.command(short_help="Named tasks.")
@command
def tasks(as_json: bool) -> tuple[Any, str]:
    """Named tasks; a table of your own is a task too."""
    from pipeline.extract.plugins import load_installed
    from pipeline.extract.tasks import task_names
    from pipeline.terminal import pairs_text

    load_installed()
    listed = task_names()
    more = "\n\nYour own table: --task my.csv --text COLUMN [--text-pair COLUMN] --label COLUMN (.csv, .tsv, .jsonl)"
    return {"tasks": dict(listed)}, pairs_text(listed) + more


@main.command(short_help="Tuners, and live baselines.")
@command
def tuners(as_json: bool) -> tuple[Any, str]:
    """Tuners, and the baselines that train live beside them; `pipeline train --tuner NAME --help` shows the options of
    one."""
    from pipeline import catalog
    from pipeline.extract.plugins import load_installed
    from pipeline.terminal import pairs_text

    load_installed()
    listed = catalog.tuners()
    wide = max(map(len, listed))
    live = [(f"{name:<{wide}}", what) for name, what in catalog.BASELINES.items()]
    parts = ["from the store (train, sweep, compare)", pairs_text(list(listed.items()))]
    parts += ["", "live baselines beside them (compare, sweep)", pairs_text(live)]
    return {"tuners": listed, "baselines": catalog.BASELINES}, "\n".join(parts)


main.add_command(generate)
main.add_command(search)
main.add_command(store)
main.add_command(sweep)
