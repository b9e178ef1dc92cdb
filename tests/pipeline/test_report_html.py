"""`pipeline report`: one file that asks for nothing, says what the runs did, and takes no text for markup."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.report.facts import Shown, selecting, settings_of
from pipeline.report.html import _judged, _number, _ranked
from pipeline.runs import load_run
from tests import objects, scenes
from tests.pipeline.test_errors import refused, run

pytest.importorskip("matplotlib")
HOSTILE = '<script>alert("1")</script> <b>cat</b> & $x_1$'


@pytest.fixture(scope="module")
def swept(checkpoints, tmp_path_factory) -> Path:
    """A sweep over texts and labels that would be markup."""
    folder = tmp_path_factory.mktemp("report")
    lines = ["text\tlabel"]
    lines += [f"{HOSTILE} number {i}\t{'<i>yes</i>' if i % 3 else 'a_$no$'}" for i in range(120)]
    (folder / "my.tsv").write_text("\n".join(lines) + "\n")
    options = ["--model", checkpoints["bert"], "--task", folder / "my.tsv", "--store", folder / "store"]
    named = ["--text", "text", "--label", "label", "--for", "sherl,lst,unipt,head2toe"]
    assert run("extract", *options, *named).exit_code == 0
    words = ["--tuner", "sherl,lst,unipt,head2toe", "--seeds", "0,1", "--epochs", 2, "--batch-size", 16]
    done = run("sweep", *options, *words, "--select-after", 3, "--out", folder / "sweep")
    assert done.exit_code == 0, done.output
    return folder


class Page(HTMLParser):
    """Tags, what they refer to, and the text between them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [v or "" for k, v in attrs if k == "id"]
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action")]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def report(output: Path, *words: Any) -> tuple[Page, dict[str, Any]]:
    done = run("report", *words, "-o", output, "--json")
    assert done.exit_code == 0, done.output
    return Page(output), json.loads(done.stdout)


