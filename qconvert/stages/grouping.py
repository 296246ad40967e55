"""Which tensors `inspect` shows, in which order, and tensors of a layer or a role together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from qconvert.errors import UsageError
from qconvert.model import TensorInfo
from qconvert.report import ComparedGroup, TensorGroup, TensorSummary
from qconvert.roles import place_of

WILDCARDS = frozenset("*?[")
BY = ("layer", "role")
NO_LAYER = "(outside of layers)"

Key = Callable[[TensorSummary], float | str | None]

# What rows may be sorted by, and whether the largest comes first.
_HEADER_KEYS: dict[str, tuple[Key, bool]] = {
    "name": (lambda t: t.name, False),
    "dtype": (lambda t: t.dtype, False),
    "size": (lambda t: t.nbytes, True),
    "values": (lambda t: t.values, True),
}
_STATISTICS_KEYS: dict[str, tuple[Key, bool]] = {
    "min": (lambda t: t.minimum, False),
    "max": (lambda t: t.maximum, True),
    "mean": (lambda t: t.mean, True),
    "std": (lambda t: t.std, True),
    "absmax": (lambda t: t.absmax, True),
    "crest": (lambda t: t.crest, True),
    "channel": (lambda t: t.widest_ratio, True),
    "kurtosis": (lambda t: t.kurtosis, True),
    "outliers": (lambda t: t.outlier_share, True),
    "near-zero": (lambda t: t.near_zero_share, True),
    "zeros": (lambda t: t.zeros, True),
    "bad": (lambda t: t.nonfinite, True),
    "sqnr": (lambda t: t.sqnr_db, False),
}
SORTS = (*_HEADER_KEYS, *_STATISTICS_KEYS)


def check_sort(column: str | None, headers_only: bool) -> None:
    """Refuse a column that is not there.

    Raises:
        UsageError: it is not.
    """
    if column is None or column in _HEADER_KEYS:
        return
    if column not in _STATISTICS_KEYS:
        raise UsageError(f"--sort '{column}'", wanted=f"one of {', '.join(SORTS)}")
    if headers_only:
        raise UsageError(f"--sort {column} needs statistics, which --headers-only leaves out")


def sorted_rows(rows: Sequence[TensorSummary], column: str | None) -> list[TensorSummary]:
    """Rows by a column of `SORTS`, those without a figure last; as they were without one."""
    if column is None:
        return list(rows)
    key, falling = (_HEADER_KEYS | _STATISTICS_KEYS)[column]
    known = [(value, row) for row in rows if (value := key(row)) is not None]
    known.sort(key=lambda pair: pair[0], reverse=falling)
    return [row for _, row in known] + [row for row in rows if key(row) is None]


def matches(name: str, word: str) -> bool:
    """Whether a name has the word in it or, where that has wildcards, is matched by it."""
    return fnmatchcase(name, word) if WILDCARDS & set(word) else word in name


def chosen(tensors: Iterable[TensorInfo], words: Sequence[str]) -> list[TensorInfo]:
    """Tensors whose name one of the words matches; all of them without any.

    Raises:
        UsageError: a word matches none.
    """
    every = list(tensors)
    for word in words:
        if not any(matches(t.name, word) for t in every):
            raise UsageError(
                f"no tensor matches '{word}'", hint="names are listed without --tensor"
            )
    return [t for t in every if not words or any(matches(t.name, word) for word in words)]


def role_of(name: str) -> str:
    """``model.layers.*.self_attn.q_proj.weight``, for people."""
    return place_of(name).pattern


def layer_of(name: str) -> str:
    """``model.layers.3``, for people."""
    return place_of(name).block or NO_LAYER


def grouped(rows: Sequence[TensorSummary], by: str) -> list[TensorGroup]:
    """Tensors of a layer or a role together; layers in the order of their numbers."""
    of = layer_of if by == "layer" else role_of
    groups: dict[str, list[TensorSummary]] = {}
    for row in rows:
        groups.setdefault(of(row.name), []).append(row)
    if by == "layer":
        groups = dict(sorted(groups.items(), key=lambda g: _numbers(g[0])))
    return [_group(name, found) for name, found in groups.items()]


def layer_order(groups: list[ComparedGroup]) -> list[ComparedGroup]:
    """Groups of layers in the order of their numbers."""
    return sorted(groups, key=lambda g: _numbers(g.name))


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdecimal())


def _group(name: str, rows: Sequence[TensorSummary]) -> TensorGroup:
    rows = sorted(rows, key=lambda t: _numbers(t.name))
    return TensorGroup(
        name,
        [t.name for t in rows],
        sum(t.values for t in rows),
        sum(t.nbytes for t in rows),
        [t.std for t in rows],
        [t.kurtosis for t in rows],
        [t.sqnr_db for t in rows],
    )
