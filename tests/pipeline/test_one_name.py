"""`pipeline` is the only import name: a user's own train.py, store.py, extract/ or store/ are in nobody's way."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("pipeline", "train", "extract", "store")
USE = """
import pipeline, sys
from pipeline.store import Store
from pipeline.extract.tasks import task_names
from pipeline.train.tuners import tuner_names
assert task_names() and "sherl" in tuner_names() and pipeline.__version__
mine = {"train", "store", "extract"} & set(sys.modules)
assert not mine, mine
from pipeline import api
assert pipeline.open_store is api.open_store
print("fine")
"""
# What needs no torch, and where the rest would be found.
LIGHT = """
import importlib.util, pipeline, sys
from pipeline.store import Store
from pipeline.extract.tasks import task_names
import pipeline.owners
assert task_names() and pipeline.__version__
for name in ("pipeline.train.tuners", "pipeline.extract.backbones", "pipeline.store.store"):
    assert importlib.util.find_spec(name).origin.startswith(sys.argv[1]), name
assert not {"train", "store", "extract"} & set(sys.modules)
print("fine")
"""


@pytest.fixture(params=["files", "packages", "empty folders"])
def crowded(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A working directory that holds the names of our folders."""
    for name in ("train", "store", "extract"):
        if request.param == "files":
            (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')\n")
            continue
        (tmp_path / name).mkdir()
        if request.param == "packages":
            (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong one')\n")
    return tmp_path


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A working directory with files, a package, a folder and a notebook of such names."""
    for name in ("train.py", "store.py", "extract/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("raise SystemExit('the wrong one')\n")
    (tmp_path / "store").mkdir()
    cells = [{"cell_type": "markdown", "source": ["# Mine"]}, {"cell_type": "code", "source": USE.splitlines(True)}]
    (tmp_path / "notebook.ipynb").write_text(json.dumps({"cells": cells, "nbformat": 4, "nbformat_minor": 5}))
    return tmp_path


# A kernel of Jupyter has the notebook's folder first on its path, as `python -c` has; no kernel is started here.
NOTEBOOK = """
import json, pathlib
for cell in json.loads(pathlib.Path("notebook.ipynb").read_text())["cells"]:
    if cell["cell_type"] == "code":
        exec("".join(cell["source"]))
"""


def ran(folder: Path, *command: str, **environment: str) -> str:
    """What a command printed, run in `folder`."""
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_in_a_directory_of_the_same_names(crowded: Path) -> None:
    (crowded / "use.py").write_text(LIGHT)
    assert ran(crowded, sys.executable, "use.py", str(ROOT), PYTHONPATH=str(ROOT)) == "fine\n"


def test_commands_there(mixed: Path) -> None:
    where = {"PYTHONPATH": str(ROOT)}
    assert ran(mixed, sys.executable, "-c", NOTEBOOK, **where) == "fine\n"
    assert "sherl" in ran(mixed, sys.executable, "-m", "pipeline", "tuners", **where)
    launched = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1", "-m", "pipeline", "--version"]
    assert "pipeline" in ran(mixed, *launched, **where)


def test_a_worker_of_a_cluster_there(mixed: Path) -> None:
    pytest.importorskip("distributed")
    (mixed / "use.py").write_text(
        "from distributed import Client, LocalCluster\n"
        "def names():\n"
        "    from pipeline.store.store import KIND\n"
        "    return KIND\n"
        "if __name__ == '__main__':\n"
        "    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as c, Client(c) as client:\n"
        "        print(client.submit(names).result())\n"
    )
    assert ran(mixed, sys.executable, "use.py", PYTHONPATH=str(ROOT)) == "activation-store\n"


def test_nothing_imports_the_folders_by_their_own_names() -> None:
    wrong = []
    for path in (p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong += [f"{path}: {name}" for name in names if name.split(".")[0] in ("train", "store", "extract")]
    assert not wrong


# What needs no torch, in the process itself and in a Dask worker.
WORKED = """
import sys
from distributed import Client, LocalCluster
def place():
    import pipeline.store.store
    return pipeline.store.store.__file__
if __name__ == "__main__":
    exec(open("light.py").read())
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        print(client.submit(place).result())
"""


def environment_beside(folder: Path) -> tuple[Path, Path]:
    """A fresh environment that sees the packages of this one: its Python, and where it keeps its own."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    return folder / "bin" / "python", site


def test_a_wheel_of_the_source_distribution(tmp_path: Path, mixed: Path) -> None:
    """Built by the setuptools that is here, without network; a Dask worker finds it as the process does."""
    pytest.importorskip("distributed")
    # Looked up, not imported: in a process that has distutils already, setuptools refuses to be.
    there = {d.metadata["Name"]: int(d.version.split(".")[0]) for d in importlib.metadata.distributions()}
    if "pip" not in there or there.get("setuptools", 0) < 77:
        pytest.skip("pip and setuptools 77 are not there: no wheel built")
    source, dist = tmp_path / "source", tmp_path / "dist"
    left_out = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", "tests", "docs", "configs", "*.egg-info")
    shutil.copytree(ROOT, source, symlinks=True, ignore=left_out)
    dist.mkdir()
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    ran(source, sys.executable, "-c", build, str(dist))
    (archive,) = dist.iterdir()
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    ran(dist, *pip, "wheel", *offline, "--no-build-isolation", str(archive))
    (wheel,) = dist.glob("*.whl")
    python, site = environment_beside(tmp_path / "env")
    ran(dist, *pip, "--python", str(python), "install", *offline, "--force-reinstall", str(wheel))

    def files(top: Path) -> set[Path]:
        """Those below `top`, through links."""
        walked = os.walk(top, followlinks=True)
        return {Path(folder, n).relative_to(top) for folder, _, names in walked for n in names if n[-4:] != ".pyc"}

    assert files(site / "pipeline") == files(source / "pipeline")
    (mixed / "light.py").write_text(LIGHT)
    (mixed / "use.py").write_text(WORKED)
    home = site / "pipeline"
    assert ran(mixed, str(python), "use.py", str(home)) == f"fine\n{home / 'store' / 'store.py'}\n"
    assert "sherl" in ran(mixed, str(python.with_name("pipeline")), "tuners")


def test_links_that_are_text_files_are_a_line(tmp_path: Path) -> None:
    """As git checks them out where the system has none: nothing must be installed as if all were well."""
    links = [".src/pipeline", "pipeline/extract", "pipeline/store", "pipeline/train"]
    shutil.copytree(ROOT / "pipeline", tmp_path / "pipeline", symlinks=True, ignore=shutil.ignore_patterns("*.pyc"))
    (tmp_path / ".src").mkdir()
    for name in links:
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).write_text(str((ROOT / name).readlink()))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    told = "symbolic links were checked out as text files; clone again with `git clone -c core.symlinks=true`"
    for words in (["-c", "import pipeline"], ["-m", "pipeline", "--version"], ["setup.py", "--version"]):
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode and told in done.stderr.splitlines()[-1], done.stderr


@pytest.mark.matrix
@pytest.mark.parametrize("how", ["wheel", "editable"])
def test_installed(tmp_path: Path, mixed: Path, how: str) -> None:
    """Built and installed into an environment of its own, beside the packages of this one."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(".git", "__pycache__", ".*_cache"))
    python, site = environment_beside(tmp_path / "env")
    target = [str(source)] if how == "wheel" else ["-e", str(source)]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps", "--force-reinstall"]
    ran(tmp_path, *pip, *target)
    (mixed / "use.py").write_text(USE + "print(pipeline.store.__file__)")
    printed = ran(mixed, str(python), "use.py")
    assert printed.startswith("fine\n") and str(site if how == "wheel" else source) in printed
    assert ran(mixed, str(python), "-c", NOTEBOOK) == "fine\n"
    assert "sherl" in ran(mixed, str(python), "-m", "pipeline", "tuners")
    assert "sherl" in ran(mixed, str(python.with_name("pipeline")), "tuners")
    assert "pipeline" in ran(mixed, str(python), "-m", "torch.distributed.run", "-m", "pipeline", "--version")