def test_a_sweep_becomes_one_page_that_asks_for_nothing(swept, tmp_path):
    page, result = report(tmp_path / "report.html", swept / "sweep")
    assert len(result["runs"]) == 8 and [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert not {"script", "link rel=stylesheet", "iframe", "object"} & set(page.tags)
    assert all(link.startswith(("#", "data:")) for link in page.links)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"url\((?!#)", text) and "@import" not in text
    used = {name[1:] for name in page.links if name.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", text))
    assert used <= set(page.ids) and len(page.ids) == len(set(page.ids))
    # No text is markup, and every one is there as it is.
    assert "<script>alert" not in text and "<b>cat" not in text and "<i>yes" not in text
    assert HOSTILE in page.text and "a_$no$" in page.text
    table = json.loads((swept / "sweep" / "sweep.json").read_text())
    assert all(row["label"] in page.text for row in table["runs"])
    assert page.text.count("Features before and after") == 4 and page.text.count("What it costs") == 4
    for said in ("Layer attention", "Redundancy", "Gates of the encoder", "Confidence in each", "Chosen features"):
        assert said in page.text
    assert "± is half of the 95 % interval" in page.text and "samples stored 120 in" in page.text


def test_confusion_and_mistakes_are_those_of_the_scores(swept):
    from pipeline.report.facts import details, read_runs

    folder = swept / "sweep" / "lst-s0"
    (shown,) = read_runs([folder], {})
    found = details(shown)
    assert found.split == "test" and found.classes is not None
    matrix = found.classes.matrix
    assert matrix.sum() == found.samples and matrix.trace() / matrix.sum() == shown.metrics["test"]["accuracy"]
    assert found.wrong == found.samples - matrix.trace() and len(found.mistakes) == min(12, found.wrong)
    surest = [m["how"] for m in found.mistakes]
    assert surest == sorted(surest, reverse=True) and all(m["truth"] != m["guess"] for m in found.mistakes)
    by_name = {name: count for name, *_, count in found.classes.rows}
    labels = load_run(folder).job.tables["test"].labels
    assert list(by_name.values()) == [list(labels).count(i) for i in range(2)]


def test_what_is_learned_is_what_the_tuner_does(swept):
    from pipeline.report.facts import details, read_runs

    def learned(name: str) -> list[Any]:
        return details(*read_runs([swept / "sweep" / name], {})).learned

    weights, alike = learned("sherl-s0")
    assert weights.values.shape == (len(weights.names),) and float(weights.values.min()) >= 0
    assert torch.allclose(alike.values, alike.values.T) and float(alike.values.diagonal().max()) <= 1 + 1e-6
    (gates,) = learned("lst-s0")
    tuner = load_run(swept / "sweep" / "lst-s0").model.tuner.ladders["encoder"]
    mu = torch.sigmoid(tuner.gates / tuner.temperature)[tuner.layers]
    assert torch.equal(gates.values, 1 - mu.detach()) and len(gates.names) == len(mu)
    (shares,) = learned("unipt-s0")
    assert float(shares.values.sum()) == pytest.approx(1)
    (chosen,) = learned("head2toe-s0")
    assert 0 < float(chosen.values.mean()) < 1  # the selection was made


def test_features_are_those_around_the_live_layer(swept):
    from pipeline.report.facts import details, read_runs

    model = load_run(swept / "sweep" / "sherl-s0").model.eval()
    job = load_run(swept / "sweep" / "sherl-s0").job
    batch = next(iter(job.source("test").sequential()))
    with torch.inference_mode():
        before, after = model.tuner.around(batch)
        entering = model.tuner.names["encoder"]
        features = [model.tuner.tail.embed(batch, "encoder"), *(batch.states[n] for n in entering)]
        blend = model.tuner.mtsa["encoder"](features, features[-1])
        assert torch.allclose(before, batch.layout("encoder").mean(blend), atol=1e-5)
        assert torch.allclose(after, batch.layout("encoder").mean(model.tuner(batch)["encoder"]), atol=1e-5)
    for name in ("sherl-s0", "lst-s0", "head2toe-s0"):
        (found,) = (details(shown) for shown in read_runs([swept / "sweep" / name], {}))
        assert found.maps is not None and found.maps.before.shape == found.maps.after.shape == (12, 2)
        assert found.maps.classes.tolist() == [int(label) for label in job.tables["test"].labels]
        facts = dict(found.costs)
        assert "ms a sample" in facts["inference from stored states"] and "memory of it, counted" in facts
        assert "memory of a training step, counted" in facts and "on inputs never seen" in facts


def test_a_map_of_features_is_the_same_each_time():
    from pipeline.report.looks import _flat

    g = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 8, generator=g).numpy()
    rows[20:] += 20
    found = _flat(rows)
    assert found.shape == (40, 2) and (found == _flat(rows)).all()
    near = found[:20] - found[:20].mean(0)
    assert abs(near).max() < abs(found[:20].mean(0) - found[20:].mean(0)).max()  # two heaps stay two
    assert (_flat(rows[:12] * 0) == 0).all()  # nothing to tell apart


def test_of_errors_the_smallest_is_best_in_a_table_too(tmp_path):
    head = "method,trainable,memory_bytes,seconds_per_epoch,metric,figure,spread,seeds,live,settings"
    lines = ["probe,10,1e6,0.1,1.5,mse,,1,False,lr 1", "lst,20,2e6,0.2,0.5,mse,,1,False,lr 2"]
    (tmp_path / "t.csv").write_text("\n".join([head, *lines]) + "\n")
    page, _ = report(tmp_path / "a.html", tmp_path / "t.csv")
    assert page.text.index("lst 1 0.5 20") < page.text.index("probe 1 1.5 10") and "mse" in page.text
    assert "Settings lst lr 2" in page.text


