"""Projections: states kept in fewer channels, by an affine map a state that is fitted once and then never changes.

`pca:K` keeps the K directions of largest variance of a sample, `orthogonal:K` K random orthonormal ones. A row x is
kept as z = (x − mean) V, V (width, K) with orthonormal columns; a tuner's first map then reads K channels, which is the
same method with that map confined to a subspace (methods §6.3). States that feed the live tail or a head stay full.

`pca-maps:K` keeps these in K channels, too. Norms and heads of a pyramid then read z Vᵀ + mean, of full width again:
all stays as it is, on maps that have lost what lies outside the subspace.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.extract.encoding import tensors_of
from pipeline.store.errors import NonFinite, StoreError, UserError
from pipeline.store.format.digest import digest_bytes

MAPS = "pca-maps"
KINDS = ("pca", "orthogonal", MAPS)


def parse_projection(text: str, width: int | None = None) -> tuple[str, int] | None:
    """ "pca:96" → ("pca", 96); "none" → None. Raises UserError for anything else, or K not below `width`."""
    if text == "none":
        return None
    kind, _, count = text.partition(":")
    if kind not in KINDS or not count.isdigit() or int(count) < 1:
        raise UserError(
            f"projection: none, pca:K, orthogonal:K or pca-maps:K with a number of channels K, not {text!r}"
        )
    if width is not None and int(count) >= width:
        raise UserError(f"projection: {text} keeps {count} channels, the backbone's states have {width}: choose fewer")
    return kind, int(count)


@dataclass(frozen=True)
class Projection:
    """state → `mean` (width,) and `basis` (width, K), float32."""

    mean: dict[str, Tensor]
    basis: dict[str, Tensor]

    @property
    def width(self) -> int:
        """K."""
        return next(iter(self.basis.values())).shape[1]

    @property
    def digest(self) -> str:
        """xxh3-128 over every name and value: part of the identity of a feature space."""
        parts = []
        for name in sorted(self.basis):
            parts += [name.encode(), self.mean[name].cpu().numpy().tobytes(), self.basis[name].cpu().numpy().tobytes()]
        return digest_bytes(*parts)

    def apply(self, states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Projected states are (rows, K) float32, the others as they are."""
        out = dict(states)
        for name in self.basis.keys() & states.keys():
            rows = states[name].float()
            out[name] = (rows - self.mean[name].to(rows.device)) @ self.basis[name].to(rows.device)
        return out

    def widened(self, name: str, rows: Tensor) -> Tensor:
        """`rows` (n, K) of a projected state in its full width, float32; others as they are."""
        if name not in self.basis:
            return rows.float()
        return rows.float() @ self.basis[name].to(rows.device).T + self.mean[name].to(rows.device)

    def tensors(self) -> dict[str, Tensor]:
        """As one safetensors file holds it."""
        parts = (("mean", self.mean), ("basis", self.basis))
        return {f"{what}/{name}": tensor for what, found in parts for name, tensor in found.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Projection:
        def part(what: str) -> dict[str, Tensor]:
            return {n.removeprefix(f"{what}/"): t for n, t in tensors.items() if n.startswith(f"{what}/")}

        return cls(part("mean"), part("basis"))


class Moments:
    """Sums over the rows of each state, in double precision: one pass, (width, width) of memory a state."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.sum: dict[str, Tensor] = {}
        self.product: dict[str, Tensor] = {}

    def add(self, states: Mapping[str, Tensor]) -> None:
        """Count in rows of each state, (rows, width)."""
        for name, rows in states.items():
            x = rows.double().cpu()
            if not bool(torch.isfinite(x).all()):
                row = int((~torch.isfinite(x)).any(1).nonzero()[0])
                raise NonFinite(
                    f"state {name} is not finite while the projection is fitted; try --precision float32", row
                )
            if name not in self.rows:
                self.rows[name] = 0
                self.sum[name] = x.new_zeros(x.shape[1])
                self.product[name] = x.new_zeros(x.shape[1], x.shape[1])
            self.rows[name] += len(x)
            self.sum[name] += x.sum(0)
            self.product[name] += x.T @ x

    def pca(self, width: int) -> Projection:
        """The mean and the `width` directions of largest variance of each state, the largest first."""
        mean, basis = {}, {}
        for name, count in self.rows.items():
            if count <= width:
                raise UserError(
                    f"projection: pca:{width} needs more than {width} positions to fit on, there are {count}"
                )
            centre = self.sum[name] / count
            covariance = self.product[name] / count - torch.outer(centre, centre)
            vectors = torch.linalg.eigh(covariance).eigenvectors[:, -width:].flip(1)
            # An eigenvector has no sign of its own; the largest entry is made positive.
            largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
            mean[name], basis[name] = centre.float(), (vectors * largest.sign()).float().contiguous()
        return Projection(mean, basis)


def orthogonal(widths: Mapping[str, int], width: int, seed: int) -> Projection:
    """The same `width` random orthonormal directions for every state of one width; the mean is zero."""
    basis: dict[int, Tensor] = {}
    for full in sorted(set(widths.values())):
        g = torch.Generator().manual_seed(seed)
        basis[full] = torch.linalg.qr(torch.randn(full, width, generator=g, dtype=torch.float64)).Q.float().contiguous()
    return Projection({n: torch.zeros(w) for n, w in widths.items()}, {n: basis[w] for n, w in widths.items()})


def fit(
    kind: str, width: int, seed: int, widths: Mapping[str, int], batches: Iterable[Mapping[str, Tensor]]
) -> Projection:
    """A projection of the states `widths` (name → full width) to `width` channels. `batches`: states of a sample, read
    only where the kind needs them."""
    if kind == "orthogonal":
        return orthogonal(widths, width, seed)
    moments = Moments()
    for states in batches:
        moments.add(states)
    return moments.pca(width)


def sample(count: int, of: int, seed: int) -> np.ndarray:
    """`count` of `of` samples to fit on, drawn by `seed`, ascending."""
    return np.sort(np.random.default_rng(seed).permutation(of)[:count])


def file_name(digest: str) -> str:
    """The file of a projection, beside the checkpoint's tail weights."""
    return f"projection-{digest}.safetensors"


def about_name(digest: str) -> str:
    """The file that says what a projection was fitted on: `samples`, `task`, `seed`."""
    return f"projection-{digest}.json"


def load_projection(store: Any, identity: Mapping[str, Any]) -> Projection | None:
    """The projection of a feature space, None where it has none. Raises StoreError if it is damaged or missing."""
    if identity.get("projection", "none") == "none":
        return None
    wanted = identity["projection_fit"]
    found = Projection.from_tensors(tensors_of(store.load_tensors(identity["weights"], file_name(wanted))))
    if found.digest != wanted:
        raise StoreError(f"the projection {file_name(wanted)} is another one than its name says: restore it")
    return found
