"""Manifests of many segments are read side by side: a bucket or a network disk takes tens of milliseconds for each."""

from __future__ import annotations

from threading import Barrier

import pytest

from pipeline.store import Space
from pipeline.store.files.local import Files
from tests.store.helpers import sealed, space


class Together(Files):
    """Far away: it answers when `asked` manifests are asked for at the same time; otherwise reading fails after a
    while."""

    local = False

    def __init__(self, root: str, asked: int) -> None:
        super().__init__(root)
        self.asked, self.at_once, self.answered = asked, asked, 0
        self._all_here = Barrier(asked, self._count, timeout=30)

    def _count(self) -> None:
        self.answered += self.asked

    def read(self, name: str, limit: int) -> bytes:
        if name.endswith("/manifest.json"):
            self._all_here.wait()
        return super().read(name, limit)


@pytest.fixture(scope="module")
def many_segments(tmp_path_factory: pytest.TempPathFactory) -> Space:
    home = space(tmp_path_factory.mktemp("many"))
    for number in range(32):
        sealed(home, [number], states=("encoder.3",), columns=False)
    return home


@pytest.mark.parametrize("asked", [16, 32])
@pytest.mark.parametrize("ask", [lambda s: len(s.segments()) == 32, lambda s: s.verify() == []], ids=["open", "verify"])
def test_manifests_are_read_side_by_side(many_segments: Space, asked: int, ask) -> None:
    files = Together(many_segments.files.root, asked)
    assert ask(Space(files, many_segments.id))
    assert files.answered == 32