def test_runs_a_folder_of_runs_and_a_table_of_compare(swept, checkpoints, tmp_path):
    options = ["--model", checkpoints["bert"], "--task", swept / "my.tsv", "--store", swept / "store"]
    words = ["--tuners", "lst,unipt", "--epochs", 1, "--seeds", "0,1", "--out", tmp_path / "compared"]
    done = run("compare", *options, *words, "--csv", tmp_path / "table.csv", "--json")
    (tmp_path / "table.json").write_text(done.stdout)
    page, result = report(tmp_path / "a.html", tmp_path / "compared")
    assert len(result["runs"]) == 4 and "lst 2" in page.text and "unipt 2" in page.text
    for name in ("table.csv", "table.json"):
        page, result = report(tmp_path / "b.html", tmp_path / name)
        assert not result["runs"] and f"{name}: methods side by side" in page.text and "memory of a step" in page.text
    rows = json.loads(done.stdout)["rows"]
    assert all(f"{100 * row['metric']:.1f} ±" in page.text for row in rows)
    single, _ = report(tmp_path / "c.html", swept / "sweep" / "lst-s0", tmp_path / "compared" / "lst-s0")
    assert "epochs=1" in single.text and "epochs=2" in single.text  # named by what differs


def test_without_its_store_a_report_says_so(swept, tmp_path):
    page, _ = report(tmp_path / "a.html", swept / "sweep" / "lst-s0", "--store", tmp_path / "none")
    assert "Nothing to look into" in page.text and "Training" in page.text


def test_errors_are_not_shown_in_percent():
    assert _number("test mse", 1.234, 0.1) == "1.234 ± 0.1" and _number("test lengths.mae", 2.0) == "2"
    assert _number("test i2t_r1", 33.25) == "33.25" and _number("test fold_rsum", 550.0, 2.0) == "550 ± 2"
    assert _number("test image_to_text_r10", 50.0) == "50" and _number("validation t2i_median", 3.0) == "3"
    assert _number("test cats.f1_macro", 0.5, 0.01) == "50.0 ± 1.0" and _number("validation accuracy", 0.125) == "12.5"
    per_cent = ("test i2t_r1", "validation t2i_r10", "fold_v2t_r5", "test rsum", "validation image_to_text_median")
    assert [_number(name, 50.0, 2.0) for name in per_cent] == ["50 ± 2"] * 5  # figures of retrieval are as they are


def test_numbers_have_pairs_and_errors(checkpoints, tmp_path):
    rows = [{"text": f"number {i} cat", "label": i / 7} for i in range(60)]
    (tmp_path / "n.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", checkpoints["bert"], "--task", tmp_path / "n.jsonl", "--store", tmp_path / "store"]
    named = ["--text", "text", "--label", "label", "--for", "probe"]
    assert run("extract", *options, *named).exit_code == 0
    train = ["--tuner", "probe", "--epochs", 1, "--out", tmp_path / "run"]
    assert run("train", *options, *train).exit_code == 0
    page, _ = report(tmp_path / "a.html", tmp_path / "run")
    assert "By the size of the error" in page.text and "confusion" not in page.text


def test_mistakes_of_images_are_images_and_labels_have_their_own_scores(checkpoints, pictures, tmp_path):
    options = ["--model", checkpoints["vit"], "--task", pictures, "--store", tmp_path / "s"]
    assert run("extract", *options, "--for", "probe").exit_code == 0
    train = ["--tuner", "probe", "--epochs", 1, "--lr", 1e-9, "--out", tmp_path / "images"]
    assert run("train", *options, *train).exit_code == 0
    page, _ = report(tmp_path / "a.html", tmp_path / "images")
    shown = [link for link in page.links if link.startswith("data:image/jpeg;base64,")]
    assert shown and page.tags.count("img") == len(shown)  # nothing was learned, so some are wrong
    rows = [{"text": f"number {i} cat", "label": ["a"] if i % 3 else ["a", "b"]} for i in range(60)]
    (tmp_path / "n.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--model", checkpoints["bert"], "--task", tmp_path / "n.jsonl", "--store", tmp_path / "s"]
    assert run("extract", *options, "--text", "text", "--label", "label", "--for", "probe").exit_code == 0
    assert run("train", *options, "--tuner", "probe", "--epochs", 1, "--out", tmp_path / "labels").exit_code == 0
    page, _ = report(tmp_path / "b.html", tmp_path / "labels")
    assert "By class on test" in page.text and "precision" in page.text and "Worst mistakes" not in page.text


