"""Lines that people read say what is so, in figures that can be read."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from pipeline.catalog import BASELINES
from pipeline.cli.main import main
from pipeline.commands.projection import widths_text
from pipeline.commands.sweep_table import _shown
from pipeline.extract.backbones.images import open_image
from pipeline.store.errors import UserError
from pipeline.terminal import entries_text, inputs_text, models_text
from tests.pipeline.test_errors import refused, run


@pytest.mark.parametrize(
    ("identity", "said"),
    [
        ({"max_length": 128}, "texts up to 128 tokens"),
        ({"max_length": 64, "stride": 8}, "texts up to 64 tokens, longer ones in windows 8 tokens apart"),
        ({"max_length": 128, "image_size": "224x96"}, "images of 224x96"),
        ({"max_length": 128, "image_size": "own"}, "images of their own size"),
        ({"image_size": "short:800"}, "images with a shorter side of 800"),
        ({"image_size": "short:8:13"}, "images with a shorter side of 8 and a longer of at most 13"),
        ({}, ""),
    ],
)
def test_images_are_not_called_texts(identity, said):
    assert inputs_text(identity) == said


def test_a_family_without_model_types_has_no_empty_list():
    assert "(model types: )" not in models_text() and "(model types: t5)" in models_text()


def test_a_difference_of_nothing_has_no_sign_of_its_own():
    assert [_shown("accuracy", x, True) for x in (-1e-9, 1e-9, -0.01)] == ["+0.0", "+0.0", "-1.0"]


def test_no_command_of_the_store_is_cut_short_in_help():
    told = CliRunner().invoke(main, ["store", "--help"]).output.partition("Commands:")[2]
    assert "status" in told and "..." not in told


def test_help_of_compare_names_every_baseline():
    told = "".join(CliRunner().invoke(main, ["compare", "--help"]).output.split())
    assert f"livebaselines:{','.join(BASELINES)}." in told  # lines break at blanks and hyphens


def test_one_run_is_one_run(checkpoints, table, tmp_path):
    rows = ["--model", checkpoints["bert"], "--task", table, "--store", tmp_path / "s"]
    run("extract", *rows, "--text", "first", "--label", "label", "--for", "probe")
    told = run("sweep", *rows, "--tuner", "probe", "--epochs", 1, "--out", tmp_path / "sweep").output
    assert "1 run: 1 setting, 1 seed\n" in told and ": 1 run over " in told


def test_defaults_are_figures_that_can_be_read():
    told = CliRunner().invoke(main, ["train", "--help"]).output
    assert "14.2857142" not in told and "hinge" in told.partition("--data")[0]


def test_a_missing_image_says_which_command_leaves_it_out(tmp_path, checkpoints):
    (tmp_path / "a.csv").write_text("image,label\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(20)))
    rows = ["--task", tmp_path / "a.csv", "--image", "image", "--label", "label"]
    told = run("extract", "--model", checkpoints["resnet"], *rows, "--store", tmp_path / "s")
    refused(told, "no such file; add it, name its folder by --data, or leave it out: --skip-bad of `pipeline extract`")


def test_a_video_is_no_damaged_image(tmp_path):
    (tmp_path / "film.MP4").write_bytes(b"film")
    with pytest.raises(UserError, match=r"a video, not an image; .*--frames N"):
        open_image(tmp_path / "film.MP4")


def test_a_table_names_the_best_objects_and_how_many_there_are():
    found = [{"label": "tree", "category_id": 1, "score": 0.9 - 0.1 * i, "bbox": [0, 0, 1, 1]} for i in range(40)]
    told = entries_text([{"id": "a.png", "objects": found}, {"id": "b.png", "objects": []}])
    assert "40: tree 0.9000, tree 0.8000, tree 0.7000, …" in told and max(map(len, told.splitlines())) < 80


def test_widths_say_what_is_projected():
    basis = dict.fromkeys(("a", "b"))
    backbone = SimpleNamespace(projection=SimpleNamespace(basis=basis, width=6), state_width=lambda _: 8, width=1280)
    assert widths_text(["a", "b"], backbone) == "2 states projected to 6"
    assert widths_text(["a", "b", "c"], backbone) == "1 state of width 8 and 2 projected to 6"
