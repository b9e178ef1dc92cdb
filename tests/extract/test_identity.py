"""For every field of a feature space, changing it alone never reuses a state; and what is no field always does.

`TEXT` and `IMAGE` list the fields: adding one to the identity without a case here fails.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.extract.backbones.base import TextOptions
from pipeline.extract.backbones.images import Preprocess
from pipeline.extract.backbones.live import LiveBackbone
from pipeline.extract.extraction import compute
from pipeline.extract.feature_space import PRECISIONS, SpaceOptions, space_identity
from pipeline.extract.pretrained import Checkpoint
from pipeline.store import SpaceMismatch, Store
from pipeline.store.select import choose_space
from tests import tiny

TEXTS = [(t,) for t in tiny.sentences(12)]
STATES = ["encoder.1"]


@dataclass
class Setup:
    """A checkpoint folder and the user's choices."""

    folder: Path
    options: SpaceOptions = SpaceOptions(text=TextOptions(prompt="say: {0}"))  # noqa: RUF009 (frozen)

    def identity(self) -> dict[str, Any]:
        return space_identity(Checkpoint(self.folder, "backbone"), self.options)

    def extract(self, store: Path, texts: list[tuple[str]] = TEXTS, **how: Any) -> int:
        """Extract; returns how many samples the backbone computed."""
        checkpoint = Checkpoint(self.folder, "backbone")
        backbone, cpu = checkpoint.backbone, torch.device("cpu")
        precision = PRECISIONS[self.options.precision]
        live = LiveBackbone(backbone, lambda: backbone.load(self.folder, precision, self.options.attention, cpu), cpu)
        inputs = backbone.prepare(
            checkpoint.tokenizer, texts, self.options.text, *([[[5, 1]]] if backbone.writes_text else [])
        )
        space = Store.open(store, create=True).create_space(self.identity())
        settings = {"tokens": 256, "quiet": True, "provenance": {}, **how}
        states = settings.pop("states", STATES)
        return compute(space, inputs, inputs.keys(), states, live, **settings).computed


Change = Callable[[Setup, pytest.MonkeyPatch], Setup]


def option(**values: Any) -> Change:
    return lambda s, _: Setup(s.folder, replace(s.options, **values))


def text(**values: Any) -> Change:
    return lambda s, _: Setup(s.folder, replace(s.options, text=replace(s.options.text, **values)))


def one_layer(setup: Setup, _: pytest.MonkeyPatch) -> Setup:
    file = setup.folder / "model.safetensors"
    tensors = load_file(file)
    name = sorted(n for n in tensors if "encoder.block.0" in n and n.endswith("weight"))[0]
    tensors[name] = tensors[name] + 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    return setup


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Change:
    def apply(setup: Setup, _: pytest.MonkeyPatch) -> Setup:
        file = setup.folder / name
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))
        return setup

    return apply


def other_backbone(setup: Setup, patch: pytest.MonkeyPatch) -> Setup:
    from pipeline.extract.backbones.t5 import T5

    patch.setattr(T5, "name", "t5x")
    return setup


def constant(name: str, value: Any) -> Change:
    """A field that no option reaches yet: the code that sets it is what may change."""

    def apply(setup: Setup, patch: pytest.MonkeyPatch) -> Setup:
        original = space_identity
        patch.setattr(f"{__name__}.space_identity", lambda *a: {**original(*a), name: value})
        return setup

    return apply


def begin_with_the_end_token(tokenizer: dict[str, Any]) -> None:
    single = tokenizer["post_processor"]["single"]
    single.insert(0, single[1])


TEXT: dict[str, Change] = {
    "format_version": constant("format_version", 0),
    "family": other_backbone,
    "weights": one_layer,
    "config": edit("config.json", lambda c: c.update(layer_norm_epsilon=1e-3)),
    "tokenizer": edit(
        "tokenizer.json", lambda t: t["post_processor"]["single"].insert(0, t["post_processor"]["single"][1])
    ),
    "prompt": text(prompt="tell: {0}"),
    "max_length": text(max_length=127),
    "truncation_side": text(truncation_side="left"),
    "format": option(format="bfloat16"),
    "projection": option(projection="pca:8"),
    "projection_fit": option(projection_fit="0" * 32),  # what a seed or other samples change
    "precision": option(precision="bfloat16"),
    "attention": option(attention="eager"),
    "mode": constant("mode", "train"),
    "views": text(views=3),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Any]]:
    """(checkpoint, store with its states, identity)."""
    folder = tmp_path_factory.mktemp("identity")
    setup = Setup(tiny.t5(folder / "t5", layers=2))
    assert setup.extract(folder / "store") == len(TEXTS)
    return folder / "t5", folder / "store", setup.identity()


