"""Another program's reader and writer of stores, made from store/FORMAT.md alone: nothing of this project is imported.

It stands for whoever wants to read our stores or to write some for us; where it cannot, the page lacks something.
"""

from __future__ import annotations

import gzip
import io
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

Arrays = dict[str, np.ndarray]
STORED = {"float32": "float32", "float16": "float16", "int8": "int8", "bfloat16": "uint16"}
LITTLE = {"float32": "<f4", "float16": "<f2", "int8": "|i1", "uint16": "<u2", "int32": "<i4"}


# -- digests, JSON, safetensors ----------------------------------------------------------------------------------------
def xxh3(*parts: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(b"".join(parts))


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def seal(**members: Any) -> bytes:
    body = canonical(members)
    return b'{"xxh3":"' + xxh3(body).encode() + b'",' + body[1:]


def unseal(path: Path, kind: str) -> dict[str, Any]:
    data = path.read_bytes()
    head, _, rest = data.partition(b",")
    document = json.loads(data)
    assert head == b'{"xxh3":"' + xxh3(b"{" + rest).encode() + b'"', f"{path} is damaged"
    assert document["kind"] == kind and document["format"] == 1, path
    return document


def read_tensors(data: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    """safetensors: name → (dtype, shape, bytes)."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    found = {}
    for name, about in header.items():
        if name != "__metadata__":
            start, stop = about["data_offsets"]
            found[name] = (about["dtype"], about["shape"], data[8 + size + start : 8 + size + stop])
    return found


def write_tensors(arrays: Mapping[str, np.ndarray]) -> bytes:
    header, at, parts = {}, 0, []
    for name, array in arrays.items():
        data = np.ascontiguousarray(array, "<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
        parts.append(data)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def float_tensors(data: bytes) -> Arrays:
    return {n: np.frombuffer(raw, "<f4").reshape(shape) for n, (_, shape, raw) in read_tensors(data).items()}


# -- what things are known by ------------------------------------------------------------------------------------------
_NAMES = {"F32": "torch.float32", "F16": "torch.float16", "BF16": "torch.bfloat16", "I64": "torch.int64"}
_NOISE = [
    "_name_or_path",
    "architectures",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "n_positions",
    "task_specific_params",
    "output_past",
    "id2label",
    "label2id",
    "gradient_checkpointing",
    "problem_type",
]
_TOKENIZER = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
]


def text_identity(checkpoint: Path, family: str, **more: Any) -> dict[str, Any]:
    """The identity of the space of a text checkpoint with the usual options; `more` changes fields."""
    tensors = []
    for file in checkpoint.glob("*.safetensors"):
        for name, (dtype, shape, data) in read_tensors(file.read_bytes()).items():
            tensors.append([name, _NAMES[dtype], shape, xxh3(data)])
    config = json.loads((checkpoint / "config.json").read_text())
    there = [f for name in _TOKENIZER if (f := checkpoint / name).is_file()]
    identity = {
        "format_version": 1,
        "family": family,
        "weights": xxh3(canonical(sorted(tensors))),
        "config": xxh3(canonical({k: v for k, v in config.items() if k not in _NOISE})),
        "tokenizer": xxh3(canonical([[f.name, xxh3(f.read_bytes())] for f in there])),
        "prompt": "", "max_length": 128, "truncation_side": "right", "format": "float16", "projection": "none",
        "projection_fit": "", "precision": "float32", "attention": "sdpa", "mode": "eval", "views": "none",
    }  # fmt: skip
    return identity | more


def space_id(identity: Mapping[str, Any]) -> str:
    return xxh3(canonical(identity))


def sample_key(columns: Mapping[str, np.ndarray]) -> str:
    """Of a text, from all its columns."""
    parts = []
    for name, values in sorted(columns.items()):
        parts += [f"{name}:{len(values)}:".encode("ascii"), values.astype("<i4").tobytes()]
    return xxh3(*parts)


def picture_key(file: bytes, preprocessing: str, view: int = 0, seed: int = 0) -> str:
    drawn = f" of crop0.6-1,flip0.5,color0.2, seed {seed}" if view else ""
    return xxh3(file, f"{preprocessing}:view {view}{drawn}".encode("ascii"))


def projection_fit(tensors: Arrays) -> str:
    states = sorted(name.removeprefix("mean/") for name in tensors if name.startswith("mean/"))
    parts = []
    for state in states:
        parts += [state.encode("ascii"), tensors[f"mean/{state}"].tobytes(), tensors[f"basis/{state}"].tobytes()]
    return xxh3(*parts)


def decoder_positions(candidates: Sequence[Sequence[int]], start: int, own: int | None) -> tuple[list[int], list[int]]:
    """`decoder.ids` and `decoder.parent` of a training row whose target is `own`, or of any other row."""
    if own is not None:
        ids = [start, *candidates[own][:-1]]
        return ids, list(range(-1, len(ids) - 1))
    after: dict[tuple[int, ...], set[int]] = {}
    for target in candidates:
        for n, token in enumerate(target):
            after.setdefault(tuple(target[:n]), set()).add(token)
    parting = [prefix for prefix, tokens in after.items() if len(tokens) > 1]
    needed = sorted({p[:n] for p in parting for n in range(len(p) + 1)}, key=lambda p: (len(p), p))
    return [p[-1] if p else start for p in needed], [needed.index(p[:-1]) if p else -1 for p in needed]


# -- reading -----------------------------------------------------------------------------------------------------------
class Reader:
    """Everything in a store, all digests checked."""

    def __init__(self, root: Path) -> None:
        self.root = root
        unseal(root / "store.json", "activation-store")

    def spaces(self) -> dict[str, dict[str, Any]]:
        """Space id → identity."""
        found = {}
        for path in self.root.glob("spaces/*/space.json"):
            document = unseal(path, "activation-space")
            assert document["id"] == path.parent.name == space_id(document["identity"])
            found[path.parent.name] = document["identity"]
        return found

    def segments(self, space: str) -> list[dict[str, Any]]:
        """Manifests of the segments that count, by id."""
        home = self.root / "spaces" / space
        found = {}
        for path in sorted(home.glob("segments/[!.]*/manifest.json")):
            manifest = unseal(path, "activation-segment")
            assert (manifest["id"], manifest["space"]) == (path.parent.name, space)
            found[manifest["id"]] = manifest
        hidden = {path.name for path in home.glob("superseded/[!.]*")}
        for name in hidden:
            assert unseal(home / "superseded" / name, "activation-superseded")["by"]
        hidden -= {m["base"] for m in found.values() if m["id"] not in hidden}
        return [m for name, m in found.items() if name not in hidden]

    def samples(self, space: str) -> Iterator[tuple[str, Arrays, Arrays]]:
        """(key, columns, states in float32) of each sample of each base segment."""
        segments = self.segments(space)
        for base in segments:
            if base["base"] is not None:
                continue
            members = [base, *(m for m in segments if m["base"] == base["id"])]
            holder: dict[str, dict[str, Any]] = {}
            lengths: dict[str, list[int]] = {}
            for member in members:
                assert member["samples"]["keys"] == base["samples"]["keys"]
                for name in (*member["states"], *member["columns"]):
                    holder.setdefault(name, member)
                lengths = member["samples"]["lengths"] | lengths
            ends = {stream: np.cumsum([0, *values]) for stream, values in lengths.items()}
            whole = {name: self._values(space, member, name) for name, member in holder.items()}
            for place, key in enumerate(base["samples"]["keys"]):
                rows = {
                    name: values[slice(*ends[name.split(".")[0]][place : place + 2])] for name, values in whole.items()
                }
                columns = {name: rows.pop(name) for name, member in holder.items() if name in member["columns"]}
                yield key, columns, rows

    def _values(self, space: str, manifest: dict[str, Any], name: str) -> np.ndarray:
        values = self._array(space, manifest, name)
        about = manifest["states"].get(name)
        if about is None:
            return values
        if about["format"] == "bfloat16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        values = values.astype(np.float32)
        if about["scale"]:
            scale = self._array(space, manifest, f"{name}.scale").astype(np.float32)
            values = values * (np.exp2(scale) if about["format"] == "float16" else scale)[:, None]
        return values

    def _array(self, space: str, manifest: dict[str, Any], name: str) -> np.ndarray:
        """Straight from the chunk files."""
        folder = self.root / "spaces" / space / "segments" / manifest["id"]
        listed = {entry["name"]: entry for entry in manifest["files"]}

        def content(file: str) -> bytes:
            data = (folder / file).read_bytes()
            assert (len(data), xxh3(data)) == (listed[file]["size"], listed[file]["xxh3"]), file
            return data

        about = json.loads(content("zarr.json"))["consolidated_metadata"]["metadata"][name]
        shape, kind = about["shape"], np.dtype(LITTLE[about["data_type"]])
        grid = about["chunk_grid"]["configuration"]["chunk_shape"]
        parts = []
        for number in range(-(-shape[0] // grid[0])):
            data = content(f"{name}/c.{number}" + ".0" * (len(shape) - 1))
            assert google_crc32c.value(data[:-4]).to_bytes(4, "little") == data[-4:]
            parts.append(np.frombuffer(data[:-4], kind).reshape(grid))
        return np.concatenate(parts)[: shape[0]] if parts else np.zeros(shape, kind)

    def tables(self, space: str) -> dict[tuple[str, str], tuple[dict[str, Any], list[Any]]]:
        """(task, split) → header and rows of the table that counts: of the version written last, with most rows."""
        found = []
        for path in self.root.glob(f"spaces/{space}/tasks/*/[!.]*-*-*.*"):
            data = path.read_bytes()
            split, rows, digest = path.name.removesuffix(".jsonl.gz").removesuffix(".parquet").rsplit("-", 2)
            assert xxh3(data)[:16] == digest
            read = self._table if path.suffix == ".parquet" else self._old_table
            header, lines = read(data)
            assert header["kind_of_file"] == "activation-task-table"
            assert (header["task"], header["split"], header["rows"]) == (path.parent.name, split, int(rows))
            assert len(lines) == int(rows)
            found.append((header, lines))
        latest = {h["task"]: h["version"] for h, _ in sorted(found, key=lambda t: t[0]["created"])}
        found = [(h, rows) for h, rows in found if h["version"] == latest[h["task"]]]
        found.sort(key=lambda t: (t[0]["rows"], t[0]["created"]))
        return {(h["task"], h["split"]): (h, rows) for h, rows in found}

    @staticmethod
    def _table(data: bytes) -> tuple[dict[str, Any], list[Any]]:
        """Format 2; rows as [key, target, texts]."""
        table = pq.read_table(io.BytesIO(data))
        header = json.loads(pq.read_metadata(io.BytesIO(data)).metadata[b"activation"])
        assert header["format"] == 2 and table.column_names == ["key", "target", "inputs", "id", "meta"]
        return header, [[r["key"].hex(), r["target"], r["inputs"]] for r in table.to_pylist()]

    @staticmethod
    def _old_table(data: bytes) -> tuple[dict[str, Any], list[Any]]:
        """Format 1, its version beside what it says."""
        header, *lines = [json.loads(line) for line in gzip.decompress(data).decode("utf-8").split("\n")[:-1]]
        assert header["format"] == 1
        return {**header, "version": xxh3(canonical([header["spec"], header["provenance"]]))}, lines

    def weights(self, digest: str) -> dict[str, bytes]:
        """The kept files of a checkpoint."""
        folder = self.root / "weights" / digest
        manifest = unseal(folder / "manifest.json", "activation-weights")
        assert manifest["digest"] == digest
        found = {entry["name"]: (folder / entry["name"]).read_bytes() for entry in manifest["files"]}
        for entry in manifest["files"]:
            assert (len(found[entry["name"]]), xxh3(found[entry["name"]])) == (entry["size"], entry["xxh3"])
        return found


# -- writing -----------------------------------------------------------------------------------------------------------
class Writer:
    """A store, made file by file; every manifest last."""

    def __init__(self, root: Path) -> None:
        self.root, self._count = root, 0
        root.mkdir(parents=True)
        (root / "store.json").write_bytes(seal(kind="activation-store", format=1))

    def weights(self, digest: str, files: Mapping[str, bytes]) -> None:
        folder = self.root / "weights" / digest
        folder.mkdir(parents=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        listed = [{"name": n, "size": len(d), "xxh3": xxh3(d)} for n, d in files.items()]
        (folder / "manifest.json").write_bytes(seal(kind="activation-weights", format=1, digest=digest, files=listed))

    def space(self, identity: Mapping[str, Any]) -> str:
        name = space_id(identity)
        folder = self.root / "spaces" / name
        (folder / "segments").mkdir(parents=True)
        (folder / "space.json").write_bytes(seal(kind="activation-space", format=1, id=name, identity=identity))
        return name

    def segment(
        self, space: str, keys: Sequence[str], lengths: Mapping[str, Sequence[int]], states: Arrays, columns: Arrays,
        fmt: str, base: str | None = None, compressed: Sequence[str] = (), chunk_rows: int = 100,
    ) -> str:  # fmt: skip
        """One segment of float16 or float32 `states`, in chunks of `chunk_rows`; those of `compressed` as gzip."""
        self._count += 1
        name = f"20200101T000000{self._count:03d}-{self._count:016x}"
        folder = self.root / "spaces" / space / "segments" / name
        arrays = {n: v.astype(LITTLE[STORED[fmt]]) for n, v in states.items()}
        arrays |= {n: v.astype("<i4") for n, v in columns.items()}
        arrays |= {f"{s}.lengths": np.array(v, "<i4") for s, v in lengths.items()}
        files, members = {}, {}
        for array, values in arrays.items():
            members[array] = about = self._about(values, min(chunk_rows, max(1, len(values))), array in compressed)
            files[f"{array}/zarr.json"] = json.dumps(about).encode()
            files |= {f"{array}/{key}": data for key, data in self._chunks(values, about)}
        held = {"kind": "inline", "must_understand": False, "metadata": members}
        group = {"zarr_format": 3, "node_type": "group", "attributes": {}, "consolidated_metadata": held}
        files["zarr.json"] = json.dumps(group).encode()
        for file, data in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_bytes(data)
        manifest = seal(
            kind="activation-segment", format=1, id=name, space=space, base=base, created="2020-01-01T00:00:00+00:00",
            provenance={"by": "another program"}, columns=list(columns),
            samples={"keys": list(keys), "lengths": {s: [int(n) for n in v] for s, v in lengths.items()}},
            states={
                n: {"stream": n.split(".")[0], "width": v.shape[1], "format": fmt, "scale": False}
                for n, v in states.items()
            },
            files=[{"name": n, "size": len(d), "xxh3": xxh3(d)} for n, d in files.items()],
        )  # fmt: skip
        (folder / "manifest.json").write_bytes(manifest)
        return name

    def _about(self, values: np.ndarray, chunk_rows: int, compressed: bool) -> dict[str, Any]:
        more = [{"name": "gzip", "configuration": {"level": 5}}] if compressed else [{"name": "crc32c"}]
        endian = {} if values.dtype.itemsize == 1 else {"configuration": {"endian": "little"}}
        return {
            "zarr_format": 3, "node_type": "array", "shape": list(values.shape), "data_type": values.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [chunk_rows, *values.shape[1:]]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
            "fill_value": 0, "codecs": [{"name": "bytes", **endian}, *more], "attributes": {},
        }  # fmt: skip

    def _chunks(self, values: np.ndarray, about: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
        step = about["chunk_grid"]["configuration"]["chunk_shape"][0]
        for number in range(-(-len(values) // step)):
            rows = values[number * step : (number + 1) * step]
            data = np.concatenate([rows, np.zeros((step - len(rows), *rows.shape[1:]), rows.dtype)]).tobytes()
            packed = about["codecs"][-1]["name"] == "gzip"
            check = google_crc32c.value(data).to_bytes(4, "little")
            yield f"c.{number}" + ".0" * (values.ndim - 1), gzip.compress(data) if packed else data + check

    def table(self, space: str, header: Mapping[str, Any], rows: Sequence[Any]) -> None:
        """One task table of classes: rows are [key, target, texts]."""
        head = {**header, "kind_of_file": "activation-task-table", "format": 2, "rows": len(rows)}
        keys, targets, texts = zip(*rows, strict=True)
        nothing = pa.nulls(len(rows), pa.string())
        columns = {
            "key": pa.array([bytes.fromhex(key) for key in keys], pa.binary(16)),
            "target": pa.array(targets, pa.int32()),
            "inputs": pa.array(texts, pa.list_(pa.string())),
            "id": nothing,
            "meta": nothing,
        }
        out = io.BytesIO()
        table = pa.table(columns).replace_schema_metadata({"activation": json.dumps(head)})
        pq.write_table(table, out, compression="gzip", use_dictionary=False)
        folder = self.root / "spaces" / space / "tasks" / head["task"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{head['split']}-{len(rows)}-{xxh3(out.getvalue())[:16]}.parquet").write_bytes(out.getvalue())

    def old_table(self, space: str, header: Mapping[str, Any], rows: Sequence[Any]) -> None:
        """The same in format 1."""
        head = {**header, "kind_of_file": "activation-task-table", "format": 1, "rows": len(rows)}
        data = gzip.compress("".join(json.dumps(line) + "\n" for line in (head, *rows)).encode("utf-8"))
        folder = self.root / "spaces" / space / "tasks" / head["task"]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{head['split']}-{len(rows)}-{xxh3(data)[:16]}.jsonl.gz").write_bytes(data)
