"""Every command line that is printed is complete: read by a shell and by click it is the recipe it was made from."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

import pytest

from pipeline.cli.main import main
from pipeline.cli.options import build_recipe
from pipeline.command_lines import command_line, extraction, quoted
from pipeline.cost import plan as planning
from pipeline.extract.options import about
from pipeline.owners import owned
from pipeline.recipe import Recipe, read_recipe
from pipeline.train.tuners import tuner_names
from tests import tiny
from tests.pipeline.test_errors import refused, run

NASTY = 'it\'s a  b\t$HOME `x` \\ "q"\n{0}\u00a0é'


def words(line: str) -> list[str]:
    """What a shell makes of `line`."""
    out = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True, env={"LC_ALL": "C.UTF-8"}
    )
    return out.stdout.decode().split("\0")[:-1]


def parsed(line: str) -> tuple[str, Recipe]:
    """The command and the recipe that the software reads out of a printed line."""
    program, command, *rest = words(line)
    assert program == "pipeline"
    given = main.commands[command].make_context(command, rest).params  # type: ignore[attr-defined]
    assert not any(given.pop(manner) for manner in ("as_json", "quiet", "verbose"))
    recipe_file = given.pop("recipe_file")
    return command, build_recipe(
        command, {k: v for k, v in given.items() if k not in ("budget", "memory")}, recipe_file
    )


def taken(recipe: Recipe, command: str) -> Recipe:
    """`recipe` without what `command` does not take."""
    others = {f.name: f.default for f in COMMON if command not in f.metadata["on"]}
    own: dict[str, dict[str, Any]] = {"tuner_options": {}, "objective_options": {}}
    names = recipe.tuners if command == "extract" else (recipe.tuner,)
    for option in owned(names, recipe.objective, command == "extract"):
        kept, given = own[f"{option.kind}_options"], getattr(recipe, f"{option.kind}_options")
        kept |= {k: v for k, v in given.items() if k == option.name}
    return replace(recipe, **others | own)


COMMON = [f for f in fields(Recipe) if f.metadata["on"]]


def unlike_default(field: Any, hint: Any, choices: tuple[str, ...]) -> Any:
    """Some valid value of an option that is not its default."""
    kind = next((k for k in get_args(hint) if k is not type(None)), hint) if type(None) in get_args(hint) else hint
    if choices:
        return next(c for c in reversed(choices) if c != field.default)
    if args := get_args(kind):
        return (args[0](3), args[0](5))
    return {bool: not field.default, int: 7, float: 0.3, str: NASTY}[kind]


def full(tuner: str, objective: str) -> Recipe:
    """A recipe with every option of all runs, of a tuner and of an objective."""
    hints = get_type_hints(Recipe)
    common = {f.name: unlike_default(f, hints[f.name], f.metadata["choices"]) for f in COMMON}
    own: dict[str, Any] = {"tuner": {}, "objective": {}}
    for option in owned([tuner], objective):
        own[option.kind][option.name] = unlike_default(option.field, option.hint, about(option.field).choices)
    chosen = {"tuner": tuner, "tuners": (tuner,), "objective": objective, "imports": (), "report_to": ("wandb",)}
    return Recipe(**common | chosen, tuner_options=own["tuner"], objective_options=own["objective"])


FULL = full("sherl", "multilabel")


@pytest.mark.parametrize("command", ["extract", "train"])
@pytest.mark.parametrize("tuner", tuner_names())
def test_every_option_comes_back(command, tuner):
    asked = full(tuner, "multilabel")
    name, found = parsed(command_line(command, asked))
    assert name == command and found == taken(asked, command)
    shown = " ".join(command_line(command, asked).split())  # an error is shown as one line, blanks joined
    assert parsed(shown)[1] == found
    assert parsed(command_line(command, Recipe()))[1] == Recipe()


def test_a_recipe_file_comes_back(tmp_path):
    (tmp_path / "recipe.yaml").write_text(FULL.to_yaml())
    assert build_recipe("train", {}, str(tmp_path / "recipe.yaml")) == FULL


@pytest.mark.parametrize("text", ["", " ", "a b", "two  blanks", " edge ", "it's", "a\nb", "\x01f", "$'x'", "\u3000"])
def test_a_word_survives_the_shell_and_being_shown_in_one_line(text):
    assert words(" ".join(f"echo {quoted(text)}".split())) == ["echo", text]


def test_an_extraction_reads_what_training_reads():
    """Everything both take is carried over, save what means something else there."""
    made = extraction(FULL)
    both = [f.name for f in COMMON if f.metadata["on"] == ["extract", "train"]]
    differ = {n for n in both if getattr(made, n) != getattr(FULL, n)}
    assert differ == {"batch_size", "seed"} and made.tuners == (FULL.tuner,)


@pytest.fixture
def own(tmp_path):
    """A task in three files with a column each for text and label, below a folder with a blank in its name."""
    folder = tmp_path / "my task"
    folder.mkdir()
    for seed, split in enumerate(("train", "dev", "held out")):
        tiny.write_table(folder / f"{split}.tsv", 30 if split == "train" else 14, seed)
    return folder


@pytest.fixture
def options(own, checkpoints, tmp_path):
    return {
        "model": str(checkpoints["bert"]), "task": str(own / "train.tsv"), "validation": str(own / "dev.tsv"),
        "test": str(own / "held out.tsv"), "text": "first", "text_pair": "second", "label": "label",
        "store": str(tmp_path / "store"), "max_length": 16, "truncation_side": "left", "precision": "bfloat16",
        "attention": "eager",
    }  # fmt: skip


@pytest.fixture
def no_measuring(monkeypatch):
    for name, value in (("backbone_rate", 1e9), ("step_seconds", 0.01), ("decode_rate", 1e9)):
        monkeypatch.setattr(planning.measured, name, lambda *a, value=value: value)
    monkeypatch.setattr(planning.measured, "disk_rates", lambda *a: (1e9, 1e9, 1e9))


@pytest.mark.parametrize("more", [{}, {"budget": "40kB"}, {"memory": "100kB"}])
def test_plan_prints_what_it_planned(options, more, no_measuring):
    recipe = Recipe(**options, tuner="lst", lr=2e-3, epochs=3, batch_size=8, seed=2, accumulate=3,
                    tuner_options={"reduction": 4})  # fmt: skip
    budget, memory = (None if more.get(k) is None else planning_size(more[k]) for k in ("budget", "memory"))
    plan, text = planning.run_plan(recipe, budget, memory)
    extract, train = plan["commands"]
    assert f"  {extract}\n  {train}" in text
    asked = replace(recipe, format=plan["format"])
    if budget is not None:
        asked = replace(asked, limit=parsed(extract)[1].limit)
        assert asked.limit
    if memory is not None:
        found = parsed(train)[1]
        assert found.batch_size < 8 and found.batch_size * found.accumulate >= 8 * 3
        asked = replace(asked, batch_size=found.batch_size, accumulate=found.accumulate, host_memory="0")
    asked = replace(asked, live=parsed(train)[1].live)
    assert parsed(train) == ("train", taken(asked, "train"))
    assert parsed(extract) == ("extract", taken(extraction(asked), "extract"))


def planning_size(text: str) -> float:
    from pipeline.store.sizes import parse_size

    return float(parse_size(text))


def line_of(error: str) -> str:
    """The command that an error ends in."""
    found = re.search(r"run: (pipeline .*)$", error)
    assert found, error
    return found[1]


def argv(recipe: Recipe, command: str) -> list[str]:
    return words(command_line(command, recipe))[1:]


def test_the_commands_of_errors_lead_to_the_run_that_was_asked_for(options, tmp_path):
    """Each refusal of `train` says a command; followed, the next one says less, until it trains on the given splits."""
    asked = Recipe(
        **options, tuner="lst", tuner_options={"reduction": 4}, epochs=1, batch_size=8, out=str(tmp_path / "run")
    )
    other = replace(extraction(asked), task=options["validation"], validation=None, test=None,
                    tuners=("probe",), tuner_options={})  # fmt: skip
    assert run(*argv(other, "extract")).exit_code == 0
    line = line_of(refused(run(*argv(asked, "train"))))  # of this task there is nothing in the store
    assert parsed(line)[1] == taken(extraction(asked), "extract")
    probe = replace(parsed(line)[1], tuners=("probe",), tuner_options={})
    assert run(*argv(probe, "extract")).exit_code == 0
    line = line_of(refused(run(*argv(asked, "train"))))  # states of another tuner
    assert parsed(line)[1] == taken(extraction(asked), "extract")
    # A teammate leaves out what the store knows: the command says it.
    short = replace(asked, max_length=None, truncation_side=None, precision=None, attention=None)
    line = line_of(refused(run(*argv(short, "train"))))
    assert parsed(line)[1] == taken(extraction(asked), "extract")
    assert run(*words(line)[1:]).exit_code == 0
    done = run(*argv(asked, "train"))
    assert done.exit_code == 0, done.output
    assert "30 train rows" in done.stderr  # nothing was held out: the other two files are validation and test


@pytest.mark.parametrize("differing", [{"max_length": 12}, {"format": "bfloat16", "attention": "sdpa"}])
def test_where_no_space_fits_the_extraction_that_makes_one_is_told(options, tmp_path, differing):
    """By `train`, and by `compare` that of all its methods, tuners alone among them."""
    there = Recipe(**options, tuners=("probe",))
    assert run(*argv(there, "extract")).exit_code == 0
    asked = Recipe(**{**options, **differing}, tuner="lst", tuner_options={"reduction": 4}, epochs=1)
    line = line_of(refused(run(*argv(replace(asked, out=str(tmp_path / "run")), "train")), "no feature space fits"))
    assert parsed(line)[1] == taken(extraction(asked), "extract")
    common = [*argv(replace(asked, tuner="sherl"), "train")[1:], "--out", tmp_path / "runs"]
    compare = ["compare", *common, "--tuners", "bitfit,unipt,lst"]
    line = line_of(refused(run(*compare), "no feature space fits", *map(str, differing)))
    told = replace(extraction(asked), tuners=("unipt", "lst"), tuner_options={"reduction": 4})
    assert parsed(line)[1] == taken(told, "extract")
    assert run(*words(line)[1:]).exit_code == 0
    assert run(*compare).exit_code == 0


def test_an_extraction_that_would_be_refused_is_not_told(options, tmp_path):
    assert run(*argv(Recipe(**options, tuners=("probe",)), "extract")).exit_code == 0
    train = argv(Recipe(**options, tuner="sherl", epochs=1, out=str(tmp_path / "run")), "train")
    for more in (["--image-size", 64], ["--prompt", "say {0}"], ["--max-length", 12, "--tuner", "fixed"]):
        assert "pipeline extract" not in refused(run(*train, *more), "no feature space fits", "extract")


def test_a_run_that_was_not_finished_says_how_to_go_on(options, tmp_path):
    folder = tmp_path / "half a run"
    folder.mkdir()
    asked = Recipe(**options, tuner="lst", epochs=1)
    (folder / "recipe.yaml").write_text(asked.to_yaml())
    line = line_of(refused(run("evaluate", folder)))
    assert parsed(line) == ("train", replace(asked, out=str(folder)))


def extracted(command: list[str]) -> tuple[str, str]:
    """The feature space that an extraction names, by its first characters, and the command that it ends with."""
    result = run(*command)
    assert result.exit_code == 0, result.output
    (space,), (line,) = (re.findall(p, result.stderr, re.M) for p in (r"^space ([0-9a-f]+):", r"^next: (.*)$"))
    return space, line


@pytest.mark.parametrize("differing", [{"max_length": 12}, {"format": "bfloat16", "truncation_side": "left"}])
def test_where_two_spaces_fit_training_is_told_which(options, tmp_path, differing, no_measuring):
    """Pasted, what `plan` and `extract` print trains from the space that they are about."""
    usual = dict.fromkeys(("max_length", "truncation_side", "precision", "attention"))
    lst: dict[str, Any] = {"tuner": "lst", "tuners": ("lst",), "tuner_options": {"reduction": 4}, "epochs": 1}
    asked = Recipe(**options | usual | lst)
    other = argv(replace(asked, **differing), "extract")
    _, alone = extracted(other)
    assert parsed(alone)[1] == replace(asked, **differing, tuners=Recipe().tuners, epochs=None)  # no more than it takes
    plan, _ = planning.run_plan(asked, None, None)
    extract, train = plan["commands"]
    space, line = extracted(words(extract)[1:])
    for number, (where, told) in enumerate(((space, train), (space, line), extracted(other))):
        done = run(*words(told)[1:], "--epochs", 1, "--out", tmp_path / f"run {number}", "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["space"].startswith(where)


def test_where_no_option_tells_spaces_apart_the_space_is_named(checkpoints, tmp_path):
    texts = tmp_path / "texts.csv"
    texts.write_text("text\n" + "\n".join(" ".join(tiny.WORDS[i % 5 :][:20]) for i in range(30)) + "\n")
    options = {"model": str(checkpoints["decoder"]), "task": str(texts), "store": str(tmp_path / "store")}
    asked = Recipe(**options, text="text", max_length=8, tuners=("qst",))
    extracted(argv(replace(asked, stride=4), "extract"))
    space, line = extracted(argv(asked, "extract"))
    assert parsed(line)[1].space == space
    done = run(*words(line)[1:], "--epochs", 1, "--out", tmp_path / "run", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["space"].startswith(space)


def test_a_prompt_that_the_store_has_is_said(checkpoints, table, tmp_path):
    options = {"model": str(checkpoints["t5"]), "task": str(table), "text": "first", "label": "label",
               "store": str(tmp_path / "store"), "tuner_options": {"reduction": 4}, "tuner": "lst"}  # fmt: skip
    asked = Recipe(**options, prompt=NASTY.replace("é", ""))
    assert run(*argv(replace(extraction(asked), tuners=("probe",), tuner_options={}), "extract")).exit_code == 0
    line = line_of(refused(run(*argv(replace(asked, prompt=None), "train"))))
    assert parsed(line)[1] == taken(extraction(asked), "extract")


def test_views_and_size_that_the_store_has_are_said(checkpoints, pictures, tmp_path):
    options = {"model": str(checkpoints["vit"]), "task": str(pictures), "store": str(tmp_path / "store")}
    asked = Recipe(**options, tuner="sherl", views=3, view_seed=5, image_size="40x40", limit=8)
    assert run(*argv(replace(extraction(asked), tuners=("probe",)), "extract")).exit_code == 0
    line = line_of(refused(run(*argv(Recipe(**options, tuner="sherl", limit=8), "train"))))
    assert parsed(line)[1] == taken(extraction(asked), "extract")


def test_a_damaged_store_is_named_in_the_command(options, tmp_path):
    asked = Recipe(**{**options, "store": str(tmp_path / "a store")}, tuners=("probe",))
    assert run(*argv(asked, "extract")).exit_code == 0
    next((tmp_path / "a store").rglob("c.0")).write_bytes(b"x")
    said = run("store", "verify", "--store", tmp_path / "a store")
    assert said.exit_code == 1
    line = re.search(r"`(pipeline store [^`]*)`", said.stderr)[1]  # type: ignore[index]
    assert words(line) == ["pipeline", "store", "repair", "--store", str(tmp_path / "a store")]


@pytest.mark.parametrize("more", [[], ["--stratify"], ["--separator", "|"], ["--columns", "review,verdict"]])
def test_a_changed_table_is_extracted_again_as_it_was_read(checkpoints, tmp_path, more):
    """Its columns, and what else says how, are in no name that the user gave this time."""
    table, store = tmp_path / "names.csv", tmp_path / "store"
    rows = [f"a film of number {i},{'good' if i % 2 else 'bad'}" for i in range(40)]
    head = [] if "--columns" in more else ["review,verdict"]
    table.write_text("\n".join([*head, *rows]))
    task = ["--model", checkpoints["bert"], "--task", table, "--store", store]
    assert run("extract", *task, "--text", "review", "--label", "verdict", "--for", "probe", *more).exit_code == 0
    table.write_text("\n".join([*head, *rows[5:], *["another film,good"] * 5]))
    train = ["train", *task, "--tuner", "probe", "--epochs", 1, "--out", tmp_path / "run"]
    line = refused(run(*train), "has changed", "--text review", "--label verdict", *more[:1])
    again = words(line[line.index("pipeline extract") :])
    assert run(*again[1:]).exit_code == 0 and run(*train).exit_code == 0
    recipe = read_recipe(tmp_path / "run" / "recipe.yaml")
    assert bool(recipe["stratify"]) == ("--stratify" in more)
    assert recipe["objective"] == ("multilabel" if "--separator" in more else "classification")


def test_a_table_beside_others_is_told_without_columns(checkpoints, tmp_path):
    """Where its validation rows came from is not known: a command without them would draw some."""
    table, held = tmp_path / "names.csv", tmp_path / "held.csv"
    rows = [f"a film of number {i},{'good' if i % 2 else 'bad'}" for i in range(40)]
    table.write_text("\n".join(["review,verdict", *rows]))
    held.write_text("\n".join(["review,verdict", "a new film,good", "an old film,bad"]))
    task = ["--model", checkpoints["bert"], "--task", table, "--store", tmp_path / "store"]
    more = ["--text", "review", "--label", "verdict", "--validation", held, "--for", "probe"]
    assert run("extract", *task, *more).exit_code == 0
    table.write_text("\n".join(["review,verdict", *rows[5:]]))
    line = refused(run("train", *task, "--tuner", "probe", "--out", tmp_path / "run"), "has changed")
    assert "--text" not in line
