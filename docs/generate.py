"""What the documentation says that only the code knows: the table of what works with what, every command with its
options, the recipes.

    python docs/generate.py     # writes reference/combinations.md anew; the rest is made at every build
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
# One checkpoint of each family, a small one: what AutoConfig needs to know of it.
_SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
SAMPLES: dict[str, dict[str, Any]] = {
    "t5": {"model_type": "t5", "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 4, "num_heads": 4},
    "bert": {"model_type": "bert", **_SMALL},
    "clip-text": {"model_type": "clip_text_model", **_SMALL},
    "decoder": {"model_type": "llama", **_SMALL},
    "vit": {"model_type": "clip_vision_model", **_SMALL},
    "resnet": {"model_type": "resnet"},
    "swin": {"model_type": "timm_wrapper", "architecture": "swin_tiny_patch4_window7_224"},
    "convnext": {"model_type": "timm_wrapper", "architecture": "convnext_tiny"},
    "efficientnet": {"model_type": "timm_wrapper", "architecture": "mobilenetv2_035"},
}
MARKS = {
    "classification": "C", "regression": "R", "multilabel": "M", "tagging": "T", "label-text": "W", "completion": "N",
    "segmentation": "S", "detection": "D", "instances": "I", "hinge": "H", "contrastive": "K",
}  # fmt: skip
HEAD = """\
# What works with what

Made from the code by `python docs/generate.py`; a test holds it to the code. A cell says which objectives can read what
the tuner hands out on that family of backbones, under default options; an empty one is refused by `train`,
`extract --for`, `plan` and `compare` in one sentence, before any work.

