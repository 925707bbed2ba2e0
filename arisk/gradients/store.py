"""Per-sample gradients kept whole: in memory, or on disk as one safetensors shard per batch.

A parameter of a batch is kept as the factors of its gradients or multiplied out, whichever is smaller;
what several parameters share (the input of query, key and value) is kept once. Products with the
gradients come from either, and nothing of size N × P is ever in memory.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from arisk.base.artifacts import write_tensors
from arisk.base.errors import ArtifactError
from arisk.base.processes import rank, share, summed, world
from arisk.geometry.vectors import DEFAULT_MEMORY, Columns, column_groups, columns_of
from arisk.gradients.factors import (
    Outer,
    Part,
    Rows,
    blocks_of,
    dots_of,
    parameter_products,
    samples_of,
    tensors_of,
    weighted_sum_of,
    widened,
)
from arisk.gradients.layout import ParameterLayout

__all__ = ["GradientStore"]

#: Header entry that says which tensors make up which parameter.
PARTS = "parts"


@contextmanager
def _opened(path: Path) -> Generator[Any]:
    """A shard open for reading, with its many errors as one."""
    try:
        with safe_open(path, framework="pt") as shard:
            yield shard
    except (SafetensorError, OSError) as err:
        raise ArtifactError(
            f"a gradient shard cannot be read: {err}",
            where=str(path),
            fix="run `arisk collect` with --force to measure it again",
        ) from err


class GradientStore:
    """G (N, P) batch by batch, in memory or in files `shard-00000.safetensors` of a folder.

    Args:
        directory: folder of the shards, made when the first one is written; None for memory.
        memory: bytes of the first batches that stay in memory before the folder is used.
    """

    def __init__(self, directory: Path | None, *, memory: float = 0.0) -> None:
        self.directory = directory
        self._room = memory
        self._memory: dict[int, dict[str, list[Part]]] = {}
        self._headers: dict[Path, tuple[int, dict[str, list[list[Any]]]]] = {}

    def write_shard(self, index: int, parts: Mapping[str, Tensor | Sequence[Part]]) -> None:
        """Keep one batch's gradients by name, each (B, …) or a list of parts; a file appears whole or not.

        Raises:
            ArtifactError: the disk is full or the folder is read-only.
        """
        listed: dict[str, list[Part]] = {
            name: [own] if isinstance(own, Tensor) else list(own) for name, own in parts.items()
        }
        if self.directory is None:
            self._memory[index] = listed
            return
        tensors, table = _packed(listed)
        self._room -= sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if self._room >= 0:
            self._memory[index] = listed
            return
        size = samples_of(next(iter(listed.values())))
        header = {PARTS: json.dumps({"samples": size, "table": table})}
        write_tensors(self._path(index), tensors, header)

    def finished(self) -> list[int]:
        """Indices of the batches that are there and can be read; damaged shards are deleted."""
        found = set(self._memory)
        for index, path in self._shards().items():
            try:
                with safe_open(path, framework="pt") as shard:
                    known = PARTS in (shard.metadata() or {})
            except SafetensorError:
                known = False
            if known:
                found.add(index)
            else:
                path.unlink()
        return sorted(found)

    def _shards(self) -> dict[int, Path]:
        paths = self.directory.glob("shard-*.safetensors") if self.directory is not None else []
        return {int(path.stem.rpartition("-")[2]): path for path in paths}

    def _indices(self) -> list[int]:
        """Numbers of all batches, in order."""
        indices = sorted({*self._memory, *self._shards()})
        if not indices:
            raise ArtifactError(
                "there are no gradient shards",
                where=str(self.directory),
                fix="run `arisk collect` with --force",
            )
        return indices

    def _header(self, path: Path) -> tuple[int, dict[str, list[list[Any]]]]:
        """Samples of a shard and the tensors of each parameter, read once."""
        if path not in self._headers:
            with _opened(path) as shard:
                text = (shard.metadata() or {}).get(PARTS)
            if text is None:
                raise ArtifactError(
                    "a gradient shard has another format",
                    where=str(path),
                    fix="run `arisk collect` with --force to measure it again",
                )
            body = json.loads(text)
            self._headers[path] = (int(body["samples"]), body["table"])
        return self._headers[path]

    def parts(self, name: str) -> list[list[Part]]:
        """One parameter's parts over all batches, in at least float32."""
        return [self._read(index, name) for index in self._indices()]

    def _path(self, index: int) -> Path:
        assert self.directory is not None
        return self.directory / f"shard-{index:05d}.safetensors"

    def _read(self, index: int, name: str) -> list[Part]:
        if index in self._memory:
            return [widened(part) for part in self._memory[index][name]]
        table = self._header(self._path(index))[1]
        # Opened anew each time: a map that stays open would count every page it has touched.
        with _opened(self._path(index)) as shard:
            return [_unpacked(row, shard) for row in table[name]]

    def samples(self) -> int:
        """N, the samples in all shards."""
        return sum(self._sizes())

    def _sizes(self) -> list[int]:
        return [
            samples_of(next(iter(self._memory[index].values())))
            if index in self._memory
            else self._header(self._path(index))[0]
            for index in self._indices()
        ]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Columns start … stop − 1 of one parameter's gradients, (N, stop − start)."""
        parts = self.parts(name)
        made: list[Tensor] = []
        for where, block in blocks_of(parts, _shape(parts)):
            inside = slice(max(start, where.start) - where.start, min(stop, where.stop) - where.start)
            if inside.start < inside.stop:
                made.append(block[:, inside].clone())
        return torch.cat(made, dim=1)

    def sweep(self, layout: ParameterLayout) -> tuple[Tensor, Tensor, Tensor]:
        """Gram by module, mean and mean square in one read of the store.

        Args:
            layout: the selected parameters.

        Returns:
            K (L, N, N) float64 with K^(l) = G^(l) G^(l)ᵀ, ḡ (P,) and diag F (P,), both in the
            gradients' dtype.
        """
        samples = self.samples()
        grams = torch.zeros(len(layout.modules), samples, samples, dtype=torch.float64)
        mean = diagonal = torch.zeros(0)
        for i, name in enumerate(layout.names):
            made = parameter_products(self.parts(name), layout.shapes[i], share=(rank(), world()))
            if not i:
                # Filled in place: small results kept between large temporaries would fragment the heap.
                mean, diagonal = torch.zeros(2, layout.numel, dtype=made.mean.dtype)
            grams[layout.module_of_parameter[i]] += made.gram
            place = layout.slice_of(name)
            mean[place], diagonal[place] = made.mean, made.diagonal
        return summed(grams), summed(mean), summed(diagonal)

    def dots(
        self, layout: ParameterLayout, directions: Tensor | Columns, memory: float = DEFAULT_MEMORY
    ) -> Tensor:
        """G V (N, m) float64 for directions V (P, m).

        Args:
            layout: the selected parameters.
            directions: V, a tensor or what is read block by block.
            memory: bytes of a parameter's part of V that are held at a time (one column at least).
        """
        columns = columns_of(directions)
        total = torch.zeros(self.samples(), columns.shape[1], dtype=torch.float64)
        for i, name in enumerate(layout.names):
            where = layout.slice_of(name)
            for group in column_groups(where.stop - where.start, columns.shape[1], memory):
                own: Tensor | None = None
                for rows, parts in self._share(name):
                    if own is None:
                        own = columns.block(where, group).to(tensors_of(parts[0])[-1].dtype)
                        own = own.reshape(*layout.shapes[i], -1)
                    total[rows, group] += dots_of(parts, own)
        return summed(total)

    def weighted_sum(self, layout: ParameterLayout, weights: Tensor) -> Tensor:
        """Gᵀw (P,) for weights w (N,), in the gradients' dtype."""
        total: Tensor | None = None
        for name in layout.names:
            for rows, parts in self._share(name):
                dtype = tensors_of(parts[0])[-1].dtype
                if total is None:
                    total = torch.zeros(layout.numel, dtype=dtype)
                total[layout.slice_of(name)] += weighted_sum_of(parts, weights[rows].to(dtype)).flatten()
        if total is None:
            total = torch.zeros(layout.numel, dtype=tensors_of(self.parts(layout.names[0])[0][0])[-1].dtype)
        return summed(total)

    def _share(self, name: str) -> Iterator[tuple[slice, list[Part]]]:
        """Rows and parts of one parameter over the batches of this rank."""
        edges = [0]
        for size in self._sizes():
            edges.append(edges[-1] + size)
        indices = self._indices()
        for number in share(len(indices)):
            yield slice(edges[number], edges[number + 1]), self._read(indices[number], name)


def _shape(batches: Sequence[Sequence[Part]]) -> tuple[int, ...]:
    part = batches[0][0]
    return tuple(part.shape[1:]) if isinstance(part, Tensor) else part.shape


def _packed(parts: Mapping[str, Sequence[Part]]) -> tuple[dict[str, Tensor], dict[str, list[list[Any]]]]:
    """Tensors by number, each once, and for every part its tensors (and the height of a one-hot factor)."""
    tensors: dict[str, Tensor] = {}
    known: dict[tuple[Any, ...], str] = {}

    def keep(tensor: Tensor) -> str:
        same = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if same not in known:
            known[same] = f"t{len(known)}"
            tensors[known[same]] = tensor
        return known[same]

    table = {
        name: [
            [*map(keep, tensors_of(part)), *([part.height] if isinstance(part, Rows) else [])] for part in own
        ]
        for name, own in parts.items()
    }
    return tensors, table


def _unpacked(row: Sequence[Any], shard: Any) -> Part:
    read = [shard.get_tensor(key) for key in row if isinstance(key, str)]
    if len(read) == 1:
        return widened(read[0])
    return widened(Outer(*read) if len(row) == 2 else Rows(read[0], read[1], row[2]))
