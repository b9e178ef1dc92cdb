"""Videos as folders of frames, of unequal numbers, beside texts: CLIP4Clip's system on a small CLIP."""

from __future__ import annotations

import csv
import re
import shutil
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

import pipeline
from pipeline.extract.backbones import films
from pipeline.extract.backbones.films import decoded
from pipeline.extract.backbones.images import Preprocess
from pipeline.extract.backbones.videos import frames_in
from pipeline.store.errors import UserError
from tests import tiny
from tests.pipeline.test_errors import refused
from tests.pipeline.test_errors import run as invoke
from tests.pipeline.test_objectives import run
from tests.pipeline.test_slots import losses
from tests.vision import _hugging_face

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
TRAIN = ["--objective", "contrastive", "--joint-width", 24, "--logit-scale", 100, "--no-learn-scale"]
TRAIN += ["--batch-size", 8, "--lr", 1e-3, "--device", "cpu"]


def clips(folder: Path, videos: int = 20) -> list[tuple[str, str]]:
    """A folder of 1 to 5 frames for each video, and two texts of each."""
    rng, rows = np.random.default_rng(0), []
    for i in range(videos):
        for k in range(1 + i % 5):
            pixels = rng.integers(0, 255, (40 + 8 * (i % 2), 40, 3)).astype(np.uint8)
            (folder / f"v{i}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"v{i}" / f"frame{k}.png")
        rows += [(f"v{i}", f"the {word} number {i}") for word in ("cat sleeps", "dog")]
    return rows


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("video", "caption"), *rows])
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("videos")
    torch.manual_seed(0)
    vision = CLIPVisionConfig(image_size=32, patch_size=16, projection_dim=24, **SHAPE)
    _hugging_face(folder / "vision", CLIPVisionModelWithProjection(vision), 32)
    tokenizer = tiny._tokenizer("roberta")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), max_position_embeddings=40, pad_token_id=1, bos_token_id=0, eos_token_id=2,
        projection_dim=24, **SHAPE,
    )  # fmt: skip
    CLIPTextModelWithProjection(text).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    rows = clips(folder / "data")
    options = ["--model", f"video={folder / 'vision'},text={folder / 'text'}", "--frames", 3]
    options += ["--task", write(folder / "clips.csv", rows), "--image", "video", "--text", "caption"]
    options += ["--data", folder / "data", "--store", folder / "store"]
    done = run("extract", *options, "--for", "sherl-clip,unipt-clip,lst,probe", "--format", "float32")
    return {"options": options, "folder": folder, "rows": rows, "done": done}


@pytest.mark.parametrize(
    ("tuner", "more"),
    [
        ("sherl-clip", ["--base-gate"]),
        ("lst", ["--reduction", 4]),
        pytest.param("unipt-clip", [], marks=pytest.mark.matrix),
    ],
)
def test_cached_is_live(made: dict[str, Any], tmp_path: Path, tuner: str, more: list[Any]) -> None:
    assert made["done"]["computed"] == 20 + 40 and made["done"]["rows"] == {"train": 32, "validation": 4, "test": 4}
    how = [*made["options"], "--tuner", tuner, *more, *TRAIN, "--epochs", 5]
    cached = run("train", *how, "--out", tmp_path / "cached")
    run("train", *how, "--live", "--out", tmp_path / "live")
    one, other = losses(tmp_path / "cached"), losses(tmp_path / "live")
    assert len(one) == 20 and one == pytest.approx(other, abs=1e-3)
    assert {"v2t_r1", "t2v_r1", "rsum"} <= cached["test"].keys()
    found = run("search", tmp_path / "cached", "--query", "the cat", "--top", 2)
    assert found["among"] == 20 and {r["video"] for r in found["results"]} < {f"v{i}" for i in range(20)}
    back = run("search", tmp_path / "cached", "--image", made["folder"] / "data" / "v4", "--top", 40)
    told = next(r for r in back["results"] if r["text"] == "the dog number 4")
    there = run("search", tmp_path / "cached", "--query", told["text"], "--top", 20)["results"]
    assert told["similarity"] == pytest.approx(next(r for r in there if r["video"] == "v4")["similarity"], abs=1e-3)


