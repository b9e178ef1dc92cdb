"""Options of tuners and objectives come from their configs: shown in groups, sorted to their owner, checked by it."""

from __future__ import annotations

import re

import pytest

from pipeline.owners import config_of, owned, recipe_of
from pipeline.recipe import field_names
from pipeline.store import UserError
from pipeline.train.tuners import tuner_names
from tests.pipeline.test_errors import refused, run


def sections(text: str) -> dict[str, str]:
    """Title → lines of a help page."""
    parts = re.split(r"^(\S.*):$", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_help_shows_the_options_of_the_chosen_in_groups():
    found = sections(run("train", "--tuner", "sherl", "--objective", "multilabel", "--help").output)
    assert {"Options", "Tuner sherl", "Objective multilabel"} == found.keys()
    assert "--blend" in found["Tuner sherl"] and "--threshold" in found["Objective multilabel"]
    assert "--blend" not in found["Options"] and "Default: 8." in " ".join(found["Tuner sherl"].split())
    assert "--blend" not in run("train", "--tuner", "lst", "--help").output
    extraction = sections(run("extract", "--for", "sherl,lst", "--help").output)
    assert "--insert" in extraction["Tuner sherl"] and "--init" in extraction["Tuner lst"]
    assert "--blend" not in "".join(extraction.values())  # training alone needs it


def test_the_recipe_file_chooses_too(tmp_path):
    (tmp_path / "recipe.yaml").write_text("tuner: e3va\n")
    assert "--alpha" in run("train", "--recipe", tmp_path / "recipe.yaml", "--help").output
    assert "--alpha" not in run("train", "--recipe", tmp_path / "recipe.yaml", "--tuner", "probe", "--help").output


def test_no_common_option_is_one_of_a_tuner():
    own = {o.name for o in owned(tuner_names(), None)}
    assert not own & set(field_names()) and {"reduction", "pooling", "threshold"} <= own


def test_flat_names_go_to_their_owners():
    flat = recipe_of("train", ("x", {"tuner": "lst", "reduction": 4, "init": "magnitude", "pooling": "first"}))
    assert flat.tuner_options == {"reduction": 4, "init": "magnitude"} and flat.objective_options == {
        "pooling": "first"
    }
    nested = {"tuner": "lst", "tuner-options": {"reduction": 4, "init": "magnitude"}}
    assert recipe_of("train", ("x", nested), ("y", {"objective_options": {"pooling": "first"}})) == flat
    later = recipe_of("train", ("file", nested), ("line", {"tuner_options": {"reduction": 2}}))
    assert later.tuner_options == {"reduction": 2, "init": "magnitude"}
    assert config_of(later, "lst").reduction == 2


def test_a_recipe_of_earlier_versions_says_nothing_of_other_tuners():
    old = {"tuner": "probe", "layers": [], "gate": None, "recompute": False, "alpha": None, "pooling": "mean"}
    recipe = recipe_of("train", ("recipe", old))
    assert recipe.tuner_options == {} and recipe.objective_options == {}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tuner": "lst", "reduction": "wide"}, "reduction: expected int"),
        ({"tuner": "lst", "tuner_options": 4}, "tuner_options: expected"),
        ({"tuner": "lst", "redaction": 4}, "unknown option 'redaction'; did you mean reduction"),
        ({"tuner": "lst", "objective": "regression", "threshold": 0.3}, "--threshold is an option of multilabel"),
        ({"tuner": "lst", "tuner_options": {"blend": "max"}}, "--blend is an option of sherl"),
    ],
)
def test_what_is_wrong_is_said(options, said):
    with pytest.raises(UserError, match=re.escape(said)):
        recipe_of("train", ("recipe", options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tuner": "lst", "reduction": 0}, "reduction: at least 1, not 0"),
        ({"tuner": "head2toe", "features": 1.5}, "features: above 0 and at most 1, not 1.5"),
        ({"tuner": "e3va", "fusion": "cold"}, "fusion: one of sum, highway, not 'cold'"),
    ],
)
def test_values_are_checked_by_the_owner(options, said):
    with pytest.raises(UserError, match=re.escape(said)):
        config_of(recipe_of("train", ("recipe", options)), options["tuner"])


def test_what_training_alone_takes_is_not_an_option_of_extraction():
    refused(run("extract", "--for", "sherl", "--blend", "max"), "--blend", "training")
    refused(run("train", "--tuner", "nonsense", "--help"), "nonsense")
