"""Questions about many files of a store on a disk."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pipeline.store import StoreError
from pipeline.store.files.local import Files


def test_sizes_of_many_files_are_those_of_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is looked up once, and links are judged one by one as ever."""
    files = Files(tmp_path / "store")
    for name in ("a/1", "a/b/2", "a/b/3", "c"):
        path = tmp_path / "store" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * int(f"0x{name[-1]}", 16))
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "5").write_bytes(b"x")
    for name, to in {"a/within": "../c", "a/near": "b", "a/out": "../../outside/5", "a/away": "../../outside"}.items():
        (tmp_path / "store" / name).symlink_to(to)
    names = ["1", "b/2", "b/3", "b/none", "none/none", "1/none", "within", "near/2"]
    expected = {name: files.size(f"a/{name}") for name in names}
    asked: list[str] = []
    path_of = Files.path
    monkeypatch.setattr(Files, "path", lambda self, name: asked.append(name) or path_of(self, name))
    assert files.sizes("a", names[:6]) == {name: expected[name] for name in names[:6]} and asked == ["a"]
    assert files.sizes("a", names) == expected == dict(zip(names, [1, 2, 3, None, None, None, 12, 2], strict=True))
    for name in ("out", "away/5"):
        with pytest.raises(StoreError, match="symbolic link out of the store"):
            files.sizes("a", [name])


@pytest.mark.parametrize(("waited", "threads"), [(0.0, 2), (1e9, 1)])
def test_files_are_asked_side_by_side_where_answers_are_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waited: float, threads: int
) -> None:
    monkeypatch.setattr("pipeline.store.files.local.WAITED", waited)
    asked: list[int] = []
    together = threading.Barrier(threads)

    def ask(number: int) -> int:
        asked.append(threading.get_ident())
        together.wait(20)
        return number * 2

    assert Files(tmp_path).each(ask, range(200)) == [number * 2 for number in range(200)]
    assert (threading.get_ident() in asked) == (threads == 1) and (len(set(asked)) > 1) == (threads > 1)
    with pytest.raises(ZeroDivisionError):
        Files(tmp_path).each(lambda number: 1 // number, [1, 0])
    assert Files(tmp_path).each(ask, []) == []
