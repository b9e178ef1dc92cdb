"""The house: four floors, imports go down only and never in a circle; files that can be read in one sitting; nothing
written twice."""

from __future__ import annotations

import ast
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = ("store", "extract", "train", "pipeline")
LINES = 400
TWICE = 6


def sources() -> dict[str, Path]:
    """Module → file, of everything that is installed."""
    found = {}
    for floor in FLOORS:
        for file in sorted((ROOT / floor).rglob("*.py")):
            path = file.relative_to(ROOT)
            if floor == "pipeline" and path.parts[1] in FLOORS[:3]:
                continue  # the links that make the other floors importable
            module = ".".join(
                path.with_suffix("").parts if floor == "pipeline" else ("pipeline", *path.with_suffix("").parts)
            )
            found[module.removesuffix(".__init__")] = file
    return found


MODULES = sources()


def imported(tree: ast.AST) -> set[str]:
    """Modules of ours that are imported, in functions too; those for a type checker alone are not."""
    if isinstance(tree, ast.If) and "TYPE_CHECKING" in ast.dump(tree.test):
        return set()
    found: set[str] = set()
    if isinstance(tree, ast.ImportFrom) and tree.module:
        members = {f"{tree.module}.{name.name}" for name in tree.names}
        found |= {m if m in MODULES else tree.module for m in members}
    elif isinstance(tree, ast.Import):
        found |= {name.name for name in tree.names}
    for child in ast.iter_child_nodes(tree):
        found |= imported(child)
    return found & MODULES.keys()


def packages(module: str) -> set[str]:
    """The packages that a module lies in."""
    parts = module.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))}


def needed(module: str, file: Path) -> set[str]:
    """What `module` imports, with the packages that each of these lies in and the module itself does not."""
    found = imported(ast.parse(file.read_text()))
    for target in list(found):
        found |= packages(target) & MODULES.keys() - packages(module)
    return found - {module}


GRAPH = {module: needed(module, file) for module, file in MODULES.items()}


def floor_of(module: str) -> int:
    parts = module.split(".")
    return FLOORS.index(parts[1]) if len(parts) > 1 and parts[1] in FLOORS else len(FLOORS) - 1


def test_imports_go_down_only() -> None:
    up = [f"{a} imports {b}" for a, targets in GRAPH.items() for b in targets if floor_of(b) > floor_of(a)]
    assert not up


def test_no_circle_of_imports() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_files_can_be_read_in_one_sitting() -> None:
    long = {m: n for m, file in MODULES.items() if (n := len(file.read_text().splitlines())) > LINES}
    assert not long


def said(file: Path) -> list[tuple[int, str]]:
    """Lines of code with their numbers: no blank ones, comments, imports, docstrings,
    signatures (a method repeats that of the one it overrides) nor fields of options."""
    text = file.read_text()
    skip: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        plain = isinstance(node, ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        )
        if plain or (isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call)):
            skip |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        elif isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            skip |= set(range(first, node.body[0].lineno))
    lines = ((i, line.strip()) for i, line in enumerate(text.splitlines(), 1))
    return [(i, line) for i, line in lines if line and i not in skip and not line.startswith("#")]


def test_no_six_lines_stand_twice() -> None:
    seen: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for module, file in MODULES.items():
        lines = said(file)
        for window in zip(*(lines[k:] for k in range(TWICE)), strict=False):
            text = tuple(line for _, line in window)
            if any(len(line) > 3 for line in text):
                seen[text].append(f"{module}:{window[0][0]}")
    twice = [" and ".join(places) for places in seen.values() if len(places) > 1]
    assert not twice
