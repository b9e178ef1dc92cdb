"""A flipped bit in a run's files is found by whoever reads them; files without digests are read, with a word."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.store.errors import Notice, UserError
from pipeline.train.fit import run_files as checkpoint
from tests.train.test_loop import Killed, Stopping, course, kill, source, toy_space, train  # noqa: F401 (a fixture)

CONTENT = {"a": torch.arange(6.0).view(2, 3), "b.c": torch.ones(3, dtype=torch.bfloat16), "n": torch.tensor(7)}


def flips(path: Path, step: int = 1) -> Iterator[int]:
    """Flips one bit of every `step`th byte of `path`, one after the other, and puts it right again."""
    raw = path.read_bytes()
    for place in range(0, len(raw), step):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << (place * 5 % 8)
        path.write_bytes(damaged)
        yield place
    path.write_bytes(raw)


def test_no_flipped_bit_is_read(tmp_path: Path) -> None:
    path = tmp_path / checkpoint.TUNER
    checkpoint.save_tuner(path, CONTENT, {"space": "abc", "epoch": 3})
    found = 0
    for place in flips(path):
        try:
            tensors, info = checkpoint.load(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            found += 1
            continue
        # What is left is the blanks that fill up the header.
        assert info == {"space": "abc", "epoch": 3} and tensors.keys() == CONTENT.keys(), place
        assert all(torch.equal(t, CONTENT[n]) and t.dtype == CONTENT[n].dtype for n, t in tensors.items()), place
    assert found > 0.9 * path.stat().st_size
    assert checkpoint.load(path)[1]["epoch"] == 3


def cut_off(run: Path) -> Path:
    with pytest.raises(Killed):
        train(run, train_source=Stopping(source(), 8, kill), checkpoint_every=2)
    return run / checkpoint.RESUME


def test_a_run_does_not_go_on_from_a_damaged_checkpoint(tmp_path: Path) -> None:
    path = cut_off(tmp_path)
    for _ in flips(path, path.stat().st_size // 16):
        with pytest.raises(UserError, match=str(path)):
            train(tmp_path, checkpoint_every=2)
    train(tmp_path, checkpoint_every=2)


def test_a_run_does_not_go_on_with_a_damaged_log(tmp_path: Path) -> None:
    cut_off(tmp_path)
    log = tmp_path / "log.jsonl"
    whole = log.read_text()
    first = json.loads(whole.splitlines()[0])["loss"]
    log.write_text(whole.replace(str(first), str(first + 1)))
    with pytest.raises(UserError, match=r"log\.jsonl.*delete it"):
        train(tmp_path, checkpoint_every=2)
    log.unlink()  # the record is for people; the run goes on without it
    with pytest.raises(Killed):
        train(tmp_path, train_source=Stopping(source(), 4, kill), checkpoint_every=2)
    train(tmp_path, checkpoint_every=2)
    assert [entry[0] for entry in course(tmp_path)] == list(range(9, 16))


def as_before(path: Path) -> None:
    """Write `path` as it was before there were digests: nothing but the info in its header, none in that."""
    tensors, info = checkpoint.load(path)
    del info["state"]["log"]
    save_file(tensors, path, metadata={"pipeline": json.dumps(info)})


def test_files_without_digests_are_read_with_a_word(tmp_path: Path) -> None:
    train(tmp_path / "whole", checkpoint_every=2)
    as_before(cut_off(tmp_path / "cut"))
    with pytest.warns(Notice, match=r"resume\.safetensors.*no digest") as said:
        train(tmp_path / "cut", checkpoint_every=2)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    assert course(tmp_path / "cut") == course(tmp_path / "whole")
