"""The eight GLUE tasks: protocol, files in GLUE's layout, and what is said about bad ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.extract.tasks import SPLITS, Rows, TaskSpec, load_task, task_names
from pipeline.store.errors import UserError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "glue"
HEAD = "sentence1\tsentence2\tlabel"
real = pytest.mark.skipif(not REAL.is_dir(), reason="real GLUE files are absent: ../shared/data/glue")


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    return folder


def rte(rows: int, first: int = 0) -> str:
    lines = [f"premise {i}\thypothesis {i}\t{i % 2}\t{i}" for i in range(first, first + rows)]
    return "\n".join([HEAD + "\tidx", *lines]) + "\n"


def test_the_eight_tasks_are_named() -> None:
    assert [name for name, _ in task_names()] == ["cola", "sst2", "mrpc", "rte", "stsb", "qqp", "qnli", "mnli"]


PROMPTS = {
    "cola": "cola sentence: A",
    "sst2": "sst2 sentence: A",
    "mrpc": "mrpc sentence1: A sentence2: B",
    "rte": "rte sentence1: A sentence2: B",
    "stsb": "stsb sentence1: A sentence2: B",
    "qqp": "qqp question1: A question2: B",
    "qnli": "qnli question: A sentence: B",
    "mnli": "mnli premise: A hypothesis B",
}
FILES = {
    "cola": ("CoLA", None, "x\t{label}\t\t{a}"),
    "sst2": ("SST-2", "sentence\tlabel", "{a}\t{label}"),
    "mrpc": ("MRPC", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{label}\t1\t2\t{a}\t{b}"),
    "rte": ("RTE", "index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{name}"),
    "stsb": ("STS-B", "index\tsentence1\tsentence2\tscore", "0\t{a}\t{b}\t{label}.250"),
    "qqp": ("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\t{a}\t{b}\t{label}"),
    "qnli": ("QNLI", "index\tquestion\tsentence\tlabel", "0\t{a}\t{b}\t{name}"),
    "mnli": ("MNLI", "index\tsentence1\tsentence2\tlabel1\tgold_label", "0\t{a}\t{b}\tneutral\t{name}"),
}


@pytest.mark.parametrize("name", FILES)
def test_glue_layout_prompt_and_splits(name: str, tmp_path: Path) -> None:
    folder, header, line = FILES[name]
    train_rows = 1200 if name in ("sst2", "qqp", "qnli") else 12

    def table(rows: int, mark: str) -> str:
        made = [
            line.format(a=f'{mark} "{i}', b=f"b{i}", label=i % 2, name=("entailment", "not_entailment")[i % 2])
            for i in range(rows)
        ]
        if name == "mnli":
            made = [row.replace("not_entailment", "contradiction") for row in made]
        return "\ufeff" + "\n".join(([header] if header else []) + made) + "\n"

    stems = {"dev_matched": 9, "dev_mismatched": 7} if name == "mnli" else {"dev": 9}
    write(
        tmp_path / folder,
        {"train.tsv": table(train_rows, "t"), **{f"{s}.tsv": table(n, s) for s, n in stems.items()}},
    )
    task = load_task(name, tmp_path)
    assert task.spec.source(("A", "B")[: len(task.spec.fields)]) == PROMPTS[name]
    sizes = {split: len(task.rows(split)) for split in SPLITS}
    if name in ("sst2", "qqp", "qnli"):
        assert sizes == {"train": 200, "validation": 1000, "test": 9}
        order = torch.randperm(1200, generator=torch.Generator().manual_seed(42)).tolist()
        assert [t[0] for t in task.rows("validation").texts] == [f't "{i}' for i in order[:1000]]
        assert [t[0] for t in task.rows("train").texts] == [f't "{i}' for i in order[1000:]]
    elif name == "mnli":
        assert sizes == {"train": 12, "validation": 7, "test": 9}
        assert {t[0].split()[0] for t in task.rows("test").texts} == {"dev_matched"}
    else:
        assert sizes == {"train": 12, "validation": 4, "test": 5}
        order = torch.randperm(9, generator=torch.Generator().manual_seed(42)).tolist()
        assert [t[0] for t in task.rows("validation").texts] == [f'dev "{i}' for i in order[:4]]
        assert [t[0] for t in task.rows("test").texts] == [f'dev "{i}' for i in order[4:]]
    for split in SPLITS:
        for text, label in zip(task.rows(split).texts, task.rows(split).labels, strict=True):
            odd = int(text[0].split('"')[1]) % 2
            assert label == (odd + 0.25 if name == "stsb" else odd * (2 if name == "mnli" else 1))
    assert str(tmp_path) not in str(task.provenance) and len(task.provenance["revision"]) == 32


def test_stsb_grid_rounds_as_the_official_code(tmp_path: Path) -> None:
    lines = "\n".join(f"a{i}\tb\t{s}" for i, s in enumerate(np.linspace(0, 5, 41)))
    text = f"sentence1\tsentence2\tscore\n{lines}\n"
    write(tmp_path / "STS-B", {"train.tsv": text, "dev.tsv": text})
    task = load_task("stsb", tmp_path)
    assert len(task.spec.texts) == 51 and task.spec.texts[:2] == ("0.0", "0.1") and task.spec.values[-1] == 5.0
    for score in [*np.linspace(0, 5, 401), 4.25, 4.35, 0.05, 2.5]:
        assert task.spec.texts[task.spec.target_index(score)] == str(np.round(score * 5 / 5, decimals=1))
    wide = load_task("stsb", tmp_path, grid=0.2).spec
    assert len(wide.texts) == 26 and wide.texts[wide.target_index(2.5)] == str(np.round(2.5 * 5) / 5)
    with pytest.raises(UserError, match=r"--target-step must be 0\.1 or 0\.2, not 0\.5"):
        load_task("stsb", tmp_path, grid=0.5)


def test_spec_survives_json(tmp_path: Path) -> None:
    spec = TaskSpec("t", "number", (), ("pearson",), ("a",), "t a: {0}", ("0", "1"), (0.0, 1.0))
    assert TaskSpec.from_dict({**spec.to_dict(), "other": 1}) == spec
    with pytest.raises(UserError, match="lacks name"):
        TaskSpec.from_dict({})
    with pytest.raises(UserError, match="3 texts to answer for 2 labels"):
        TaskSpec("t", "class", ("a", "b"), ("f1",), ("a",), "{0}", ("0", "1", "2"))


def test_limit_is_a_prefix() -> None:
    rows = Rows([(str(i),) for i in range(9)], [0] * 9)
    assert rows.head(5).texts[:3] == rows.head(3).texts and len(rows.head(99)) == 9 and rows.head(None) is rows
    with pytest.raises(UserError, match="at least 1, not 0"):
        rows.head(0)


def test_train_rows_do_not_depend_on_the_global_seed(tmp_path: Path) -> None:
    write(tmp_path / "RTE", {"train.tsv": rte(50), "dev.tsv": rte(10, 100)})
    torch.manual_seed(1)
    first = load_task("rte", tmp_path).rows("train").texts
    torch.manual_seed(2)
    assert load_task("rte", tmp_path).rows("train").texts == first
    assert first != sorted(first)


def test_absent_files_are_said_when_needed(tmp_path: Path) -> None:
    write(tmp_path / "RTE", {"dev.tsv": rte(10)})
    task = load_task("rte", tmp_path)
    assert list(task.splits) == ["validation", "test"]
    with pytest.raises(UserError, match=r"no train rows: there is no train.tsv or .*; splits there: val"):
        task.rows("train")
    with pytest.raises(UserError, match="no dev rows: no such split"):
        task.rows("dev")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no folder RTE in .*; folders there: none"),
        ({"RTE/x.txt": ""}, "holds no labelled rows: there is no train.tsv"),
        ({"RTE/dev.tsv": ""}, "dev.tsv is empty"),
        ({"RTE/dev.tsv": HEAD + "\n"}, "a header but no rows"),
        ({"RTE/dev.tsv": "sentence1\tlabel\na\t0\n"}, "no column 'sentence2'; columns there: sentence1, label"),
        ({"RTE/dev.tsv": HEAD + "\na\tb\t0\na\t0\n"}, "line 3: 2 fields where 3 are expected"),
        ({"RTE/dev.tsv": HEAD + "\na\tb\t0\na\tb\tmaybe\n"}, r"row 2 \(line 3\): unknown label 'maybe'"),
        ({"RTE/dev.tsv": HEAD + "\na\tb\t0\na\tb\t-1\n"}, r"row 2 \(line 3\): no label"),
        ({"RTE/dev.tsv": HEAD.encode() + b"\na\xff\tb\t0\n"}, r"not UTF-8: byte 0xff at offset 27 \(line 2\)"),
        ({"RTE/dev.jsonl": '{"sentence1": 1, "sentence2": "b", "label": 0}\n'}, "sentence1 and sentence2 must be text"),
        ({"RTE/dev.jsonl": '{"sentence1": \n'}, "line 1: not valid JSON"),
        ({"RTE/dev.jsonl": "[1]\n"}, "line 1: a JSON object is expected, not list"),
    ],
)  # fmt: skip
def test_bad_files(files: dict[str, str], message: str, tmp_path: Path) -> None:
    write(tmp_path, files)
    with pytest.raises(UserError, match=message) as caught:
        load_task("rte", tmp_path)
    assert "\n" not in str(caught.value)


def test_stsb_score_outside_the_scale(tmp_path: Path) -> None:
    write(tmp_path / "STS-B", {"train.tsv": "sentence1\tsentence2\tscore\na\tb\tnan\n"})
    with pytest.raises(UserError, match="score 'nan' is not a number from 0 to 5"):
        load_task("stsb", tmp_path)


def test_qqp_leaves_out_broken_rows_as_the_hub_does(tmp_path: Path) -> None:
    text = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\ta\tb\t1\nbroken\n3\t4\t5\tc\td\t0\n"
    write(tmp_path / "QQP", {"dev.tsv": text})
    task = load_task("qqp", tmp_path)
    assert len(task.rows("test")) == 2 and task.provenance["rows_dropped"] == 1


def test_names(tmp_path: Path) -> None:
    write(tmp_path / "RTE", {"dev.tsv": rte(4)})
    assert load_task("RTE", tmp_path / "RTE").spec.name == "rte"
    with pytest.raises(UserError, match="unknown task 'rta'; did you mean rte"):
        load_task("rta", tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        load_task("rte", tmp_path / "nowhere")
    with pytest.raises(UserError, match="rte is a public task; --text is for a table"):
        load_task("rte", tmp_path, text="a")


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: object) -> None:
        raise ConnectionError("Couldn't reach the hub\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"Couldn't reach the hub; .*--data FOLDER$") as caught:
        load_task("rte")
    assert "\n" not in str(caught.value)


def test_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def rows(n: int, label: int | None) -> datasets.Dataset:
        labels = [i % 2 if label is None else label for i in range(n)]
        made = {"sentence1": [f"a{i}" for i in range(n)], "sentence2": ["b"] * n, "label": labels}
        info = datasets.DatasetInfo(download_checksums={f"hf://datasets/nyu-mll/glue@{'ab' * 20}/rte/x.parquet": {}})
        return datasets.Dataset(datasets.Dataset.from_dict(made).data, info=info)

    made = {"train": rows(20, None), "validation": rows(10, None), "test": rows(5, -1)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(made))
    task = load_task("rte")
    assert {s: len(r) for s, r in task.splits.items()} == {"train": 20, "validation": 5, "test": 5}
    assert task.provenance["revision"] == "ab" * 20
    assert sorted(task.rows("validation").texts + task.rows("test").texts) == [(f"a{i}", "b") for i in range(10)]


@real
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("cola", (8551, 521, 522)),
        ("sst2", (66349, 1000, 872)),
        ("rte", (2490, 138, 139)),
        ("stsb", (5749, 750, 750)),
        ("qnli", (None, None, 5463)),
        ("mnli", (None, None, 9815)),
    ],
)
def test_real_files(name: str, sizes: tuple[int | None, ...]) -> None:
    task = load_task(name, REAL)
    for split, size in zip(SPLITS, sizes, strict=True):
        if size is None:
            with pytest.raises(UserError, match="there is no"):
                task.rows(split)
        else:
            rows = task.rows(split)
            assert len(rows) == size and rows.labelled()
            if task.spec.target == "class":
                assert set(rows.labels) == set(range(len(task.spec.labels)))
            assert all(len(t) == len(task.spec.fields) for t in rows.texts)
    assert "/" not in str(task.provenance).replace(f"glue/{name}", "")
