"""inspect --compare: what is different in two files, of any two kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qconvert import kernels
from qconvert.containers import CONTAINERS
from qconvert.errors import InputError, UsageError
from qconvert.files import OpenModel, open_model
from qconvert.files.dequantized import dequantized
from qconvert.files.equalised import Exponents, equalised, read_exponents
from qconvert.files.provenance import PROVENANCE, provenance_of
from qconvert.geometry import Tile, row_length, tiles
from qconvert.kernels.records import ErrorSums
from qconvert.model import Model, TensorInfo
from qconvert.progress import Progress
from qconvert.report import ComparedGroup, ComparedTensor, Comparison
from qconvert.stages.facts import facts_of
from qconvert.stages.grouping import chosen, layer_of, layer_order, role_of
from qconvert.stages.made_from import made_from
from qconvert.stages.parallel import Workers
from qconvert.stages.target import target_of

Pair = tuple[TensorInfo, TensorInfo]


@dataclass(slots=True)
class _Sums:
    """What was found of a pair so far."""

    error: ErrorSums
    differing: int = 0


def comparison(
    a: OpenModel, other: Path, names: tuple[str, ...], threads: int, progress: Progress
) -> Comparison:
    """Hold ``other`` against ``a``.

    Args:
        names: only tensors whose names have one of these texts, or are matched by one.

    Raises:
        InputError: the other cannot be read.
        UsageError: a name matches no tensor of either.
    """
    b = open_model(other)
    try:
        return _Comparison(a, b, names, threads, progress).run()
    finally:
        b.close()


class _Comparison:
    def __init__(
        self,
        a: OpenModel,
        b: OpenModel,
        names: tuple[str, ...],
        threads: int,
        progress: Progress,
    ) -> None:
        self.opened = a, b
        self.notes: list[str] = []
        self.a, self.b = self._aligned(a, b)
        self.threads, self.progress = threads, progress
        both = {t.name: t for m in (self.b, self.a) for t in m.tensors}
        wanted = {t.name for t in chosen(both.values(), names)}
        self.of_a, self.of_b = (
            {t.name: t for t in m.tensors if t.name in wanted} for m in (self.a, self.b)
        )

    def run(self) -> Comparison:
        pairs = [(t, self.of_b[name]) for name, t in self.of_a.items() if name in self.of_b]
        if not pairs:
            self.notes.append(f"0 of {len(self.of_a):,} names match: nothing could be compared")
        compared = self._compared(pairs)
        differing = [t for t, _ in compared if not t.equal and t.comparable]
        total = sum((s.error for t, s in compared if t.comparable), ErrorSums())
        a, b = self.opened
        return Comparison(
            path=str(b.path),
            kind=b.kind,
            only_a=[n for n in self.of_a if n not in self.of_b],
            only_b=[n for n in self.of_b if n not in self.of_a],
            tensors=[t for t, _ in compared],
            roles=_groups(compared, role_of),
            layers=layer_order(_groups(compared, layer_of)),
            a_bytes=sum(t.nbytes for t in a.tensors),
            b_bytes=sum(t.nbytes for t in b.tensors),
            sqnr_db=total.sqnr_db if differing else None,
            facts=_changes(facts_of(a), facts_of(b)),
            metadata=_changes(_plain(a.metadata), _plain(b.metadata)),
            notes=self.notes,
        )

    def _aligned(self, a: OpenModel, b: OpenModel) -> tuple[Model, Model]:
        """Both under the same names and with the same factors of channels, where one was made from
        the other.
        """
        of_a, of_b = (read_exponents(provenance_of(m), m.path) for m in (a, b))
        if of_a and of_b:
            if not _same(of_a, of_b):
                self.notes.append(
                    "channels were rescaled by other factors in each (--equalise): errors are of "
                    "the rescaled weights, and say little"
                )
            return a, b
        if a.kind == b.kind and not of_a and not of_b:
            return a, b
        made, source = (a, b) if of_a or (a.kind == "gguf" and not of_b) else (b, a)
        try:
            plain = equalised(dequantized(source), of_a or of_b)
            named = target_of(CONTAINERS[made.kind]).source_of(made, source, plain)
        except (InputError, UsageError):
            return a, b
        if of_a or of_b:
            self.notes.append(
                f"{made.path.name} has channels that were rescaled (--equalise), and "
                f"{source.path.name} is compared with the same factors"
            )
        return (made, named) if made is a else (named, made)

    def _compared(self, pairs: Sequence[Pair]) -> list[tuple[ComparedTensor, _Sums]]:
        sums = {a.name: _Sums(ErrorSums()) for a, _ in pairs}
        alike = [p for p in pairs if p[0].shape == p[1].shape and p[0].real and p[1].real]
        self.progress.begin("compare", sum(a.nbytes for a, _ in alike), "bytes")
        with Workers(self.threads) as workers:
            for a, tile, error, differing in workers.map(self._tile, _tiles(alike)):
                sums[a.name].error += error
                sums[a.name].differing += differing
                self.progress.advance(a.nbytes * (tile.stop - tile.start) // a.size, a.name)
        self.progress.end()
        stored = [{t.name: t for t in m.tensors} for m in self.opened]
        same = {a.name for a, _ in alike}
        return [
            (self._told(p, sums[p[0].name], p[0].name in same, stored), sums[p[0].name])
            for p in pairs
        ]

    def _tile(self, task: tuple[Pair, Tile]) -> tuple[TensorInfo, Tile, ErrorSums, int]:
        (a, b), tile = task
        x, y = (
            m.values(t, tile.start, tile.stop).astype(np.float64)
            for m, t in ((self.a, a), (self.b, b))
        )
        differing = int(np.count_nonzero((x != y) & ~(np.isnan(x) & np.isnan(y))))
        finite = np.isfinite(x) & np.isfinite(y)
        x, y = np.where(finite, x, 0), np.where(finite, y, 0)
        if "F64" in (a.dtype, b.dtype):
            with np.errstate(over="ignore"):
                apart = np.abs(x - y)
                signal, noise = float(np.sum(x * x)), float(np.sum(apart * apart))
            worst = float(apart.max(initial=0.0))
        else:
            narrow = [v.astype(np.float32) for v in (x, y)]
            signal, noise, worst = kernels.error_sums(narrow[0], narrow[1])
        return a, tile, ErrorSums(tile.stop - tile.start, signal, noise, worst), differing

    def _told(
        self, pair: Pair, sums: _Sums, comparable: bool, stored: list[dict[str, TensorInfo]]
    ) -> ComparedTensor:
        a, b = (_stored(*each) for each in zip((self.a, self.b), pair, stored, strict=True))
        equal = comparable and not sums.differing
        return ComparedTensor(
            name=a.name,
            a_shape=pair[0].shape,
            b_shape=pair[1].shape,
            a_dtype=a.dtype,
            b_dtype=b.dtype,
            a_bytes=a.nbytes,
            b_bytes=b.nbytes,
            comparable=comparable,
            equal=equal,
            differing=sums.differing if comparable else None,
            sqnr_db=sums.error.sqnr_db if comparable and not equal else None,
            max_error=sums.error.worst if comparable else None,
        )


def _same(a: Mapping[str, Exponents], b: Mapping[str, Exponents]) -> bool:
    return a.keys() == b.keys() and all(
        np.array_equal(getattr(a[name], kind), getattr(b[name], kind))
        for name in a
        for kind in ("rows", "columns", "offset")
    )


def _stored(model: Model, tensor: TensorInfo, stored: Mapping[str, TensorInfo]) -> TensorInfo:
    """A tensor as its file has it, which may be under another name, in parts, or part of one."""
    origins = made_from(model, tensor).sources or (tensor,)
    found = [stored.get(t.name, t) for t in origins]
    values = sum(t.size for t in found)
    nbytes = sum(t.nbytes for t in found) * tensor.size // values if values else 0
    dtypes = " and ".join(dict.fromkeys(t.dtype for t in found))
    return TensorInfo(tensor.name, tensor.shape, dtypes, nbytes)


def _tiles(pairs: Iterable[Pair]) -> Iterator[tuple[Pair, Tile]]:
    for pair in pairs:
        a = pair[0]
        columns = row_length(a.shape)
        if a.size:
            yield from ((pair, tile) for tile in tiles(a.size // columns, columns))


def _groups(
    compared: Sequence[tuple[ComparedTensor, _Sums]], of: Callable[[str], str]
) -> list[ComparedGroup]:
    groups: dict[str, list[tuple[ComparedTensor, _Sums]]] = {}
    for t, sums in compared:
        groups.setdefault(of(t.name), []).append((t, sums))
    return [_group(name, found) for name, found in groups.items()]


def _group(name: str, found: Sequence[tuple[ComparedTensor, _Sums]]) -> ComparedGroup:
    known = [t.sqnr_db for t, _ in found if t.sqnr_db is not None]
    total = sum((s.error for t, s in found if t.comparable), ErrorSums())
    return ComparedGroup(
        name=name,
        tensors=len(found),
        equal=sum(t.equal for t, _ in found),
        a_bytes=sum(t.a_bytes for t, _ in found),
        b_bytes=sum(t.b_bytes for t, _ in found),
        types=sorted({f"{t.a_dtype} -> {t.b_dtype}" for t, _ in found if t.a_dtype != t.b_dtype}),
        sqnr_db=total.sqnr_db if known else None,
        worst_sqnr_db=min(known, default=None),
    )


def _plain(metadata: Mapping[str, str]) -> dict[str, str]:
    """Without what `facts_of` has told already."""
    return {key: text for key, text in metadata.items() if key != PROVENANCE}


def _changes(a: Mapping[str, str], b: Mapping[str, str]) -> dict[str, list[str | None]]:
    """What is said of both, where it differs."""
    keys = dict.fromkeys([*a, *b])
    return {key: [a.get(key), b.get(key)] for key in keys if a.get(key) != b.get(key)}