def test_a_video_is_the_mean_of_its_frames(made: dict[str, Any], tmp_path: Path) -> None:
    """Frames as images of their own, through the same run, embedded one by one."""
    run("train", *made["options"], "--tuner", "sherl-clip", *TRAIN, "--epochs", 1, "--out", tmp_path / "run")
    found = pipeline.load_run(tmp_path / "run")
    single = tmp_path / "single"
    for i in range(3):  # v4 has 5 frames, of which the first, the middle and the last are seen
        (single / f"f{i}").mkdir(parents=True)
        shutil.copy(made["folder"] / "data" / "v4" / f"frame{(0, 2, 4)[i]}.png", single / f"f{i}")
    shutil.copytree(made["folder"] / "data" / "v4", single / "v4")
    names = ["f0", "f1", "f2", "v4"]
    source = found.job.fresh_source({"video": names, "text": ["a cat"] * 4}, str(single), print)
    (batch,) = source.each(["video"])
    found.model.eval()
    with torch.no_grad():
        rows = found.model.embed("video", batch)[np.argsort(batch.index)]
    mean = rows[:3].mean(0)
    assert torch.allclose(rows[3], mean / mean.norm(), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: shutil.rmtree(data / "v3"), ["slot video", "v3", "no such folder of frames"]),
        (lambda data: [p.unlink() for p in (data / "v3").iterdir()], ["v3", "no frames in this folder"]),
        (lambda data: (data / "v3" / "frame1.png").write_bytes(b"no image"), ["v3", "frame1.png", "damaged"]),
    ],
)
def test_videos_that_are_not_whole(made: dict[str, Any], tmp_path: Path, change: Any, words: list[str]) -> None:
    shutil.copytree(made["folder"] / "data", tmp_path / "data")
    change(tmp_path / "data")
    options = [*made["options"], "--data", tmp_path / "data", "--store", tmp_path / "store"]
    refused(invoke("extract", *options, "--for", "probe"), *words)


def test_frames_are_part_of_the_space(made: dict[str, Any], tmp_path: Path) -> None:
    more = [*made["options"], "--frames", 2, "--tuner", "probe", *TRAIN, "--out", tmp_path / "run"]
    refused(invoke("train", *more), "slot video", "frames", "2", "3")
    alone = ["--model", made["folder"] / "vision", *made["options"][2:]]
    alone[alone.index("--text") : alone.index("--text") + 2] = []
    refused(invoke("extract", *alone, "--for", "probe", "--store", tmp_path / "s"), "--frames", "several")


def test_a_changed_frame_is_noticed(made: dict[str, Any], tmp_path: Path) -> None:
    shutil.copytree(made["folder"] / "data", tmp_path / "data")
    frame = tmp_path / "data" / "v1" / "frame0.png"
    Image.new("RGB", (40, 40)).save(frame)
    options = [*made["options"], "--data", tmp_path / "data", "--tuner", "probe", *TRAIN, "--out", tmp_path / "run"]
    refused(invoke("train", *options), "slot video", "have changed")


def test_frames_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = ["10.png", "2.png", "frame\u00b2.png"]  # a digit that is no number
    for name in names:
        (tmp_path / name).touch()
    assert [p.name for p in frames_in(tmp_path)] == [names[2], names[1], names[0]]


def filmed(path: Path, frames: list[np.ndarray], codec: str = "ffv1", form: str = "bgr0") -> None:
    """A video of the frames, which by itself loses nothing of them and has a checksum of each slice."""
    av = pytest.importorskip("av", reason="the extra `video` is not installed: video files not tested")
    with av.open(str(path), "w") as film:
        stream = film.add_stream(codec, rate=5, options={"level": "3", "slicecrc": "1"} if codec == "ffv1" else {})
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], form
        for frame in frames:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        film.mux(stream.encode())


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mkv", ("ffv1", "bgr0")), ("a.avi", ("mpeg4", "yuv420p")), ("a.flv", ("flv1", "yuv420p"))]
)
def test_a_film_that_was_cut_off_is_no_shorter_one(tmp_path: Path, name: str, codec: tuple[str, str]) -> None:
    rng = np.random.default_rng(0)
    filmed(tmp_path / name, [rng.integers(0, 255, (32, 48, 3)).astype(np.uint8) for _ in range(20)], *codec)
    assert len(decoded(tmp_path / name, 30)) == 20
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: len(content) * 3 // 5])
    with pytest.raises(UserError, match=r"ends after \d\.\d of 4\.0 seconds"):
        decoded(tmp_path / name, 30)


