"""What image backbones have in common: images as inputs, modules from timm or transformers, tails cut out of them.

A tail is built without knowing an architecture's arguments: the whole backbone is made on the meta device, which costs
no memory, the live part is taken out of it and filled with the weights kept in the store.
"""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.extract.backbones.base import Backbone, TextOptions
from pipeline.extract.backbones.fill import check_fit
from pipeline.extract.backbones.grids import COLUMN, EXTENT, SIZES, sizes
from pipeline.extract.backbones.images import Blank, Preprocess, load_pixels, look_all
from pipeline.extract.backbones.loading import load_frozen
from pipeline.extract.backbones.videos import Video, look_at_videos
from pipeline.extract.batch import Batch
from pipeline.extract.geometry import META
from pipeline.extract.inputs import Inputs
from pipeline.store.errors import UserError

_HEADS = ("head.", "head_dist.", "fc.", "classifier.", "fc_norm.", "norm_head.", "linear.", "pooler.")


class Vision(Backbone):
    """A family whose samples are images. Subclasses say how large each stream's map is and how to run."""

    modality: ClassVar[Literal["text", "image"]] = "image"
    hf_classes: ClassVar[dict[str, Any]] = {}  # model type → class, one of transformers by its name
    timm_options: ClassVar[dict[str, Any]] = {}
    hf_attention: ClassVar[str] = ""  # where transformers takes one attention only

    @property
    def columns(self) -> tuple[str, ...]:
        return (COLUMN,)

    def refuse_columns(self, lengths: Mapping[str, np.ndarray], columns: Mapping[str, np.ndarray]) -> str | None:
        column = columns.get(COLUMN)
        if column is None:
            return None
        each, rest = np.divmod(np.asarray(lengths["grid"], np.int64), 2 * len(self.streams))
        if bool(rest.any() or (each < 1).any()) or int(column.min(initial=1)) < 1:
            return f"{COLUMN} does not hold a height and a width for each of {len(self.streams)} streams"
        maps = column.astype(np.int64).reshape(-1, len(self.streams), 2).prod(2) + self.extra_rows
        if len(each):  # of a video there are several frames
            maps = np.add.reduceat(maps, np.cumsum(each) - each)
        for place, stream in enumerate(self.streams):
            if stream in lengths and bool((maps[:, place] != lengths[stream]).any()):
                return f"{COLUMN} does not agree with the lengths of {stream}"
        return None

    @abstractmethod
    def grid(self, stream: str, height: int, width: int) -> tuple[int, int]:
        """Height and width of the map of `stream` for an image of this extent."""

    # -- input ---------------------------------------------------------------------------------------------------
    def processor(self, folder: Path) -> Preprocess:
        """The checkpoint's preprocessing."""
        return Preprocess.of(folder, self.config)

    def prepare(self, tokenizer: Any, texts: Sequence[Sequence[str]], options: TextOptions) -> Inputs:
        """File names, each with a view's number if there are views, → inputs; with `options.frames` names of videos.
        `tokenizer`: a `Preprocess`.

        Every image is decoded once here. Raises UserError naming the first that cannot be read; with
        `options.skip_bad` those are left out and listed in `skipped`.
        """
        preprocess, stride = tokenizer.sized(options.image_size, options.dense), self.padding(options)
        paths, views = [Path(options.root) / t[0] for t in texts], [int(t[1]) if len(t) > 1 else 0 for t in texts]
        found: list[Any]
        if options.frames:
            found = list(look_at_videos(paths, preprocess, options.frames, options.upright))
        else:
            found = look_all(paths, preprocess, views, options.view_seed, options.upright, stride, options.augment)
        bad = {i: str(p) for i, p in enumerate(found) if isinstance(p, UserError)}
        if bad and not options.skip_bad:
            more = f" (and {len(bad) - 1} more like it)" if len(bad) > 1 else ""
            raise UserError(f"{next(iter(bad.values()))}{more}")
        good = [p for p in found if not isinstance(p, UserError)]
        if bad and not good:
            raise UserError(f"none of the {len(bad):,} images can be used, the first: {next(iter(bad.values()))}")
        pictures = np.empty(len(good), object)
        pictures[:] = good
        frames = [p.frames if isinstance(p, Video) else (p,) for p in good]
        extents = np.array([frame.extent for own in frames for frame in own], np.int64).reshape(-1, 2)
        lengths = {s: n for s, n in self.measure(extents).items() if s not in EXTENT}
        if options.frames:
            first = np.cumsum([0, *(len(own) for own in frames)])[:-1]
            lengths = {s: np.add.reduceat(n, first) for s, n in lengths.items()}
        columns = {COLUMN: self._grids(extents).reshape(-1).astype(np.int32)}
        metas = [{META: p.geometry().to_meta()} for p in good] if options.dense else []
        return Inputs(lengths, columns, np.zeros(len(good), bool), pictures, bad, metas)

    def padding(self, options: TextOptions) -> int:
        """What extents of images are filled up to multiples of."""
        return self.coarsest if options.dense else 1

    def measure(self, extents: np.ndarray) -> dict[str, np.ndarray]:
        """Lengths of images of `extents` (n, 2) in pixels: stream → (n,), and what `made_up` needs beside them."""
        grids = self._grids(extents)
        lengths = {s: grids[:, i].prod(1) + self.extra_rows for i, s in enumerate(self.streams)}
        lengths["grid"] = np.full(len(extents), 2 * len(self.streams), np.int64)
        return lengths | {name: extents[:, i] for i, name in enumerate(EXTENT)}

    def _grids(self, extents: np.ndarray) -> np.ndarray:
        """(n, streams, 2): the map of each stream."""
        grids = np.array([[self.grid(s, int(h), int(w)) for s in self.streams] for h, w in extents], np.int64)
        return grids.reshape(len(extents), len(self.streams), 2)

    def made_up(self, lengths: Mapping[str, np.ndarray], device: torch.device | str = "cpu") -> Batch:
        extents = np.stack([lengths[name] for name in EXTENT], 1)
        grids = self._grids(extents)
        batch = super().made_up({s: n for s, n in lengths.items() if s not in EXTENT}, device)
        if torch.device(device).type != "meta":
            batch.columns[COLUMN] = torch.from_numpy(grids.reshape(-1)).to(device)
        batch.derive(SIZES, lambda _: grids)  # the meta device holds no values to read it from
        batch.pictures = [Blank((int(h), int(w))) for h, w in extents]
        return batch

    # -- modules -------------------------------------------------------------------------------------------------
    def make(self, attention: str = "sdpa") -> Any:
        """The backbone with fresh weights, on the present default device."""
        if self.config.model_type == "timm_wrapper":
            import timm

            options = {**self.timm_options, **(self.config.model_args or {})}
            model = timm.create_model(self.config.architecture, pretrained=False, num_classes=0, **options)
            return with_attention(model, attention)
        config = copy.deepcopy(self.config)
        return self._hf_class._from_config(config, attn_implementation=self.hf_attention or attention)

    @property
    def _hf_class(self) -> Any:
        found = self.hf_classes[self.config.model_type]
        return getattr(transformers, found) if isinstance(found, str) else found

    @cached_property
    def skeleton(self) -> Any:
        """The backbone without values, to read shapes from."""
        with torch.device("meta"):
            return self.make().eval()

    def load(self, folder: Path, dtype: torch.dtype, attention: str, device: torch.device | str) -> nn.Module:
        if self.config.model_type != "timm_wrapper":
            return load_frozen(self._hf_class, folder, dtype, self.hf_attention or attention, device)
        model = self.make(attention)
        load_timm(model, folder)
        return model.to(device, dtype).eval().requires_grad_(False)


