"""Per-sample gradients that are kept: whole in a store, or as sketches.

Whole: in memory, or on disk as one safetensors shard per batch. A parameter of a batch is kept as the
factors of its gradients or multiplied out, whichever is smaller; what several parameters share (the input
of query, key and value) is kept once. Products come from either, and nothing of size N × P is ever in
memory.

Sketches are small random projections whose inner products estimate the true ones: a weight's gradient G (O,
I) becomes L G Rᵀ with L (p, O) and R (q, I) of independent N(0, 1/p) and N(0, 1/q) entries, so E⟨sketch,
sketch'⟩ = ⟨G, G'⟩ (Johnson–Lindenstrauss); a side no longer than p is kept as it is. From the factors of G
= Y'ᵀX it is (Y'Lᵀ)ᵀ(XRᵀ): nothing of the parameter's size is made. The sides are seeded by the parameter's
name, so sketches made at different times or by different processes go together. The error grows with
‖G‖‖G'‖, so two gradients that are nearly orthogonal need `balanced` sides. For ranking examples only:
eigenvalues, overlap and γ̂ are biased in a sketch, and exact products of a few directions cost less. Say
"sketch" beside such numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from arisk.base.artifacts import aligned, write_tensors
from arisk.base.errors import ArtifactError
from arisk.base.processes import rank, share, summed, world
from arisk.base.task import Batch, LossFn
from arisk.geometry.vectors import DEFAULT_MEMORY, Columns, column_groups, columns_of
from arisk.gradients.engines import per_sample_parts
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
from arisk.gradients.layout import ParameterLayout, batch_size

__all__ = [
    "GradientStore",
    "Sides",
    "Sketch",
    "balanced",
    "per_sample_sketches",
    "sketch_of",
    "sketch_products",
]

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
        # Batches behind one on disk go there too, as in the run that was killed after it.
        if self._room >= 0 and index <= min(self._shards(), default=index):
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
    read = [aligned(shard.get_tensor(key)) for key in row if isinstance(key, str)]
    if len(read) == 1:
        return widened(read[0])
    return widened(Outer(*read) if len(row) == 2 else Rows(read[0], read[1], row[2]))


#: Ratios below this share of the largest count as that.
SMALLEST = 1e-12


@dataclass(frozen=True)
class Sides:
    """Projections of one parameter, None where that side is kept: left (p, O), right (q, I).

    A parameter that is no matrix is taken as one row, O = 1.
    """

    left: Tensor | None
    right: Tensor | None
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        """Numbers in the sketch of one gradient."""
        height = self.rows if self.left is None else self.left.shape[0]
        return height * (self.columns if self.right is None else self.right.shape[0])


class Sketch:
    """The random sides of every selected parameter, and where its numbers stand in a sketch.

    Args:
        layout: the selected parameters.
        side: p = q, entries kept of each side of a matrix; a vector keeps side².
        dtype: dtype of the gradients.
        device: device of the gradients.
    """

    def __init__(
        self, layout: ParameterLayout, *, side: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.sides: dict[str, Sides] = {}
        self.places: dict[str, slice] = {}
        self.numel = 0
        for name, shape in zip(layout.names, layout.shapes, strict=True):
            rows, columns = shape if len(shape) == 2 else (1, math.prod(shape))
            width = side if len(shape) == 2 else side * side
            sides = Sides(
                _side(f"{name}/left", side, rows, dtype, device),
                _side(f"{name}/right", width, columns, dtype, device),
                rows,
                columns,
            )
            self.sides[name] = sides
            self.places[name] = slice(self.numel, self.numel + sides.numel)
            self.numel += sides.numel


def _side(seed: str, kept: int, length: int, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """(kept, length) of N(0, 1/kept) drawn on the CPU from the text; None where nothing would be saved."""
    if length <= kept:
        return None
    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(number)
    drawn = torch.randn(kept, length, generator=generator, dtype=torch.float32) / math.sqrt(kept)
    return drawn.to(device, dtype)


def balanced(sides: Sides, ratio: Tensor) -> tuple[Sides, Tensor]:
    """Sides that estimate the product with one known direction V with less noise.

    ⟨G, V⟩ = ⟨G∘s, V/s⟩ for any s > 0, and the noise grows with ‖G∘s‖‖V/s‖, which is least in the mean
    at s² ∝ |V|/rms(G) (Cauchy–Schwarz). Only s = abᵀ can be drawn into the sides, so that factors stay
    factors: √ratio is fitted by the means of its logarithm over rows and columns. A side that is kept is
    left alone.

    Args:
        sides: the parameter's sides, with which V/s is to be projected.
        ratio: (rows, columns) |V|/rms(G), ≥ 0, up to a factor.

    Returns:
        The sides for G, and s (rows, columns) that V is to be divided by.
    """
    logs = 0.5 * ratio.clamp(min=max(SMALLEST * float(ratio.max()), torch.finfo(ratio.dtype).tiny)).log()
    both = sides.left is not None and sides.right is not None
    middle = logs.mean() / 2 if both else torch.zeros_like(logs.mean())
    a = torch.ones_like(logs[:, 0]) if sides.left is None else (logs.mean(1) - middle).exp()
    b = torch.ones_like(logs[0]) if sides.right is None else (logs.mean(0) - middle).exp()
    left = None if sides.left is None else sides.left * a.to(sides.left)
    right = None if sides.right is None else sides.right * b.to(sides.right)
    return Sides(left, right, sides.rows, sides.columns), a[:, None] * b


def sketch_of(parts: Sequence[Part], sides: Sides) -> Tensor:
    """L G_i Rᵀ (B, sketch size) of one parameter's gradients, given as the sum of parts.

    Args:
        parts: factors or blocks, as `hook_parts` hands them on.
        sides: the parameter's projections.
    """
    return sum((_projected(part, sides) for part in parts[1:]), _projected(parts[0], sides))


def _projected(part: Part, sides: Sides) -> Tensor:
    if isinstance(part, Tensor):
        block = part.reshape(part.shape[0], sides.rows, sides.columns)
        if sides.right is not None:
            block = block @ sides.right.T
        return (block if sides.left is None else sides.left @ block).flatten(1)
    right = part.right if sides.right is None else part.right @ sides.right.T
    if isinstance(part, Outer):
        left = part.left if sides.left is None else part.left @ sides.left.T
    elif sides.left is None:
        left = torch.nn.functional.one_hot(part.index, part.height).to(right.dtype)
    else:
        left = sides.left.T[part.index]
    return torch.bmm(left.transpose(1, 2), right).flatten(1)


def per_sample_sketches(
    model: nn.Module,
    batch: Batch,
    loss_fn: LossFn,
    layout: ParameterLayout,
    sketch: Sketch,
    *,
    engine: str = "hooks",
    offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Losses (B,) and sketches (B, D) of all samples from one forward and backward pass.

    Args:
        model: the model, inside `measuring`.
        batch: B samples along dimension 0.
        loss_fn: per-sample losses (B,), or a scalar that is their mean.
        layout: the selected parameters.
        sketch: the projections.
        engine: "hooks" never multiplies a linear layer's gradient out; the others do.
        offset: index of the batch's first sample, for messages.

    Raises:
        NumericsError: a loss or gradient is NaN or infinite; names the sample.
        ShapeError: a module's dimension 0 is not the batch, so hooks cannot tell samples apart.
    """
    rows: list[Tensor] = []

    def keep(name: str, parts: Sequence[Part]) -> None:
        made = sketch_of(parts, sketch.sides[name])
        if not rows:
            rows.append(made.new_empty(batch_size(batch), sketch.numel))
        rows[0][:, sketch.places[name]] = made

    losses = per_sample_parts(model, batch, loss_fn, layout, keep, engine=engine, offset=offset)
    return losses, rows[0]


def sketch_products(first: Tensor, second: Tensor) -> Tensor:
    """Estimates of ⟨G_i, G_j⟩, (N, M) float64, from sketches (N, D) and (M, D).

    Column blocks are multiplied in the sketches' dtype and summed in float64.
    """
    total = torch.zeros(len(first), len(second), dtype=torch.float64, device=first.device)
    for start in range(0, first.shape[1], 4096):
        total += first[:, start : start + 4096] @ second[:, start : start + 4096].T
    return total
