"""`Recipe`: the options that all runs have, typed and validated, and the options of the tuner and the objective.

The command line is made from these fields: a field's metadata says which commands take it and what its help says. A
recipe file holds the same names. What the tuner and the objective take is said by them, see `pipeline.owners`, which
makes recipes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from pipeline.option_names import named, option_name
from pipeline.recipe_file import recipe_text, recipe_values
from pipeline.store.errors import UserError
from pipeline.values import checked_value, plain, short

FORMATS = ("float32", "bfloat16", "float16", "int8")
PRECISIONS = ("float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
# Options that are 1 or more.
REPORTERS = ("tensorboard", "wandb", "mlflow")  # as in `train.fit.reporters`, which need not be loaded to say so
_FROM_ONE = ["limit", "max_length", "batch_size", "batch_tokens", "epochs", "max_steps", "accumulate", "patience"]
_FROM_ONE += ["window", "views", "stride", "frames"]
# Of fields that are no option of a command.
UNSPOKEN: dict[str, Any] = {"help": "", "on": [], "choices": (), "many": False, "metavar": ""}


def _option(
    default: Any, help: str, on: str, choices: tuple[str, ...] = (), many: bool = False, metavar: str = ""
) -> Any:
    """A field; `on` names the commands that take it. `many`: a list, written with commas on the command line."""
    meta = {"help": help, "on": on.split(), "choices": choices, "many": many, "metavar": metavar}
    return field(default=default, metadata=meta)


@dataclass
class Recipe:
    """Options of `extract`, `train` and the commands around them. None means: chosen from the task, the backbone or
    the tuner, as the help says. Raises UserError naming the option that is wrong."""

    # what
    model: str = _option(
        "",
        "Backbone: a short name (see `pipeline models`), a hub id, or a checkpoint folder. Several that read "
        "the same rows: SLOT=NAME,SLOT=NAME; --tuner, --text, --text-pair, --image and --space then take SLOT=VALUE,… "
        "or one value for all slots.",
        "extract train",
        metavar="NAME",
    )
    task: str = _option(
        "",
        "Task: a GLUE name (see `pipeline tasks`), your own .csv, .tsv, .jsonl or .conll file, COCO's .json, "
        "a folder of images, with masks or boxes beside them too, or hub:DATASET, images or texts from Hugging Face; "
        "of what is stored also its name, or NAME@ID (see `pipeline store status`). Several, with commas between: one "
        "tuner, a head and a score each.",
        "extract train",
        metavar="NAME",
    )
    tuner: str = _option("sherl", "Tuner to train (see `pipeline tuners`).", "train", metavar="NAME")
    store: str = _option(
        "", "The store's folder. Default: $PIPELINE_STORE, else ./activations.", "extract train", metavar="FOLDER"
    )
    objective: str | None = _option(
        None,
        "What is learned of the label: classification, regression, multilabel, tagging, segmentation, detection, "
        "instances; label-text, where a text-to-text backbone writes it; completion, a language model's next token; of "
        "pairs contrastive, hinge. "
        "Default: from the data; regression if all labels are numbers with a fraction among them.",
        "extract train",
        metavar="NAME",
    )
    # the task's data
    data: str | None = _option(
        None,
        "Folder with the task's files in GLUE's own layout; without it, Hugging Face datasets.",
        "extract train",
        metavar="FOLDER",
    )
    text: str | None = _option(None, "Own table: column with the text.", "extract train", metavar="COLUMN")
    text_pair: str | None = _option(
        None, "Own table: column with the second text of a pair.", "extract train", metavar="COLUMN"
    )
    image: str | None = _option(
        None,
        "Own table: column with the names of images, for backbones that read images.",
        "extract train",
        metavar="COLUMN",
    )
    label: str | None = _option(None, "Own table: column with the label.", "extract train", metavar="COLUMN")
    columns: tuple[str, ...] = _option(
        (), "Own table, CSV or TSV: what its columns are called, where no first line says so: a,b,label.",
        "extract train", many=True, metavar="NAMES",
    )  # fmt: skip
    separator: str | None = _option(
        None,
        "Own table: what parts several labels in the label column; any number of them a row.",
        "extract train",
        metavar="TEXT",
    )
    validation: str | None = _option(
        None,
        "Own table: file with validation rows. Default: a fixed tenth of the rows.",
        "extract train",
        metavar="FILE",
    )
    test: str | None = _option(None, "Own table: file with test rows.", "extract train", metavar="FILE")
    stratify: bool | None = _option(
        None,
        "Own table: rows that are held out have the classes in the shares of all rows. Default: a plain draw; train "
        "takes what the store has.",
        "extract train",
    )
    fold: str | None = _option(
        None, "Training and validation rows together, cut anew: 2/5 chooses by the second of five parts and trains on "
        "the rest; all trains on all of them and chooses nothing.", "train", metavar="I/K|all",
    )  # fmt: skip
    grid: float | None = _option(
        None,
        "STS-B with a text-to-text backbone: step of the target numbers. Default: 0.1, which is what the papers' code "
        "does (T5 itself used 0.2); train takes what the store has.",
        "extract train",
    )
    limit: int | None = _option(
        None,
        "At most this many rows: of each split when extracting, of the training split when training. A fixed fair "
        "sample; a smaller limit is a prefix of a larger one.",
        "extract train",
    )
    # the feature space
    space: str | None = _option(
        None,
        "Feature space to train from, by id or its first characters, where several would do.",
        "train",
        metavar="ID",
    )
    format: str | None = _option(
        None,
        "How states are stored. Default: float16 (range-safe); train takes what the store has.",
        "extract train",
        choices=FORMATS,
    )
    projection: str | None = _option(
        None,
        "Keep states in K channels: pca:K or orthogonal:K, fitted once for a feature space. What feeds the live layer "
        "or a head stays full; pca-maps:K keeps maps that heads read in K, too. Default: none; train takes what the "
        "store has.",
        "extract train",
        metavar="KIND:K",
    )
    precision: str | None = _option(
        None,
        "How the backbone computes. Default: float32; of language models trained in it, bfloat16.",
        "extract train",
        choices=PRECISIONS,
    )
    attention: str | None = _option(
        None,
        "Attention implementation of the backbone. Default: sdpa, where the library has it.",
        "extract train",
        choices=("sdpa", "eager"),
    )
    prompt: str | None = _option(
        None,
        "Text-to-text source with {0} and {1} for the text fields. Default: the task's own.",
        "extract train",
        metavar="TEXT",
    )
    max_length: int | None = _option(
        None,
        "Longest text in tokens; longer ones are cut and counted. Default: 128, as in the papers; of language models "
        "1024, or what the model takes.",
        "extract train",
    )
    truncation_side: str | None = _option(
        None, "Side on which long texts are cut. Default: right.", "extract train", choices=("left", "right")
    )
    stride: int | None = _option(
        None,
        "Language models: longer texts become windows of --max-length tokens that begin this many tokens apart; each "
        "token is learned once, what a window shares with the one before is context. Default: longer texts are cut; "
        "train takes what the store has.",
        "extract train",
        metavar="TOKENS",
    )
    image_size: str | None = _option(
        None,
        "Images: side (or HEIGHTxWIDTH) of what the backbone sees; own keeps each image's, "
        "short:800:1333 makes the shorter side 800 and the longer at most 1333. Default: the model's.",
        "extract train",
        metavar="SIZE",
    )
    views: int | None = _option(
        None,
        "Images: fixed views of each training image, the plain one and augmented ones (crop, flip, colour). "
        "Default: 1; train takes what the store has, or the first so many.",
        "extract train",
    )
    augment: str | None = _option(
        None,
        "Images: how views are made: random, or flip, the mirror image (--views 2). Default: random.",
        "extract train",
        choices=("random", "flip"),
    )
    view_seed: int | None = _option(
        None, "Images: seed that draws the augmented views. Default: 0.", "extract train", metavar="SEED"
    )
    frames: int | None = _option(
        None,
        "Images of one slot of several: names are of videos, files or folders of frames; at most so many are seen of "
        "each, evenly spread (CLIP4Clip: 12).",
        "extract train",
        metavar="N",
    )
    skip_bad: bool = _option(
        False, "Images: leave out files that are damaged or not RGB, and count them.", "extract train"
    )
    # extraction
    tuners: tuple[str, ...] = _option(
        ("sherl", "lst", "probe"), "Tuners whose states to extract.", "extract", many=True, metavar="NAMES"
    )
    split: tuple[str, ...] = _option(
        (), "Splits to extract. Default: all there are.", "extract", many=True, metavar="NAMES"
    )
    batch_tokens: int | None = _option(
        None, "Extraction: padded tokens of a batch. Default: 4096 on a CPU, 32768 on a GPU.", "extract"
    )
    # what belongs to their owners: options of the tuner (of several tuners, each takes what it has) and the objective
    tuner_options: dict[str, Any] = field(default_factory=dict, metadata=UNSPOKEN)
    objective_options: dict[str, Any] = field(default_factory=dict, metadata=UNSPOKEN)
    imports: tuple[str, ...] = _option(
        (),
        "Modules of your own to import first, that register tuners, objectives, backbones or tasks: names, .py files "
        "or package folders.",
        "extract train",
        many=True,
        metavar="MODULES",
    )
    # training
    batch_size: int | None = _option(
        None,
        "Samples a batch. Training default: 100 for T5 (the papers'), 2 images with masks, else 64; extraction: see "
        "--batch-tokens.",
        "extract train",
    )
    epochs: int | None = _option(
        None,
        "Epochs. Default, the papers': 20 on cola, mrpc, rte, stsb and own tables, 10 on mnli, qnli, qqp, sst2.",
        "train",
    )
    max_steps: int | None = _option(None, "Stop after this many optimizer steps.", "train")
    lr: float | None = _option(None, "Learning rate. Default: the tuner's (3e-3 on T5, the papers').", "train")
    weight_decay: float = _option(0.0, "AdamW weight decay.", "train")
    schedule: str = _option(
        "linear",
        "Learning-rate schedule after the warm-up; drop: a tenth from 3/5 of the steps on; rising, from --lr / 100,000 "
        "to --lr, is for a range test.",
        "train", choices=("linear", "cosine", "constant", "drop", "rising"),
    )  # fmt: skip
    warmup_steps: int | None = _option(
        None,
        "Warm-up steps. Default for T5: 500, the papers', though that is all of training on RTE and most on MRPC; "
        "see --warmup-ratio.",
        "train",
    )
    warmup_ratio: float | None = _option(
        None,
        "Warm-up as a share of all steps; wins over the default of --warmup-steps. Default for encoders: 0.1.",
        "train",
    )
    clip: float = _option(1.0, "Clip the gradient's norm at this; 0 is off.", "train")
    accumulate: int = _option(1, "Batches an optimizer step.", "train")
    train_precision: str = _option(
        "float32", "Precision of training (autocast); SHERL's MTSA stays in float32.", "train", choices=PRECISIONS
    )
    patience: int | None = _option(None, "Stop after this many evaluations without a better one.", "train")
    seed: int = _option(
        0, "Seed of weights, order and dropout (extraction: of the visiting order only).", "extract train"
    )
    order_seed: int | None = _option(
        None, "Seed of the order of samples alone. Default: --seed.", "train", metavar="SEED"
    )
    device: str = _option("auto", "Where to compute.", "extract train", choices=DEVICES)
    live: bool = _option(
        False, "Run the backbone in the loop instead of reading the store: the reference and the baseline.", "train"
    )
    tier: str = _option(
        "auto",
        "Where states stay between epochs: device or host memory, or disk (read again in every epoch). Default: the "
        "first of them that has room.",
        "train",
        choices=("auto", "device", "host", "disk"),
    )
    host_memory: str | None = _option(
        None,
        "Memory for keeping states after the first epoch, such as 4GB. Default: half of what is free.",
        "train",
        metavar="SIZE",
    )
    scheduler: str | None = _option(
        None,
        "Address of a Dask distributed scheduler whose workers extract, or read blocks. Default: this machine.",
        "extract train",
        metavar="ADDRESS",
    )
    window: int = _option(4, "Blocks whose samples are mixed with each other.", "train")
    group_by_length: bool | None = _option(
        None,
        "Batches of samples of like length: less padding in the live layer. Default: on for encoders, off for T5, "
        "whose protocol draws batches at random.",
        "train",
    )
    out: str | None = _option(
        None,
        "Run folder. Default: runs/TASK-TUNER-MODEL-sSEED; of a task of your own, TASK is NAME@ID.",
        "train",
        metavar="FOLDER",
    )
    overwrite: bool = _option(False, "Replace a finished run in the same folder.", "train")
    tensorboard: bool = _option(False, "Also write TensorBoard events (extra `tensorboard`).", "train")
    report_to: tuple[str, ...] = _option(
        (), "Where else the log goes: tensorboard, wandb, mlflow, with commas between; each is an extra.",
        "train", many=True, metavar="NAMES",
    )  # fmt: skip

    def __post_init__(self) -> None:
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if value is not None and choices and value not in choices:
                raise UserError(f"{option_name(f.name)}: one of {', '.join(choices)}, not {value!r}")
        if odd := next((name for name in self.report_to if name not in REPORTERS), None):
            raise UserError(f"--report-to: one or more of {', '.join(REPORTERS)}, not {odd!r}")
        for name in _FROM_ONE:
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{option_name(name)}: at least 1, not {value}")
        for name in ("lr", "grid"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"{option_name(name)}: above 0, not {value}")
        for name in ("weight_decay", "clip", "seed", "order_seed", "warmup_steps", "view_seed"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise UserError(f"{option_name(name)}: not below 0, was {value}")
        for name in ("seed", "order_seed", "view_seed"):
            if (getattr(self, name) or 0) >= 1 << 63:
                raise UserError(f"{option_name(name)}: below 2^63, was {getattr(self, name)}")
        if self.stride is not None and self.truncation_side == "left":
            raise UserError("--truncation-side: with --stride nothing is cut; leave one of them out")
        if self.warmup_ratio is not None and not 0 <= self.warmup_ratio <= 1:
            raise UserError(f"--warmup-ratio: between 0 and 1, not {self.warmup_ratio}")

    @property
    def ordering(self) -> int:
        """The seed that the order of samples follows from."""
        return self.seed if self.order_seed is None else self.order_seed

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, ready for YAML or JSON."""
        return plain({f.name: getattr(self, f.name) for f in fields(self)})

    def to_yaml(self, header: str = "") -> str:
        """YAML that `read_recipe` takes back, below a comment that ends with a digest of the options."""
        return recipe_text(self.to_mapping(), header)


def field_names() -> list[str]:
    """Every common option's name, in order."""
    return [f.name for f in fields(Recipe)]


def read_recipe(path: str | Path, record: bool = False) -> dict[str, Any]:
    """What a recipe file sets, by names of options; neither names nor types are checked, which `pipeline.owners` does.
    What earlier versions wrote as `kind` is the objective. UserError for what `recipe_values` refuses, with `record`
    (for a run's own recipe) a changed file too."""
    values = dict(recipe_values(path, record))
    if "kind" in values:
        kind = values.pop("kind")
        values["objective"] = values.get("objective") or kind
    return named(values, f"recipe {path}")


def common_value(name: str, value: Any, where: str) -> Any:
    """`value` as the type of the common option `name`. UserError naming the option and `where`."""
    if name in ("tuner_options", "objective_options"):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: {name}: expected `option: value` lines, not {short(value)}")
        return dict(value)
    return checked_value(name, _HINTS[name], value, where)


_HINTS = get_type_hints(Recipe)