def test_masks_and_objects_have_scores_by_class(checkpoints, tmp_path):
    masks = scenes.write_scenes(tmp_path / "masks", {"train": 4, "val": 4})
    boxes = objects.write_coco(tmp_path / "coco", {"train": 4, "val": 4})
    common = ["--model", checkpoints["mobilenet"], "--store", tmp_path / "s", "--image-size", "own"]
    coco = ["--task", boxes["train"], "--validation", boxes["val"], "--data", tmp_path / "coco"]
    for name, task, head, figures in (
        ("masks", ["--task", masks, "--objective", "segmentation"], "linear", ("iou", "precision", "pixels")),
        ("boxes", coco, "retinanet", ("box_ap50", "box_map", "objects")),
    ):
        assert run("extract", *common, *task, "--for", "fixed").exit_code == 0
        how = ["--tuner", "fixed", "--head", head, "--max-steps", 1, "--out", tmp_path / name]
        assert run("train", *common, *task, *how).exit_code == 0
        page, _ = report(tmp_path / f"{name}.html", tmp_path / name)
        assert "By class on validation" in page.text and all(figure in page.text for figure in figures)


def test_wrong_input_is_one_line_and_writes_nothing(swept, tmp_path, monkeypatch):
    one = swept / "sweep" / "lst-s0"
    refused(run("report", tmp_path, "-o", tmp_path / "a.html"), "no finished run")
    refused(run("report", tmp_path / "none", "-o", tmp_path / "a.html"), "no such file")
    refused(run("report", one, "-o", tmp_path / "a.txt"), ".html")
    refused(run("report", one, "-o", tmp_path / "none" / "a.html"), "no such folder")
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    refused(run("report", tmp_path / "bad.csv", "-o", tmp_path / "a.html"), "compare", "KeyError")
    shutil.copytree(one, tmp_path / "open")
    (tmp_path / "open" / "metrics.json").unlink()
    refused(run("report", tmp_path / "open", "-o", tmp_path / "a.html"), "not finished")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "pipeline.report.charts", raising=False)
    monkeypatch.delattr("pipeline.report.charts", raising=False)
    refused(run("report", one, "-o", tmp_path / "a.html"), "activation-pipeline[report]")
    assert not (tmp_path / "a.html").exists()


@pytest.mark.matrix
def test_a_browser_asks_for_nothing_and_complains_of_nothing(swept, tmp_path):
    browser = shutil.which("chromium") or pytest.skip("chromium is not installed")
    quiet = ["--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    words = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-sync", *quiet, "--dump-dom"]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr"]

    def shown(path: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*words, path.as_uri()], capture_output=True, text=True, timeout=120)

    report(tmp_path / "report.html", swept / "sweep")
    done = shown(tmp_path / "report.html")
    assert "Worst mistakes" in done.stdout and "CONSOLE" not in done.stderr
    # The page's own policy turns every request into a complaint, and a complaint would have been seen.
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    (tmp_path / "asks.html").write_text(text.replace("</body>", '<img src="https://localhost/x.png"></body>'))
    assert "Content Security Policy" in shown(tmp_path / "asks.html").stderr


def test_runs_are_judged_by_the_figure_that_chose_their_epoch(tmp_path):
    def shown(name: str, value: float) -> Shown:
        figures = {name: value, "pearson": 0.1, "spearman": 0.1}
        metrics = {"validation": figures, "test": figures, "seconds_per_epoch": 1.0, "trainable_parameters": 1}
        return Shown(f"{name} {value}", 0, tmp_path, {}, metrics)

    assert [shown("mse", 0.5).dev, shown("matthews", 0.5).dev] == [-0.5, 0.5]
    for name, best in (("mse", 0.2), ("average", 0.9), ("matthews", 0.9)):
        ranked = _ranked(settings_of([shown(name, 0.2), shown(name, 0.9)]))
        assert _judged(ranked) == f"test {name}" and ranked[0].label == f"{name} {best}"
    assert selecting(["i2t_r1", "rsum", "i2t_median"]) == "rsum" and selecting(["i2t_r1", "rsum"]) == "i2t_r1"
    assert shown("i2t_median", 3.0).dev == -3.0
    assert _judged([]) == "" and selecting(["accuracy", "average"]) == "accuracy"  # a mean of one has its name
