"""`verify --recompute` on a store of images: they are read again from the folder given, and only as they were."""

from __future__ import annotations

import json
import shutil

import pytest

from pipeline.extract.backbones.vit import Vit
from tests import vision
from tests.pipeline.test_errors import refused, run


@pytest.fixture(scope="module")
def made(checkpoints, tmp_path_factory):
    base = tmp_path_factory.mktemp("images")
    folder = vision.write_folder(base / "pictures", 12)
    options = ["--for", "probe", "--views", 2, "--view-seed", 3, "--image-size", 40]
    result = run("extract", "--model", checkpoints["vit"], "--task", folder, "--store", base / "store", *options)
    assert result.exit_code == 0, result.output
    return folder, ["store", "verify", "--store", base / "store", "--model", checkpoints["vit"], "--recompute"]


def test_images_computed_again_agree(made):
    folder, verify = made
    result = run(*verify, 100, "--data", folder, "--json")
    assert result.exit_code == 0, result.output
    (found,) = json.loads(result.stdout)["recomputed"]
    assert found["samples"] == 2 * 10 + 2 and found["absent"] == 0 and found["worst"] < 1e-3


def test_states_that_are_not_of_the_images_are_found(made, monkeypatch):
    folder, verify = made
    embedded = Vit.embedded
    monkeypatch.setattr(Vit, "embedded", lambda self, model, pixels: embedded(self, model, pixels * 1.1))
    result = run(*verify, 2, "--data", folder)
    assert result.exit_code == 1 and "encoder.3" in result.stderr


def test_images_that_are_not_at_hand_are_passed_over_and_counted(made, tmp_path):
    folder, verify = made
    shutil.copytree(folder, tmp_path / "some")
    for path in (tmp_path / "some" / "left").iterdir():
        path.unlink()
    shutil.copy(tmp_path / "some" / "upper" / "001.png", tmp_path / "some" / "upper" / "003.png")  # edited
    result = run(*verify, 100, "--data", tmp_path / "some")
    assert result.exit_code == 0 and "passed over" in result.stdout
    found = json.loads(run(*verify, 100, "--data", tmp_path / "some", "--json").stdout)["recomputed"][0]
    assert found["samples"] + found["absent"] == 22 and 5 <= found["samples"] <= 10
    both = json.loads(run(*verify, 100, "--data", tmp_path / "some", "--data", folder, "--json").stdout)["recomputed"]
    assert both[0]["absent"] == 0


def test_without_the_images_it_says_what_to_give(made, tmp_path):
    refused(run(*made[1], 2), "--data")
    refused(run(*made[1], 2, "--data", tmp_path), "--data", "relative to")