"""


def _short(objective: str) -> str:
    return MARKS.get(objective, objective)


def combinations() -> str:
    """The table of backbones × tuners × objectives, by asking the doors of the software."""
    import torch
    from transformers import AutoConfig

    from pipeline.catalog import BASELINES
    from pipeline.extract.backbones import backbone_classes
    from pipeline.extract.backbones.registry import backbone_for
    from pipeline.extract.plugins import load_installed
    from pipeline.train.objectives import objective_class, objective_names
    from pipeline.train.tuners import tuner_names

    load_installed()
    samples = {}
    for cls in backbone_classes():
        if cls.name not in SAMPLES:
            raise SystemExit(f"docs/generate.py: SAMPLES has no checkpoint of the family {cls.name}")
        given = dict(SAMPLES[cls.name])
        backbone = backbone_for(AutoConfig.for_model(given.pop("model_type"), **given))
        with torch.device("meta"):
            samples[cls.name] = backbone, backbone.tail(None, backbone.attentions[0])
    names = sorted(samples, key=list(SAMPLES).index)
    lines = [HEAD + "| mark | objective | what it learns |", "|---|---|---|"]
    lines += [f"| {_short(n)} | `{n}` | {objective_class(n).description} |" for n in objective_names()]
    lines += ["", "## Tuners, from the store", "", f"| tuner | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for tuner in tuner_names():
        cells = ["\u00a0".join(_short(o) for o in _read(*samples[name], tuner)) for name in names]
        lines.append(f"| `{tuner}` | {' | '.join(cells)} |")
    lines += [
        "", "`completion` is for texts that are gone on with, by decoders alone; a T5 writes a label's text "
        "(`label-text`).",
        "With several backbones in one run the head reads one tuner of each; objectives for that: "
        + ", ".join(f"`{n}`" for n in objective_names() if objective_class(n).slots) + ".",
        "", "## Baselines, live", "", "They train inside the backbone, in `compare` and `sweep`, on the same rows.", "",
        "| baseline | what trains |", "|---|---|", *(f"| `{n}` | {what} |" for n, what in BASELINES.items()),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _read(backbone: Any, tail: Any, tuner: str) -> list[str]:
    """The objectives that can read what `tuner` hands out on `backbone`, under default options."""
    import torch

    from pipeline.store.errors import UserError
    from pipeline.train.model import refuse_features
    from pipeline.train.objectives import Answers, objective_class, objective_config, objective_names
    from pipeline.train.tuners import fitting_tuner, tuner_config

    config, found, made = tuner_config(tuner, {}), [], {}
    for name in objective_names():
        cls = objective_class(name)
        if "tags" in cls.targets and backbone.modality == "image":
            continue  # a tag is a word's
        objective = cls(
            objective_config(name, {}), Answers(("no", "yes"), token_ids=((3, 1), (4, 1)), slots=("a", "b"))
        )
        wants = objective.wants
        try:
            if wants not in made:
                with torch.device("meta"):
                    made[wants] = fitting_tuner(tuner, config, backbone)(config, backbone, tail, wants)
            refuse_features(made[wants], objective)
        except UserError:
            continue
        found.append(name)
    return found


def commands() -> str:
    """Every command with its help and its options."""
    from pipeline.cli.main import main

    lines = ["# Commands", "", "Made from the command line itself. `pipeline COMMAND --help` says the same.", ""]
    for name, command in sorted(_leaves(main, "pipeline")):
        lines += [f"## {name}", "", "```text", _usage(name, command), "```", "", _prose(command.help or ""), ""]
        lines += _table(_rows(command.params))
    lines += ["# Options of tuners and objectives", ""]
    lines += ["They are options of `extract`, `train`, `plan`, `bench` and `compare` where the owner is chosen.", ""]
    return "\n".join([*lines, *_owned()]) + "\n"


def _owned() -> Iterator[str]:
    from pipeline.cli.options import _click_option
    from pipeline.owners import KINDS, names_of, owned

    for kind in KINDS:
        for name in names_of(kind):
            found = owned([name], None) if kind == "tuner" else owned([], name)
            rows = _rows([_click_option(o) for o in found if o.kind == kind])
            if rows:
                yield from (f"## {kind} {name}", "", *_table(rows))


def _leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    for word, below in getattr(command, "commands", {}).items():
        yield from _leaves(below, f"{name} {word}")
    if not hasattr(command, "commands"):
        yield name, command


def _usage(name: str, command: Any) -> str:
    import click

    context = click.Context(command, info_name=name)
    return " ".join([name, *command.collect_usage_pieces(context)])


def _rows(params: list[Any]) -> list[tuple[str, str]]:
    import click

    found = []
    for param in params:
        if isinstance(param, click.Option) and not param.hidden:
            record = param.get_help_record(click.Context(click.Command("x")))
            if record:
                found.append(record)
    return found


def _prose(text: str) -> str:
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", text.replace("\b", "").strip()).replace("<", "\\<").replace("*", "\\*")


def _table(rows: list[tuple[str, str]]) -> list[str]:
    def cell(text: str) -> str:
        return " ".join(text.split()).replace("|", "\\|").replace("<", "\\<").replace("*", "\\*").replace("_", "\\_")

    if not rows:
        return []
    return [
        "| option | what |",
        "|---|---|",
        *(f"| `{a.replace('|', chr(92) + '|')}` | {cell(b)} |" for a, b in rows),
        "",
    ]


def recipes() -> str:
    """The recipes of `configs/`, with what their first lines say."""
    lines = ["# Recipes", "", "A recipe holds options of `extract` and `train`; the command line wins.", ""]
    for file in sorted((DOCS.parent / "configs").rglob("*.yaml")):
        text = file.read_text(encoding="utf-8").rstrip()
        first = next((line.lstrip("# ") for line in text.splitlines() if line.startswith("#")), "")
        lines += [f"## {file.relative_to(DOCS.parent)}", "", first, "", "```yaml", text, "```", ""]
    return "\n".join(lines)


def write_parts(folder: Path) -> None:
    """Write what is made at every build into `folder`, where it changed."""
    folder.mkdir(exist_ok=True)
    for name, text in {"commands.md": commands(), "recipes.md": recipes()}.items():
        file = folder / name
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    (DOCS / "reference" / "combinations.md").write_text(combinations(), encoding="utf-8")
