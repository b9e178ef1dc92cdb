"""Checkpoint files: exact round trip, atomic, no pickle, clear errors."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.store.errors import UserError
from pipeline.train.fit import run_files as checkpoint


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def adam(model: nn.Module, steps: int) -> tuple[torch.optim.AdamW, list[str]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
    return optimizer, [name for name, _ in model.named_parameters()]


def test_a_tuner_comes_back_exactly(tmp_path: Path) -> None:
    state = {"a": torch.randn(3, 2), "b.c": torch.randn(4, dtype=torch.bfloat16), "n": torch.tensor(7)}
    path = tmp_path / checkpoint.TUNER
    checkpoint.save_tuner(path, state, {"epoch": 3})
    back, info = checkpoint.load(path)
    assert info == {"epoch": 3}
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) and back[k].dtype == state[k].dtype for k in state)
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint.TUNER]


def test_shared_and_strided_tensors_are_saved(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    checkpoint.save(tmp_path / "x", {"a": whole, "b": whole.t(), "c": whole[1]}, {})
    back, _ = checkpoint.load(tmp_path / "x")
    assert torch.equal(back["b"], whole.t()) and torch.equal(back["c"], whole[1])


def test_the_optimizer_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    straight = net()
    adam(straight, 6)
    model = net()
    optimizer, names = adam(model, 3)
    path = tmp_path / checkpoint.RESUME
    parts = {"model": model.state_dict(), "optimizer": checkpoint.optimizer_state(optimizer, names)}
    checkpoint.save_run(path, parts, {"step": 3})
    found, info = checkpoint.load_run(path)
    assert (found["best"], info) == ({}, {"step": 3})
    other = net()
    other.load_state_dict(found["model"])
    again = torch.optim.AdamW(other.parameters(), lr=0.1)
    checkpoint.load_optimizer_state(again, names, found["optimizer"])
    for step in range(3, 6):
        torch.manual_seed(step)
        again.zero_grad()
        other(torch.randn(5, 3)).square().sum().backward()
        again.step()
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "header", "missing", "folder"])
def test_damage_is_one_clear_line(tmp_path: Path, damage: str) -> None:
    path = tmp_path / checkpoint.TUNER
    checkpoint.save_tuner(path, {"a": torch.randn(100)}, {})
    raw = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(
            {"cut": raw[:-50], "empty": b"", "text": b"hello, world", "header": b"\xff" * 8 + raw[8:]}[damage]
        )
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_pickle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / checkpoint.TUNER
    torch.save({"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="no safetensors file"):
        checkpoint.load(path)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / checkpoint.TUNER
    checkpoint.save_tuner(path, {"a": torch.zeros(2), "b": torch.zeros(3, 2)}, {})
    found, _ = checkpoint.load(path)
    with pytest.raises(UserError, match=r"b has shape \(3, 2\) but the model needs \(3, 4\)"):
        checkpoint.check(found, {"a": torch.zeros(2), "b": torch.zeros(3, 4)}, path)
    with pytest.raises(UserError, match="lacks tensors c"):
        checkpoint.check(found, {"a": torch.zeros(2), "b": torch.zeros(3, 2), "c": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="holds unknown tensors b"):
        checkpoint.check(found, {"a": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="not a resumable checkpoint"):
        checkpoint.load_run(path)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / checkpoint.TUNER
    checkpoint.save_tuner(path, {"a": torch.zeros(2)}, {"epoch": 1})

    def full(tensors: object, file: Path, metadata: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save_tuner(path, {"a": torch.ones(2)}, {"epoch": 2})
    assert checkpoint.load(path)[1] == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == [checkpoint.TUNER]


def test_info_must_be_json(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path / "x", {}, {"a": object()})
    assert json.loads("{}") == {} and not list(tmp_path.iterdir())


def test_others_may_read_a_run_where_the_umask_lets_them(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    checkpoint.save(tmp_path / "tuner.safetensors", {"a": torch.ones(2)}, {})
    assert (tmp_path / "tuner.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
