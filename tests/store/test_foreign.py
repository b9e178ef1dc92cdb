"""FORMAT.md is enough: `foreign.py`, made from it alone, reads our stores, and we read and train from its own."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from pipeline.cli.main import main
from pipeline.store import FORMATS, Store, decode
from pipeline.store.upkeep.rewrite import compact
from tests.store import foreign
from tests.store.helpers import key, samples, sealed, space

TAILS = {
    "bert": {"embeddings.": "embeddings.", "encoder.layer.3.": "layer."},
    "t5": {
        "shared.": "shared.",
        "decoder.block.3.": "block.",
        "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.": "relative_attention_bias.",
        "encoder.final_layer_norm.": "encoder_norm.",
        "decoder.final_layer_norm.": "decoder_norm.",
    },
}


def run(*words: object) -> Any:
    result = CliRunner().invoke(main, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def extracted(checkpoints, table, tmp_path_factory):
    """family → (checkpoint, store) of the table's first rows, made when first asked for."""
    made: dict[str, tuple[Path, Path]] = {}

    def of(family: str) -> tuple[Path, Path]:
        if family not in made:
            place = tmp_path_factory.mktemp(family) / "store"
            columns = ["--text", "first", "--text-pair", "second", "--label", "label", "--limit", 30]
            run(
                "extract",
                "--model",
                checkpoints[family],
                "--task",
                table,
                *columns,
                "--store",
                place,
                "--for",
                "sherl,probe",
            )
            made[family] = (checkpoints[family], place)
        return made[family]

    return of


def test_it_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(foreign.__file__).read_text())
    names = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    ours = {"pipeline", "store", "extract", "train", "tests"}
    assert not {name.split(".")[0] for name in names} & ours


@pytest.mark.parametrize("fmt", FORMATS)
def test_it_reads_every_format(tmp_path: Path, fmt: str) -> None:
    """A base with two supplements that overlap, another segment, and one that was written anew."""
    home = space(tmp_path, format=fmt)
    base = sealed(home, [3, 6, 9], fmt=fmt)
    sealed(home, [3, 6, 9], base, states=("encoder.4", "decoder.1"), fmt=fmt, columns=False, width=4)
    sealed(home, [7, 8], fmt=fmt)
    for again in (False, True):
        found = {k: (columns, states) for k, columns, states in foreign.Reader(home.files.path("")).samples(home.id)}
        assert sorted(found) == sorted(map(key, (3, 6, 7, 8, 9)))
        for number in (3, 6, 9, 7, 8):
            expected = samples([number], fmt=fmt)
            columns, states = found[key(number)]
            assert all(np.array_equal(columns[n], v) for n, v in expected.columns.items())
            assert all(np.array_equal(states[n], decode(v)) for n, v in expected.states.items())
            assert ("encoder.4" in states) == (number in (3, 6, 9))
        assert len(foreign.Reader(home.files.path("")).segments(home.id)) == (3 if not again else len(home.segments()))
        compact(home)


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_it_knows_spaces_and_samples_by_their_names(extracted, family: str) -> None:
    checkpoint, place = extracted(family)
    theirs = foreign.Reader(place)
    ((name, identity),) = theirs.spaces().items()
    assert foreign.space_id(foreign.text_identity(checkpoint, family, prompt=identity["prompt"])) == name
    rows = list(theirs.samples(name))
    assert rows and all(foreign.sample_key(columns) == known for known, columns, _ in rows)
    stored = {known: columns for known, columns, _ in rows}
    tables = theirs.tables(name)
    assert {split for _, split in tables} == {"train", "validation", "test"}
    for (_, split), (header, lines) in tables.items():
        ours = Store.open(place).spaces()[0].load_table("pairs", split)
        assert [tuple(line) for line in lines] == list(zip(ours.keys, ours.labels, ours.texts, strict=True))
        for known, label, _ in lines if family == "t5" else ():
            ids, parents = foreign.decoder_positions(header["candidates"], 0, label if split == "train" else None)
            assert stored[known]["decoder.ids"].tolist() == ids and stored[known]["decoder.parent"].tolist() == parents