def test_every_field_has_a_case(base: tuple[Path, Path, dict[str, Any]]) -> None:
    assert set(TEXT) == set(base[2]), "a field of the identity without a case here, or a case without a field"


@pytest.mark.parametrize("field", TEXT)
def test_changing_one_field_never_reuses_a_state(
    field: str, base: tuple[Path, Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, store, identity = base
    shutil.copytree(folder, tmp_path / "t5")
    shutil.copytree(store, tmp_path / "store")
    changed = TEXT[field](Setup(tmp_path / "t5"), monkeypatch)
    other = changed.identity()
    assert {k for k in other if other[k] != identity[k]} == {field}
    # Asking for what is not there names the field and both values.
    with pytest.raises(SpaceMismatch) as caught:
        choose_space(Store.open(tmp_path / "store").spaces(), other)
    for word in (field, json.dumps(identity[field]), json.dumps(other[field])):
        assert word in str(caught.value)
    assert changed.extract(tmp_path / "store") == len(TEXTS)
    assert len(Store.open(tmp_path / "store").spaces()) == 2


def renamed(folder: Path, tmp_path: Path) -> Setup:
    """The same checkpoint under another name, in two shards, with notes in its configuration that mean nothing."""
    target = tmp_path / "other-name"
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, mine in files.items():
        save_file({n: tensors[n] for n in mine}, target / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: f for f, mine in files.items() for n in mine}}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    (target / "model.safetensors").unlink()
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "_name_or_path": "x", "transformers_version": "0"}))
    return Setup(target)


@pytest.mark.parametrize(
    "what", ["batch size", "token budget", "seed", "row order", "limit", "revision", "other task", "checkpoint's name"]
)
def test_what_is_no_field_reuses(what: str, base: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, store, _ = base
    shutil.copytree(store, tmp_path / "store")
    setup = renamed(folder, tmp_path) if what == "checkpoint's name" else Setup(folder)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    how: dict[str, dict[str, Any]] = {
        "batch size": {"batch_size": 1},
        "token budget": {"tokens": 32},
        "seed": {"seed": 9},
        "row order": {"texts": [TEXTS[i] for i in order]},
        "limit": {"texts": TEXTS[:4]},
        "revision": {"provenance": {"dataset": {"revision": "2"}}},
        # A task with the same inputs: twice over, with other labels and in another split, which are of its table.
        "other task": {"texts": [*TEXTS[3:7], *TEXTS[3:7]]},
        "checkpoint's name": {},
    }
    assert setup.extract(tmp_path / "store", **how[what]) == 0
    assert len(Store.open(tmp_path / "store").spaces()) == 1


def test_further_layers_are_a_supplement(base: tuple[Path, Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, store, _ = base
    shutil.copytree(store, tmp_path / "store")
    Setup(folder).extract(tmp_path / "store", states=["encoder.0", "encoder.1"])
    (space,) = Store.open(tmp_path / "store").spaces()
    first, *more = space.segments()
    assert tuple(first.states) == ("encoder.1",) and first.base is None
    assert [(tuple(s.states), s.base, s.columns) for s in more] == [(("encoder.0",), first.id, more[0].columns)]
    assert Setup(folder).extract(tmp_path / "store", states=["encoder.0", "encoder.1"]) == 0


IMAGE: dict[str, dict[str, Any]] = {
    "image_size": {"size": (32, 48)},
    "resize": {"interpolation": "nearest"},
    "mean": {"mean": (0.5, 0.4, 0.4)},
    "std": {"std": (0.5, 0.2, 0.2)},
}


@pytest.mark.parametrize("field", [*IMAGE, "crop"])
def test_fields_of_pictures(field: str) -> None:
    """How images are made is in the identity in words, and as a digest of the whole preprocessing."""
    made = Preprocess()
    backbone = SimpleNamespace(
        name="vit", modality="image", writes_text=False, continues_text=False, attentions=("sdpa",)
    )
    common = {"backbone": backbone, "weights_digest": "w", "config_digest": "c"}

    def identity(tokenizer: Preprocess) -> dict[str, Any]:
        checkpoint: Any = SimpleNamespace(**common, tokenizer=tokenizer, tokenizer_digest=tokenizer.digest)
        return space_identity(checkpoint, SpaceOptions())

    before, after = identity(made), identity(replace(made, **IMAGE.get(field, {"crop": 0.8})))
    others = {"orientation"}  # in test_orientation.py
    assert set(before) == set(TEXT) | set(IMAGE) | others, "a field of images without a case here"
    assert {k for k in after if after[k] != before[k]} == {"tokenizer", "resize" if field == "crop" else field}
