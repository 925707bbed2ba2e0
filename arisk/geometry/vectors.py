"""P-sized vectors side by side, V (P, m), of which no more lies in memory than is being multiplied.

A model of 135 million parameters makes a vector of half a gigabyte, and stage score works with dozens of
them. Products with them go parameter by parameter, so what is asked of V is one block at a time: it may
lie in memory, in a file (`VectorStack`), or be made when it is read (`Scaled`).

Gram matrices of tall rows, accumulated in float64; products of vectors in parts, one tensor per parameter.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from arisk.base.artifacts import disk_error, existing_parent
from arisk.base.errors import ArtifactError

__all__ = [
    "COLUMNS",
    "DEFAULT_MEMORY",
    "Columns",
    "Dense",
    "Scaled",
    "Scratch",
    "VectorStack",
    "column_groups",
    "columns_of",
    "gram",
    "inner_product",
    "norm",
    "squared_norm",
]

#: Entries of each vector that are read at a time.
CHUNK = 1 << 22
#: Bytes of directions in memory where no budget is given.
DEFAULT_MEMORY = 1e9


def inner_product(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Σ ⟨a, b⟩ over the parts of two vectors in float64; a device is waited for once, not once a part.

    Args:
        pairs: parts of like shape; they may lie on several devices.
    """
    return _total([(a.double() * b.double()).sum() for a, b in pairs])


def squared_norm(parts: Iterable[Tensor | None]) -> float:
    """‖·‖² over all parts together, in float64; None counts as zero."""
    return _total([part.double().square().sum() for part in parts if part is not None])


def norm(parts: Iterable[Tensor | None]) -> float:
    """‖·‖ over all parts together, in float64; None counts as zero."""
    return math.sqrt(squared_norm(parts))


def _total(sums: Sequence[Tensor]) -> float:
    return float(torch.stack([one.to(sums[0].device) for one in sums]).sum()) if sums else 0.0


class Columns(Protocol):
    """V (P, m) by blocks."""

    @property
    def shape(self) -> tuple[int, int]:
        """(P, m)."""
        ...

    def block(self, where: slice, columns: slice) -> Tensor:
        """V[where, columns]; `where` holds whole parameters."""
        ...


@dataclass(frozen=True)
class Dense:
    """A tensor (P, m) in memory."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(P, m)."""
        return self.tensor.shape[0], self.tensor.shape[1]

    def block(self, where: slice, columns: slice) -> Tensor:
        """V[where, columns]."""
        return self.tensor[where, columns]