@pytest.mark.parametrize("codec", [("ffv1", "bgr0"), ("mpeg4", "yuv420p")])
def test_damage_in_the_middle_of_a_film_loses_no_frame_in_silence(tmp_path: Path, codec: tuple[str, str]) -> None:
    """Sixteen bytes at each of 40 places; of Matroska, whose reader goes on behind what it does not understand."""
    rng, film = np.random.default_rng(0), tmp_path / "a.mkv"
    filmed(film, [rng.integers(0, 255, (32, 48, 3)).astype(np.uint8) for _ in range(20)], *codec)
    content, found = film.read_bytes(), []
    for place in np.linspace(len(content) * 0.1, len(content) * 0.9, 40).astype(int).tolist():
        film.write_bytes(content[:place] + b"\0" * 16 + content[place + 16 :])
        try:
            assert len(decoded(film, 30)) == 20, place
        except UserError as error:
            found.append(str(error))
    assert len(found) > 30 and all("a.mkv: " in line and "--skip-bad" in line for line in found)
    assert any(re.search(r"damaged video at \d\.\d seconds \(", line) for line in found)


def test_what_is_heard_of_a_film_is_its_own_and_pyav_is_set_as_before(tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="the extra `video` is not installed: video files not tested")
    rng = np.random.default_rng(0)
    good, bad = ([tmp_path / f"{kind}{i}.mkv" for i in range(4)] for kind in ("good", "bad"))
    for path in good:
        filmed(path, [rng.integers(0, 255, (32, 48, 3)).astype(np.uint8) for _ in range(20)])
    for path in bad:  # alike, so that the same is logged of each
        path.write_bytes(hurt(good[0].read_bytes()))
    before = (av.logging.get_level(), av.logging.get_skip_repeated())
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(outcome, [p for pair in zip(good, bad, strict=True) for p in pair]))
    assert found == ["20 frames", "damaged"] * 4
    assert (av.logging.get_level(), av.logging.get_skip_repeated()) == before


@pytest.mark.parametrize("name", ["a.avi", "a.flv", "a.mp4", "a.mkv", "a.mov"])
def test_no_end_of_a_film_is_missed_in_silence(tmp_path: Path, name: str) -> None:
    """Cut off anywhere, the index of an .mp4 at its end included: refused, or all but the last tenth is there."""
    rng, film = np.random.default_rng(0), tmp_path / name
    codec = ("flv1" if name == "a.flv" else "mpeg4", "yuv420p")
    filmed(film, [rng.integers(0, 255, (32, 48, 3)).astype(np.uint8) for _ in range(40)], *codec)
    content = film.read_bytes()
    assert len(decoded(film, 60)) == 40
    begin = content.rindex(b"moov") if b"moov" in content else len(content) // 2
    for share in np.linspace(0, 0.999, 40):
        film.write_bytes(content[: begin + int((len(content) - begin) * share)])
        try:
            assert len(decoded(film, 60)) >= 36, share
        except UserError as error:
            assert "a." in str(error)


def test_a_codec_that_nothing_reads_is_said(tmp_path: Path) -> None:
    filmed(tmp_path / "a.avi", [np.zeros((32, 48, 3), np.uint8)] * 3, "mpeg4", "yuv420p")
    content = (tmp_path / "a.avi").read_bytes()
    (tmp_path / "a.avi").write_bytes(content.replace(b"FMP4", b"QZQZ"))
    with pytest.raises(UserError, match=r"a\.avi: its pictures are of a codec"):
        decoded(tmp_path / "a.avi", 30)


