"""`Store`: a folder of feature spaces and the tail weights they share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.store import weights
from pipeline.store.errors import NoStore, StoreError
from pipeline.store.files.local import Files, explain
from pipeline.store.files.places import is_remote, open_files
from pipeline.store.format.digest import canonical_json, digest_json
from pipeline.store.format.document import dump_document, load_document, parse_json
from pipeline.store.format.names import FORMAT, MAX_SMALL_JSON, is_key, space_path
from pipeline.store.segments.segment import Problem
from pipeline.store.segments.unsealed import abandoned
from pipeline.store.select import choose_space
from pipeline.store.space import KIND as SPACE_KIND
from pipeline.store.space import REMOVING, Space, has_space, lost_identity

KIND = "activation-store"


class Store:
    """An opened store. Use `Store.open` or `Store.create`; opening and reading write nothing.

    `path`: its folder.
    """

    def __init__(self, files: Files) -> None:
        self.files = files

    def __repr__(self) -> str:
        return f"Store({self.files.root})"

    @property
    def path(self) -> Path:
        return Path(self.files.root)

    @property
    def where(self) -> str:
        """Its folder or URL, for people and for `Store.open`."""
        return self.files.root

    @classmethod
    def open(cls, path: str | Path, create: bool = False) -> Store:
        """The store at `path`; with `create` it is made if nothing is there.

        Raises StoreError if it is not a store, damaged, or of a newer format.
        """
        if create:
            return cls.create(path)
        files = open_files(path)
        if files.local and not Path(path).exists():
            raise NoStore(f"there is no store at {path}: check the path, or extract to it first")
        if files.local and not Path(path).is_dir():
            raise StoreError(f"{path} is a file, not a store: give the folder of a store")
        try:
            if files.size("store.json") is None:
                raise StoreError(f"{path} is not a store (it has no store.json): give the folder of a store")
            load_document(files.read("store.json", MAX_SMALL_JSON), files.where("store.json"), KIND)
        except OSError as error:
            raise explain(error, "opening the store", str(path)) from error
        return cls(files)

    @classmethod
    def create(cls, path: str | Path) -> Store:
        """The store at `path`, made if nothing is there. Raises StoreError for a folder that holds something else."""
        if is_remote(path):
            files = open_files(path)
            if files.size("store.json") is None:
                files.publish("store.json", dump_document({"kind": KIND, "format": FORMAT}))
            return cls.open(path)
        folder = Path(path)
        try:
            if folder.exists() and (not folder.is_dir() or (folder / "store.json").exists()):
                return cls.open(path)
            # Another process may be making the same store just now.
            if folder.exists() and any(not entry.name.startswith(".store.json.") for entry in folder.iterdir()):
                if (folder / "store.json").exists():  # it has, since we looked
                    return cls.open(path)
                raise StoreError(f"{path} is not empty and not a store: choose a new folder")
            folder.mkdir(parents=True, exist_ok=True)
            Files(path).publish("store.json", dump_document({"kind": KIND, "format": FORMAT}))
        except OSError as error:
            raise explain(error, "making a store at", str(path)) from error
        return cls.open(path)

    def spaces(self) -> list[Space]:
        """Every feature space, by id. Raises StoreError for a damaged one."""
        names = [name for name in self.files.names("spaces") if is_key(name)]
        return [Space(self.files, name) for name in names if self._has_space(name)]

    def space(self, id: str) -> Space:
        """The feature space `id`; its first characters suffice if no other begins so. Raises StoreError."""
        if is_key(id):
            return Space(self.files, id)
        names = [n for n in self.files.names("spaces") if is_key(n) and id and n.startswith(id) and self._has_space(n)]
        if len(names) != 1:
            what = f"{len(names)} feature spaces begin with" if names else "there is no feature space"
            raise StoreError(f"{what} {id!r} in {self.files.root}")
        return Space(self.files, names[0])

    def create_space(self, identity: Mapping[str, Any]) -> Space:
        """The feature space of `identity`, made if it is not there. Raises TypeError for what JSON cannot hold."""
        plain = parse_json(canonical_json(dict(identity)), "identity")
        space = digest_json(plain)
        if not self._has_space(space):
            self._finish_removal(space)
            document = dump_document({"kind": SPACE_KIND, "format": FORMAT, "id": space, "identity": plain})
            try:
                self.files.make(f"{space_path(space)}/segments")
                self.files.publish(f"{space_path(space)}/space.json", document)
                self.files.sync(["spaces", ""])
            except OSError as error:
                raise explain(error, "making a feature space in", self.files.root) from error
        return Space(self.files, space)

    def find(self, wanted: Mapping[str, Any] | None = None, /, **fields: Any) -> Space:
        """The one feature space whose identity has these values; dotted fields go into `wanted`. See `choose_space`."""
        return choose_space(self.spaces(), {**(wanted or {}), **fields})

    def save_weights(self, digest: str, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep tail weights of the checkpoint `digest`: `NAME.safetensors` → arrays, `NAME.json` → JSON object."""
        weights.save_weights(self.files, digest, files)

    def has_weights(self, digest: str, *names: str) -> bool:
        """Whether weights of `digest` are stored, all of `names` among them."""
        return weights.has_weights(self.files, digest, names)

    def load_tensors(self, digest: str, name: str) -> dict[str, np.ndarray]:
        """Tensors kept by `save_weights`, as arrays. Raises MissingStates, or StoreError if damaged."""
        return weights.load_tensors(self.files, digest, name)

    def load_json(self, digest: str, name: str) -> dict[str, Any]:
        """JSON kept by `save_weights`. Raises MissingStates, or StoreError if damaged."""
        return weights.load_json(self.files, digest, name)

    def verify(self, deep: bool = False) -> list[Problem]:
        """What is wrong with any feature space or kept weights: names and sizes, with `deep` every digest. All is read
        where the store is, nothing from the cache of this machine."""
        if (files := self.files.fresh()) is not self.files:
            return Store(files).verify(deep)
        found: list[Problem] = []
        needed: dict[Any, str] = {}
        for name in self.files.names("spaces"):
            try:
                if self._has_space(name) or lost_identity(self.files, name):
                    space = Space(self.files, name)
                    if space.tables():  # who trains from them needs the checkpoint's tail
                        needed.setdefault(space.identity.get("weights"), name)
                    found += space.verify(deep)
            except StoreError as error:
                found.append(Problem("", f"{space_path(name)}/space.json", str(error)))
        for name in self.files.names("weights"):
            found += [Problem("", file, what) for file, what in weights.verify(self.files, name, deep)]
        for digest, name in needed.items():
            if is_key(digest) and not any(entry[0] != "." for entry in self.files.names(f"weights/{digest}")):
                what = f"is missing, feature space {name[:12]} needs it: restore it, or extract again"
                found.append(Problem("", f"weights/{digest}", what))
        return found

    def _finish_removal(self, space: str) -> None:
        """Remove what a removal of `space` that was killed has left. Raises StoreError where one is under way."""
        note = f"{space_path(space)}/{REMOVING}"
        if self.files.size(note) is None:
            return
        if not abandoned(self.files, note):
            raise StoreError(
                f"feature space {space} is being removed from {self.files.root}: wait until that is done, or finish it "
                f"with `pipeline store rm {space[:12]}`"
            )
        try:
            self.files.remove_tree(space_path(space), last=REMOVING)
        except OSError as error:
            raise explain(error, "removing a feature space from", self.files.root) from error

    def _has_space(self, space: str) -> bool:
        return has_space(self.files, space)