def with_attention(model: Any, attention: str) -> Any:
    """timm chooses its attention by a flag of each module."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = attention == "sdpa"
    return model


def load_timm(model: nn.Module, folder: Path) -> None:
    """Fill `model` from the folder's safetensors. Raises UserError for damaged, missing or unknown weights."""
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            state |= {k.removeprefix("timm_model."): v for k, v in load_file(file).items()}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: damaged weights: {str(error).splitlines()[0]}") from None
    state = {k: v for k, v in state.items() if not k.startswith(_HEADS)}
    try:
        missing, unknown = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        why = str(error).splitlines()[-1].strip()
        raise UserError(f"{folder}: weights do not fit the architecture: {why}") from None
    missing = [k for k in missing if not k.startswith(_HEADS)]
    if missing or unknown:
        raise UserError(
            f"checkpoint {folder}: {len(missing)} weights missing, {len(unknown)} unknown "
            f"(first: {[*missing, *unknown][0]}); the backbone would run on random weights, so nothing was done"
        )


def keep(parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Every parameter and buffer of named modules, on the host, floating-point ones as float32."""
    out = {}
    for prefix, module in parts.items():
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            value = value.detach().float() if value.is_floating_point() else value.detach()
            out[f"{prefix}.{name}"] = value.cpu().contiguous().clone()
    return out


def fill(parts: dict[str, nn.Module], weights: dict[str, Tensor] | None) -> None:
    """Put what `keep` gave into modules made on the meta device; None leaves them there."""
    if weights is None:
        return
    held = [(p, *entry) for p, m in parts.items() for entry in (*m.named_parameters(), *m.named_buffers())]
    check_fit({f"{prefix}.{name}": value for prefix, name, value in held}, weights)
    for prefix, module in parts.items():
        module.to_empty(device="cpu")
        for name, value in (*module.named_parameters(), *module.named_buffers()):
            value.data.copy_(weights[f"{prefix}.{name}"])


def pixel_groups(batch: Batch) -> list[tuple[list[int], Tensor]]:
    """Images of equal extent together: (places in the batch, (b, 3, H, W) float32 on the batch's device)."""
    if batch.pictures is None:
        raise ValueError("a batch from the store has no pixels")
    pixels = load_pixels([f for p in batch.pictures for f in (p.frames if isinstance(p, Video) else (p,))])
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, p in enumerate(pixels):
        groups.setdefault(tuple(p.shape), []).append(i)
    return [(places, torch.stack([pixels[i] for i in places]).to(batch.device)) for places in groups.values()]


def in_order(parts: Sequence[tuple[list[int], Tensor]]) -> Tensor:
    """Results of groups, each (b, rows of a sample, C), → packed rows in the batch's order."""
    if len(parts) == 1:
        return parts[0][1].flatten(0, 1)
    done = {i: rows for places, grid in parts for i, rows in zip(places, grid, strict=True)}
    return torch.cat([done[i] for i in sorted(done)])


def map_sizes(backbone: Backbone, batch: Batch, stream: str) -> np.ndarray:
    """(B, 2) int64: the extents of each sample's map of `stream`."""
    return sizes(batch, backbone.streams, stream)
