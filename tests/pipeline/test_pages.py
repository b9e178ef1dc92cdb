"""The documentation: tutorials run as written, every command parses, links lead somewhere, the site builds, and what is
made from the code is what the code says."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from tests import objects, scenes
from tests.pipeline.pages import COMMAND, DOCS, README, ROOT, blocks, commands, follow, pages, parsed
from tests.pipeline.test_readme import own_photos, own_table

LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)|!\[[^\]]*\]\(([^)\s]+)\)")


@pytest.fixture(autouse=True)
def measured_once(own_cache, tmp_path_factory, monkeypatch):
    """The rates of the machine, which `plan` measures, are those of all tutorials."""
    monkeypatch.setenv("PIPELINE_CACHE", str(tmp_path_factory.getbasetemp() / "tutorials"))


def test_your_csv_to_predictions(checkpoints, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed: the tutorial not tested")
    monkeypatch.chdir(tmp_path)
    own_table(tmp_path)
    said = follow(DOCS / "tutorials" / "csv.md", {"minilm": str(checkpoints["bert"])})
    assert len(said) == 9 and (tmp_path / "report.html").is_file()
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 5


def test_a_language_model(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(checkpoints["decoder"])
    said = follow(DOCS / "tutorials" / "language.md", {})
    assert len(said) == 5
    scored = next(text for line, text in said.items() if line.startswith("pipeline evaluate"))
    assert "perplexity" in scored


def test_masks(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = scenes.write_scenes(tmp_path / "made", {"train": 10})
    for kind, folder in (("images", "train"), ("masks", "trainannot")):
        (tmp_path / "scenes" / kind).parent.mkdir(exist_ok=True)
        (made / folder).rename(tmp_path / "scenes" / kind)
    (tmp_path / "model").symlink_to(checkpoints["mobilenet"])
    said = follow(DOCS / "tutorials" / "masks.md", {})
    assert len(said) == 6 and len(list((tmp_path / "predictions").glob("*.png"))) == 10
    assert "miou" in next(text for line, text in said.items() if line.startswith("pipeline evaluate"))


def test_search_in_images(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own_photos(tmp_path)
    names = {"resnet50": str(checkpoints["resnet"]), "minilm": str(checkpoints["bert"])}
    said = follow(DOCS / "tutorials" / "retrieval.md", names)
    assert len(said) == 5 and "i2t_r1" in next(text for line, text in said.items() if " evaluate " in line)
    images, texts = list(said.values())[-2:]
    assert images.count(".jpg") == 3 == texts.count("number")


def test_objects(checkpoints, tmp_path, monkeypatch):
    pytest.importorskip("pycocotools", reason="the extra `dense` is not installed: the tutorial not tested")
    monkeypatch.chdir(tmp_path)
    file = objects.write_coco(tmp_path / "shapes", {"train": 24})["train"]
    file.rename(tmp_path / "shapes" / "instances_train.json")
    (tmp_path / "shapes" / "train2017").rename(tmp_path / "shapes" / "train")
    (tmp_path / "model").symlink_to(checkpoints["mobilenet"])
    said = follow(DOCS / "tutorials" / "detection.md", {})
    assert len(said) == 4 and "box_map" in next(text for line, text in said.items() if " evaluate " in line)
    assert len(list((tmp_path / "found" / "overlays").glob("*.jpg"))) == 24
    assert (tmp_path / "found" / "detections.json").is_file()


def test_a_tuner(checkpoints, tmp_path, monkeypatch):
    from pipeline.train.tuners import base

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(base, "_TUNERS", dict(base._TUNERS))  # what is registered here is gone after it
    own_table(tmp_path)
    # The file is loaded by its commands; imported once more in the same process it would be taken for another's.
    names = {name: str(checkpoints["bert"]) for name in ("minilm", "checkpoint/folder")} | {"import my_tuner\n": ""}
    said = follow(DOCS / "tutorials" / "tuner.md", names)
    assert len(said) == 4 and "Where the scales start." in list(said.values())[-1]


def test_every_command_of_every_page_parses(tmp_path, monkeypatch):
    from pipeline.cli.main import main

    monkeypatch.chdir(ROOT)
    wrong, count = [], 0
    for page in pages():
        for line in commands(page):
            if "--help" in line or "--import" in line or "…" in line or "FILE" in line:
                continue
            count += 1
            try:
                parsed(line, main)
            except (Exception, SystemExit) as error:
                wrong.append(f"{page.relative_to(ROOT)}: {line}: {error!r}")
    assert not wrong and count > 120


def test_every_block_of_readme_and_tutorials_is_one_that_runs():
    """Each tutorial is followed by a test, and none has commands in a block that is not run."""
    tests = "".join(p.read_text(encoding="utf-8") for p in Path(__file__).parent.glob("test_*.py"))
    for page in [README, *(DOCS / "tutorials").glob("*.md")]:
        assert page == README or f'"tutorials" / "{page.name}"' in tests, page
        told = [text for language, text in blocks(page) if language not in ("bash", "python")]
        assert not any(COMMAND.match(line) for text in told for line in text.splitlines()), page


def test_every_python_block_compiles():
    """Of the other pages too, where a block may be a part of something."""
    found = [(page, text) for page in pages() for _, text in blocks(page, "python", "py")]
    for page, text in found:
        compile(text, str(page), "exec")
    assert len(found) >= 9


def test_links_lead_somewhere():
    wrong = []
    for page in [*pages(), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for found in LINK.findall(page.read_text(encoding="utf-8")):
            target = found[0] or found[1]
            if "://" not in target and not (page.parent / target).exists():
                wrong.append(f"{page.relative_to(ROOT)}: {target}")
    assert not wrong


def generator():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_what_works_with_what_is_of_this_code():
    told = (DOCS / "reference" / "combinations.md").read_text(encoding="utf-8")
    assert generator().combinations() == told, "run: python docs/generate.py"


def test_every_command_has_its_place_in_the_reference():
    from pipeline.cli.main import main
    from pipeline.owners import names_of

    told = generator().commands()
    assert all(f"\n## pipeline {name}" in told for name in main.commands)
    assert "`--reduction" in told and all(f"## tuner {name}" in told for name in names_of("tuner"))


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("furo", reason="the extra `docs` is not installed: the site not built")
    application = pytest.importorskip("sphinx.application")
    from io import StringIO

    warnings = StringIO()
    path, modules = list(sys.path), set(sys.modules)
    try:
        app = application.Sphinx(
            str(DOCS), str(DOCS), str(tmp_path / "out"), str(tmp_path / "trees"), "html", status=None, warning=warnings
        )
        app.build()
    finally:
        sys.path[:] = path
        for name in {"generate"} & (set(sys.modules) - modules):
            del sys.modules[name]
    assert not warnings.getvalue() and app.statuscode == 0
    first = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert "Your CSV to predictions" in first
    assert not re.search(r'src="https?://|<link[^>]+href="https?://', first)  # nothing is fetched; links may lead away