def test_it_applies_projections(extracted, table, tmp_path: Path) -> None:
    checkpoint, full = extracted("bert")
    columns = ["--text", "first", "--text-pair", "second", "--label", "label", "--limit", 30]
    options = ["--projection", "orthogonal:8", "--format", "float32", "--for", "sherl"]
    run("extract", "--model", checkpoint, "--task", table, *columns, *options, "--store", tmp_path / "store")
    small = foreign.Reader(tmp_path / "store")
    ((name, identity),) = small.spaces().items()
    fit = identity["projection_fit"]
    tensors = foreign.float_tensors(small.weights(identity["weights"])[f"projection-{fit}.safetensors"])
    assert foreign.projection_fit(tensors) == fit
    assert name == foreign.space_id(
        foreign.text_identity(checkpoint, "bert", format="float32", projection="orthogonal:8", projection_fit=fit)
    )
    ((whole, _),) = foreign.Reader(full).spaces().items()
    original = {k: states for k, _, states in foreign.Reader(full).samples(whole)}
    for known, _, states in small.samples(name):
        for state, z in states.items():
            x = original[known][state]
            if f"mean/{state}" in tensors:
                x = (x - tensors[f"mean/{state}"]) @ tensors[f"basis/{state}"]
            assert z.shape == x.shape and np.allclose(z, x, atol=5e-3)


def test_it_knows_pictures(checkpoints, pictures, tmp_path: Path) -> None:
    options = ["--limit", 6, "--views", 2, "--view-seed", 3, "--store", tmp_path / "store", "--for", "probe"]
    run("extract", "--model", checkpoints["resnet"], "--task", pictures, *options)
    theirs = foreign.Reader(tmp_path / "store")
    ((name, identity),) = theirs.spaces().items()
    stored = {known for known, _, _ in theirs.samples(name)}
    seen = set()
    for (_, split), (_, lines) in theirs.tables(name).items():
        for known, _, (file, *view) in lines:
            number = int(view[0]) if view else 0
            seen.add((split, number))
            assert known in stored
            assert known == foreign.picture_key((pictures / file).read_bytes(), identity["tokenizer"], number, 3)
    assert ("train", 1) in seen and ("test", 0) in seen


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_we_train_from_what_it_wrote(extracted, table, tmp_path: Path, family: str) -> None:
    """All of a store written anew by the other program, in other segments, chunks and compression, some states in a
    supplement, weights from the checkpoint's own file. We take it for ours: it verifies, nothing is left to extract, a
    run trained from one is scored alike from the other, and it can be trained from."""
    checkpoint, place = extracted(family)
    theirs = foreign.Reader(place)
    ((name, kept),) = theirs.spaces().items()
    writer = foreign.Writer(tmp_path / "theirs")
    identity = foreign.text_identity(checkpoint, family, prompt=kept["prompt"])
    assert writer.space(identity) == name
    tensors = foreign.float_tensors((checkpoint / "model.safetensors").read_bytes())
    tail = {
        new + tensor.removeprefix(old): value
        for tensor, value in tensors.items()
        for old, new in TAILS[family].items()
        if tensor.startswith(old)
    }
    source = {"names": [checkpoint.name], "revision": "", "family": family}
    files = {"tail.safetensors": foreign.write_tensors(tail), "config.json": (checkpoint / "config.json").read_bytes()}
    writer.weights(identity["weights"], {**files, "source.json": json.dumps(source).encode()})
    rows = list(theirs.samples(name))
    for part in (rows[:11], rows[11:]):
        streams = {n.split(".")[0] for n in part[0][1]}
        lengths = {s: [len(columns[f"{s}.ids"]) for _, columns, _ in part] for s in streams}
        states = {n: np.concatenate([s[n] for _, _, s in part]) for n in part[0][2]}
        columns = {n: np.concatenate([c[n] for _, c, _ in part]) for n in part[0][1]}
        late = {n: v for n, v in states.items() if n.startswith("encoder.1")}
        early = {n: v for n, v in states.items() if n not in late}
        keys = [known for known, _, _ in part]
        base = writer.segment(name, keys, lengths, early, columns, "float16", compressed=["encoder.2", "encoder.ids"])
        writer.segment(name, keys, {"encoder": lengths["encoder"]}, late, {}, "float16", base, chunk_rows=7)
    for header, lines in theirs.tables(name).values():
        writer.table(name, {k: v for k, v in header.items() if k != "extracted"}, lines)  # it leaves no records
    there = tmp_path / "theirs"
    assert Store.open(there).verify(deep=True) == []
    columns_of = ["--text", "first", "--text-pair", "second", "--label", "label", "--limit", 30]
    task = ["--task", table, "--tuner", "sherl", "--epochs", 1]
    done = run("extract", "--model", checkpoint, "--task", table, *columns_of, "--store", there, "--for", "sherl,probe")
    assert done["computed"] == 0 and done["space"] == name
    run("train", *task, "--store", place, "--out", tmp_path / "run")
    ours, other = (run("evaluate", tmp_path / "run", "--store", where) for where in (place, there))
    assert ours == other
    trained = run("train", *task, "--store", there, "--out", tmp_path / "other")
    assert trained["space"] == name and trained["test"]