def hurt(content: bytes) -> bytes:
    """With a hole in the middle."""
    return content[: len(content) // 2] + b"\0" * 16 + content[len(content) // 2 + 16 :]


def outcome(path: Path) -> str:
    try:
        return f"{len(decoded(path, 30))} frames"
    except UserError as error:
        return "damaged" if "damaged video" in str(error) else str(error)


def test_a_film_is_decoded_once_where_it_is_looked_at_and_once_for_its_rows(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, names = np.random.default_rng(1), [f"film{i}.mkv" for i in range(10)]
    for name in names:
        filmed(tmp_path / name, [rng.integers(0, 255, (40, 48, 3)).astype(np.uint8) for _ in range(5)])
    (tmp_path / "bad.mkv").write_bytes(hurt((tmp_path / names[0]).read_bytes()))
    table = write(tmp_path / "clips.csv", [(name, f"the cat {i}") for i, name in enumerate([*names, "bad.mkv"])])
    options = [*made["options"], "--data", tmp_path, "--store", tmp_path / "store", "--task", table]
    refused(invoke("extract", *options, "--for", "probe"), "slot video", "bad.mkv: damaged video")
    decodes, shown = [], films._shown
    monkeypatch.setattr(films, "_shown", lambda path, places: (decodes.append(path.name), shown(path, places))[1])
    done = run("extract", *options, "--for", "probe", "--skip-bad")
    assert done["skipped"] == 1 and sum(done["rows"].values()) == 10
    assert {name: decodes.count(name) for name in names} == dict.fromkeys(names, 2)
    assert not films._open, "no frame waits"


def test_a_film_that_became_shorter_is_said(tmp_path: Path) -> None:
    frames = [np.full((32, 48, 3), 9 * i, np.uint8) for i in range(5)]
    filmed(tmp_path / "a.mkv", frames)
    looked = films.film_frames(tmp_path / "a.mkv", Preprocess(), 4)
    assert [int(np.asarray(f.image()).mean()) for f in looked[::-1]] == [36, 18, 9, 0]
    filmed(tmp_path / "a.mkv", frames[:2])
    with pytest.raises(UserError, match=r"a\.mkv: it has fewer frames"):
        looked[3].image()


def test_a_film_that_was_taken_upright_is_turned(tmp_path: Path) -> None:
    frame = np.zeros((32, 64, 3), np.uint8)
    frame[:16, :, 0] = 250  # red above: at the right, once it is turned clockwise
    filmed(tmp_path / "lying.mp4", [frame] * 3, "mpeg4", "yuv420p")
    content = (tmp_path / "lying.mp4").read_bytes()
    place, one = content.index(b"tkhd") + 44, 1 << 16
    matrix = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)  # a quarter clockwise, as of a telephone
    (tmp_path / "upright.mp4").write_bytes(content[:place] + matrix + content[place + 36 :])
    lying, upright = (decoded(tmp_path / f"{name}.mp4", 2)[0] for name in ("lying", "upright"))
    assert upright.size == (32, 64)
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(lying), -1))


def test_a_file_is_the_folder_of_its_frames(made: dict[str, Any], tmp_path: Path) -> None:
    """Of 7 frames 3 are shown; what both are stored as is equal, and the file is found by its name in a search."""
    rng, data = np.random.default_rng(3), tmp_path / "data"
    frames = [rng.integers(0, 255, (40, 48, 3)).astype(np.uint8) for _ in range(7)]
    (data / "folder").mkdir(parents=True)
    filmed(data / "film.mkv", frames)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(data / "folder" / f"{i}.png")
    others = [(f"v{i}", text) for i in range(4) for text in ("a cat", "a dog")]
    for name, _ in others:
        shutil.copytree(made["folder"] / "data" / name, data / name, dirs_exist_ok=True)
    rows = [*others, ("folder", "the dog sleeps"), ("film.mkv", "the dog sleeps")]
    options = [*made["options"], "--data", data, "--store", tmp_path / "store"]
    options[options.index("--task") + 1] = write(tmp_path / "clips.csv", rows)
    run("extract", *options, "--for", "probe", "--format", "float32")
    run("train", *options, "--tuner", "probe", *TRAIN, "--epochs", 1, "--out", tmp_path / "run")
    found = run("search", tmp_path / "run", "--query", "the dog", "--top", 6)["results"]
    told = {r["video"]: r["similarity"] for r in found}
    assert len(told) == 6 and told["film.mkv"] == told["folder"]
    back = run("search", tmp_path / "run", "--image", data / "film.mkv", "--top", 1)["results"]
    assert back == run("search", tmp_path / "run", "--image", data / "folder", "--top", 1)["results"]


@pytest.mark.parametrize(("content", "words"), [(b"", ["damaged video"]), (b"no film at all", ["damaged video"])])
def test_a_file_that_is_no_video(made: dict[str, Any], tmp_path: Path, content: bytes, words: list[str]) -> None:
    pytest.importorskip("av", reason="the extra `video` is not installed: video files not tested")
    shutil.copytree(made["folder"] / "data", tmp_path / "data")
    (tmp_path / "data" / "broken.mp4").write_bytes(content)
    table = write(tmp_path / "clips.csv", [*made["rows"], ("broken.mp4", "a cat")])
    options = [*made["options"], "--data", tmp_path / "data", "--store", tmp_path / "store", "--task", table]
    refused(invoke("extract", *options, "--for", "probe"), "slot video", "broken.mp4", *words)


def test_without_pyav_a_file_is_refused(made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "film.mp4").touch()
    table = write(tmp_path / "clips.csv", [("film.mp4", "a cat")] * 3)
    options = [*made["options"], "--data", tmp_path, "--store", tmp_path / "store", "--task", table]
    refused(invoke("extract", *options, "--for", "probe", "--validation", table), "film.mp4", "PyAV", "pip install")
