"""Per-sample gradients on disk: one safetensors shard per batch, read back a few columns at a time."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from arisk.artifacts import write_tensors
from arisk.errors import ArtifactError
from arisk.geometry.gram import COLUMNS, gram
from arisk.gradients.layout import ParameterLayout
from arisk.ranks import rank, summed, world

__all__ = ["GradientStore"]

#: Entries of one block read at a time (N × columns); bounds memory at 4 bytes each.
BLOCK_ENTRIES = 32_000_000


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
    """G (N, P) in a folder of shards `shard-00000.safetensors`, one tensor (B, p) per parameter.

    Nothing of size N × P is ever in memory; blocks of about 128 MB are.

    Args:
        directory: folder of the shards; made when the first one is written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._known: tuple[list[Path], list[int]] | None = None

    def _path(self, index: int) -> Path:
        return self.directory / f"shard-{index:05d}.safetensors"

    def write_shard(self, index: int, blocks: dict[str, Tensor]) -> None:
        """Write one batch's gradients by name, each (B, p); the file appears whole or not at all.

        Raises:
            ArtifactError: the disk is full or the folder is read-only.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        write_tensors(self._path(index), {name: block.contiguous() for name, block in blocks.items()})

    def finished(self) -> list[int]:
        """Indices of the shards that are there and can be opened; damaged ones are deleted."""
        found: list[int] = []
        for path in self._shards():
            try:
                with safe_open(path, framework="pt") as shard:
                    list(shard.keys())
                found.append(int(path.stem.rpartition("-")[2]))
            except SafetensorError:
                path.unlink()
        return found

    def _shards(self) -> list[Path]:
        return sorted(self.directory.glob("shard-*.safetensors"))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """(N, stop − start) columns of one parameter, all samples.

        Raises:
            ArtifactError: a shard is missing, damaged or lacks the parameter.
        """
        block: Tensor | None = None
        row = 0
        for path, size in zip(self._require_shards(), self._sizes(), strict=True):
            # Opened anew each time: a map that stays open would count every page it has touched. The
            # whole tensor is a view of the map; only the columns copied out of it are read.
            with _opened(path) as shard:
                part = shard.get_tensor(name)[:, start:stop]
                if block is None:
                    block = torch.empty(sum(self._sizes()), part.shape[1], dtype=part.dtype)
                block[row : row + size] = part
                row += size
        assert block is not None
        return block

    def _require_shards(self) -> list[Path]:
        shards = self._shards()
        if not shards:
            raise ArtifactError(
                "there are no gradient shards",
                where=str(self.directory),
                fix="run `arisk collect` with --force",
            )
        return shards

    def _blocks(self, layout: ParameterLayout) -> Iterator[tuple[int, slice, Tensor]]:
        """(parameter index, place in the flat vector, (N, columns) block) over this rank's share of θ."""
        samples = self.samples()
        width = max(COLUMNS, BLOCK_ENTRIES // max(samples, 1) // COLUMNS * COLUMNS)
        number = -1
        for i, name in enumerate(layout.names):
            begin, end = layout.offsets[i], layout.offsets[i + 1]
            for start in range(0, end - begin, width):
                stop = min(start + width, end - begin)
                number += 1
                if number % world() == rank():
                    yield i, slice(begin + start, begin + stop), self.rows(name, start, stop)

    def samples(self) -> int:
        """N, the samples in all shards."""
        return sum(self._sizes())

    def _sizes(self) -> list[int]:
        """Samples in each shard, read from the headers once per set of shards."""
        paths = self._require_shards()
        if self._known is None or self._known[0] != paths:
            sizes: list[int] = []
            for path in paths:
                with _opened(path) as shard:
                    sizes.append(int(shard.get_slice(next(iter(shard.keys()))).get_shape()[0]))
            self._known = (paths, sizes)
        return self._known[1]

    def sweep(self, layout: ParameterLayout) -> tuple[Tensor, Tensor, Tensor]:
        """Gram by module, mean and mean square in one read of the store.

        Args:
            layout: the selected parameters.

        Returns:
            K (L, N, N) float64 with K^(l) = G^(l) G^(l)ᵀ, ḡ (P,) and diag F (P,), both in the
            store's dtype.
        """
        samples = self.samples()
        grams = torch.zeros(len(layout.modules), samples, samples, dtype=torch.float64)
        # Filled in place: small results kept between large temporaries would fragment the heap.
        dtype = self.rows(layout.names[0], 0, 1).dtype
        mean, diagonal = torch.zeros(layout.numel, dtype=dtype), torch.zeros(layout.numel, dtype=dtype)
        weights = torch.full((samples,), 1 / samples, dtype=dtype)
        for i, where, block in self._blocks(layout):
            # Three results from one visit of the cache.
            for start in range(0, block.shape[1], COLUMNS):
                part = block[:, start : start + COLUMNS]
                place = slice(where.start + start, where.start + start + part.shape[1])
                grams[layout.module_of_parameter[i]] += gram(part)
                mean[place] = weights @ part
                diagonal[place] = weights @ part.square()
        return summed(grams), summed(mean), summed(diagonal)

    def dots(self, layout: ParameterLayout, directions: Tensor) -> Tensor:
        """G V (N, m) float64 for directions V (P, m)."""
        total = torch.zeros(self.samples(), directions.shape[1], dtype=torch.float64)
        for _, where, block in self._blocks(layout):
            # Column blocks in float32, their sum in float64, as for the Gram matrix.
            for start in range(0, block.shape[1], COLUMNS):
                part = block[:, start : start + COLUMNS]
                total += part @ directions[where][start : start + COLUMNS].to(part.dtype)
        return summed(total)

    def weighted_sum(self, layout: ParameterLayout, weights: Tensor) -> Tensor:
        """Gᵀw (P,) for weights w (N,), in the store's dtype."""
        total = torch.zeros(layout.numel, dtype=self.rows(layout.names[0], 0, 1).dtype)
        for _, where, block in self._blocks(layout):
            total[where] = weights.to(block.dtype) @ block
        return summed(total)