@dataclass(frozen=True)
class Scaled:
    """diag(by) V, multiplied when it is read."""

    columns: Columns
    by: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(P, m)."""
        return self.columns.shape

    def block(self, where: slice, columns: slice) -> Tensor:
        """by[where] · V[where, columns]."""
        return self.by[where, None] * self.columns.block(where, columns)


class VectorStack:
    """Vectors (P,) of one dtype, appended one by one; in memory, or in a file that is read in pieces.

    Args:
        numel: P.
        dtype: dtype of the vectors.
        path: file for them, made new; None for memory.
    """

    def __init__(self, numel: int, dtype: torch.dtype, path: Path | None = None) -> None:
        self.numel = numel
        self.dtype = dtype
        self.path = path
        self._count = 0
        self._held: list[Tensor] = []
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b"")
            except OSError as err:
                raise disk_error(err, path) from err

    @property
    def shape(self) -> tuple[int, int]:
        """(P, m)."""
        return self.numel, self._count

    def append(self, vector: Tensor) -> None:
        """Add a vector.

        Raises:
            ArtifactError: the disk is full.
        """
        self._count += 1
        if self.path is None:
            self._held.append(vector.detach().to("cpu", self.dtype, copy=True).contiguous())
            return
        own = vector.detach().to("cpu", self.dtype).contiguous()
        try:
            with self.path.open("ab") as file:
                for start in range(0, self.numel, CHUNK):
                    file.write(own[start : start + CHUNK].view(torch.uint8).numpy().data)
        except OSError as err:
            raise disk_error(err, self.path) from err

    def block(self, where: slice, columns: slice) -> Tensor:
        """V[where, columns], each column read in one piece."""
        which = range(*columns.indices(self._count))
        out = torch.empty(where.stop - where.start, len(which), dtype=self.dtype)
        for i, j in enumerate(which):
            out[:, i] = self._read(j, where.start, where.stop)
        return out

    def dots(self, vector: Tensor) -> Tensor:
        """Vᵀ v (m,) float64."""
        total = torch.zeros(self._count, dtype=torch.float64)
        for where in self._pieces():
            own = vector[where].to(self.dtype)
            total += torch.stack([self._read(j, where.start, where.stop) @ own for j in range(self._count)])
        return total

    def combine(self, weights: Tensor) -> Tensor:
        """V w (P,) for weights w (m,)."""
        out = torch.zeros(self.numel, dtype=self.dtype)
        for where in self._pieces():
            for j, weight in enumerate(weights.tolist()):
                out[where].add_(self._read(j, where.start, where.stop), alpha=weight)
        return out

    def tensor(self) -> Tensor:
        """V (P, m) in memory."""
        return self.block(slice(0, self.numel), slice(None))

    def _pieces(self) -> Iterator[slice]:
        for start in range(0, self.numel, CHUNK):
            yield slice(start, min(start + CHUNK, self.numel))

    def _read(self, j: int, start: int, stop: int) -> Tensor:
        if self.path is None:
            return self._held[j][start:stop]
        size = self.dtype.itemsize
        # Read, not mapped: pages of a map count as memory of this process.
        with self.path.open("rb") as file:
            file.seek((j * self.numel + start) * size)
            return torch.frombuffer(bytearray(file.read((stop - start) * size)), dtype=self.dtype)


class Scratch:
    """Room for stacks of vectors: memory up to a budget, then files in a folder that `close` removes.

    Args:
        folder: where files may lie; what is there is removed. None: everything stays in memory.
        memory: bytes of vectors that may stay in memory.
    """

    def __init__(self, folder: Path | None = None, memory: float = DEFAULT_MEMORY) -> None:
        self.folder = folder
        self.memory = memory
        self._room = memory
        self._files = 0
        self.close()

    def stack(self, numel: int, count: int, dtype: torch.dtype) -> VectorStack:
        """An empty stack for about `count` vectors.

        Raises:
            ArtifactError: neither the memory budget nor the disk has room for them.
        """
        needed = numel * count * dtype.itemsize
        if self.folder is None or needed <= self._room:
            self._room -= needed
            return VectorStack(numel, dtype)
        free = shutil.disk_usage(existing_parent(self.folder)).free
        if needed > free:
            raise ArtifactError(
                f"{count} vectors of {numel:,} entries take {needed / 1e9:.1f} GB of disk, and "
                f"{free / 1e9:.1f} GB are free",
                where=str(self.folder),
                fix="free disk space or give another --run-dir, raise `collect.memory_budget_gb`, or lower "
                "`score.batches` and `score.krylov_dim`",
            )
        self._files += 1
        return VectorStack(numel, dtype, self.folder / f"vectors-{self._files}.bin")

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the files."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def columns_of(directions: Tensor | Columns) -> Columns:
    """Directions as `Columns`."""
    return Dense(directions) if isinstance(directions, Tensor) else directions


def column_groups(entries: int, count: int, memory: float) -> Iterator[slice]:
    """Columns in groups of which `entries` rows of float64 fit in `memory` bytes; one at least."""
    width = min(max(1, count), memory // (8 * max(1, entries)))  # min first: memory may be infinite
    width = max(1, int(width))
    for start in range(0, count, width):
        yield slice(start, min(start + width, count))


#: Columns multiplied at a time: float32 products of this width summed in float64 cost what float32
#: costs, with less than a hundredth of its error; at N = 128 a block of them stays in the cache.
COLUMNS = 4096
#: Fewest rows of a tile and most tiles a side: smaller ones save up to half of the multiplications and
#: run slower each.
TILE, TILES = 32, 8


def gram(rows: Tensor) -> Tensor:
    """K = G Gᵀ, float32 (or float64) products of column blocks summed in float64.

    Only tiles on and below the diagonal are multiplied, the rest is their mirror image.

    Args:
        rows: (N, p) G, any float dtype; half precision is widened to float32 first.

    Returns:
        (N, N) float64, symmetric, positive semi-definite up to rounding.
    """
    count = rows.shape[0]
    total = torch.zeros(count, count, dtype=torch.float64, device=rows.device)
    edges = range(0, max(count, 1), max(TILE, count // TILES))
    for start in range(0, rows.shape[1], COLUMNS):
        block = rows[:, start : start + COLUMNS]
        if block.dtype not in (torch.float32, torch.float64):
            block = block.float()
        for first in edges:
            stop = min(first + edges.step, count)
            total[first:stop, :stop] += block[first:stop] @ block[:stop].T
    return torch.tril(total) + torch.tril(total, -1).T
