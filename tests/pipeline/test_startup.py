"""What a command imports before it does anything. Modules are counted, never seconds: `tests/benchmarks/startup.py` has
those."""

from __future__ import annotations

import gc
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline
from pipeline import catalog
from pipeline.catalog import FAMILIES, TUNERS
from pipeline.cli.command import imports
from pipeline.extract.backbones import backbone_classes
from pipeline.importing import uncollected
from pipeline.train import configs, objective_configs
from pipeline.train.objectives import objective_class
from pipeline.train.tuners import base, tuner_class, tuner_names

HEAVY = ("torch", "transformers", "tokenizers", "datasets", "timm", "scipy", "sklearn", "PIL", "dask", "zarr")
CODE = """
import json, sys
from click.testing import CliRunner
from pipeline.cli.main import main
heavy, *lines = map(json.loads, sys.argv[1:])
for words in lines:
    done = CliRunner().invoke(main, words)
    loaded = [name for name in heavy if name in sys.modules]
    assert done.exit_code == 0 and not loaded, f"{words} imports {loaded}: {done.output}"
"""
LINES = [[], ["--version"], ["tuners"], ["models"], ["tasks"], ["tasks", "--json"], ["store", "--help"]]
LINES += [
    [name, "--help"]
    for name in ("extract", "train", "sweep", "plan", "bench", "compare", "evaluate", "predict", "demo")
]


def test_help_and_lists_import_nothing_heavy() -> None:
    words = [json.dumps(value) for value in (HEAVY, *LINES)]
    done = subprocess.run([sys.executable, "-c", CODE, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("module", ["pipeline", "pipeline.extract.tasks", "pipeline.recipe", "pipeline.store.errors"])
def test_light_modules_stay_light(module: str) -> None:
    code = f"import sys, {module}; assert not [m for m in {HEAVY} if m in sys.modules]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


RUN = """
import sys, pipeline.runs, pyarrow as pa
from pipeline.store.tables.texts import Texts
child = pa.Array.from_buffers(pa.string(), 3, [None, pa.py_buffer(bytes(16)), pa.py_buffer(b"")])
offsets = pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in (0, 2, 2, 3)))
column = pa.Array.from_buffers(pa.list_(pa.string()), 3, [None, offsets], children=[child])
print(Texts(pa.chunked_array([column[:1], column[1:]]), False).counts())
print([m for m in ("zarr", "datasets", "scipy.stats", "timm", "pandas") if m in sys.modules])
"""


def test_reading_a_run_imports_no_library_that_only_training_needs() -> None:
    """`predict` and `evaluate` begin here; what torch and transformers import themselves is theirs."""
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == "[2 0 1]\n[]\n"


TRAINED = """
import sys
from click.testing import CliRunner
from pipeline.cli.main import main
model, table, store, run = sys.argv[1:]
rows = "--task", table, "--text", "first", "--text-pair", "second", "--label", "label"
train = ["train", "--model", model, *rows, "--store", store, "--tuner", "probe", "--epochs", "1", "--out", run]
for words in (train, ["evaluate", run]):
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
print([m for m in ("sklearn", "scipy.stats", "datasets", "timm", "pandas", "distributed") if m in sys.modules])
"""


def test_a_small_run_imports_no_library_that_it_has_no_use_for(
    checkpoints: dict[str, Path], table: Path, tmp_path: Path
) -> None:
    rows = {"task": str(table), "text": "first", "text_pair": "second", "label": "label"}
    pipeline.open_store(tmp_path / "store", create=True).extract(model=str(checkpoints["bert"]), **rows)
    words = [str(checkpoints["bert"]), str(table), str(tmp_path / "store"), str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", TRAINED, *words], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_lists_say_what_the_classes_say() -> None:
    ours = {n: tuner_class(n) for n in tuner_names()}  # other tests may have registered theirs
    assert {n: c.description for n, c in ours.items() if c.__module__.startswith("pipeline.")} == TUNERS
    assert {n: tuner_class(n).config_class for n in TUNERS} == configs.TUNERS and [*TUNERS] == [*configs.TUNERS]
    assert {n: objective_class(n).config_class for n in objective_configs.OBJECTIVES} == objective_configs.OBJECTIVES
    assert {f.name: (f.description, f.model_types) for f in backbone_classes()} == FAMILIES


def test_a_tuner_of_the_users_own_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(base.Tuner):
        description = "mine"

    monkeypatch.setitem(base._TUNERS, "mine", Mine)
    assert catalog.tuners()["mine"] == "mine" and catalog.tuners()["lst"] == TUNERS["lst"]


def test_what_python_imports_is_collected_as_before() -> None:
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    with pytest.raises(ImportError), uncollected():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled() and not gc.get_freeze_count()


def test_what_a_command_imports_is_not_collected_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """But the collector of a process that has torch already, a user's, is left as it is."""
    with imports():
        assert not gc.isenabled()
    assert gc.isenabled() and not gc.get_freeze_count()
    monkeypatch.delitem(sys.modules, "torch")
    try:
        with imports():
            pass
        assert gc.isenabled() and gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()


ENDING = """
import atexit, sys, types, weakref
from pipeline.__main__ import run

class Held:
    def __del__(self):
        print("taken apart", flush=True)

held, keep = Held(), Held()
sys.argv = ["pipeline", *sys.argv[1:]]

def main():
    weakref.finalize(keep, print, "finalized")
    atexit.register(print, "at exit")
    sys.stdout.write("unflushed\\n")
    del sys.modules["pipeline.cli.main"]
    from pipeline.cli.main import main
    main()

sys.modules["pipeline.cli.main"] = types.SimpleNamespace(main=main)
run()
"""


@pytest.mark.parametrize("words", [["tuners", "--json"], ["evaluate", "nowhere"]])
def test_a_process_ends_in_order_and_at_once(words: list[str]) -> None:
    """Exit functions run, output is written, the status is the command's; nothing is taken apart after that."""
    done = subprocess.run([sys.executable, "-c", ENDING, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == (0 if words[0] == "tuners" else 2)
    lines = done.stdout.splitlines()
    assert {"unflushed", "finalized", "at exit"} <= {*lines} and "taken apart" not in lines


def test_code_of_others_is_taken_apart_in_order(tmp_path: Path) -> None:
    """A file that a module of the user's leaves open is written, exit functions of before are run."""
    (tmp_path / "plug.py").write_text("log = open('plug.log', 'w')\nlog.write('hello')\n")
    (tmp_path / "sitecustomize.py").write_text("import atexit\natexit.register(print, 'from before')\n")
    words = [sys.executable, "-m", "pipeline"]
    done = subprocess.run(
        [*words, "train", "--import", "plug.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2 and (tmp_path / "plug.log").read_text() == "hello", done.stderr
    before = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([*words, "tuners"], env=before, capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("from before\n")


def test_a_closed_output_is_no_error() -> None:
    line = f"{shlex.quote(sys.executable)} -m pipeline tuners >&-"
    done = subprocess.run(["sh", "-c", line], stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == ""


def test_a_result_that_cannot_be_written_is_one_line() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with full.open("w") as out:
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", "tuners", "--json"], stdout=out, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2 and done.stderr == "error: the result could not be written: No space left on device\n"


def test_an_interrupt_during_imports_is_one_line() -> None:
    code = """
import sys, types
from pipeline.__main__ import run
def main():
    raise KeyboardInterrupt
sys.modules["pipeline.cli.main"] = types.SimpleNamespace(main=main)
run()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")
