"""What is different in two files, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from qconvert.cli.text.fitting import Column
from qconvert.cli.text.pieces import in_decibels, table_lines, wrapped
from qconvert.errors import printable
from qconvert.quantities import counted, duration, shape_text, size
from qconvert.report import ComparedGroup, ComparedTensor, Comparison, InspectReport

NAMED = 5
LABEL_WIDTH = 14  # columns of what stands before a line's text


def comparison_lines(r: InspectReport, c: Comparison) -> Iterator[str]:
    ratio = f" ({100 * c.b_bytes / c.a_bytes:.1f} % of A)" if c.a_bytes else ""
    yield _line("A", f"{printable(r.path)} ({r.kind}), {size(c.a_bytes)}")
    yield _line("B", f"{printable(c.path)} ({c.kind}), {size(c.b_bytes)}{ratio}")
    for note in c.notes:
        yield _line("note", note)
    for label, names in (("only in A", c.only_a), ("only in B", c.only_b)):
        if names:
            yield _line(label, _named(names))
    reshaped = [t for t in c.tensors if t.a_shape != t.b_shape]
    for t in reshaped[:NAMED]:
        yield _line(
            "shape",
            f"{printable(t.name)}: {shape_text(t.a_shape)} in A, {shape_text(t.b_shape)} in B",
        )
    if len(reshaped) > NAMED:
        yield _line("shape", f"and {len(reshaped) - NAMED:,} more")
    types = Counter(f"{t.a_dtype} to {t.b_dtype}" for t in c.tensors if t.a_dtype != t.b_dtype)
    if types:
        yield _line("type", ", ".join(f"{n:,} {change}" for change, n in types.most_common()))
    yield _line("values", _values(c))
    for label, (a, b) in c.facts.items():
        yield _line(label, f"{_said(a)} in A, {_said(b)} in B")
    yield _line("metadata", _metadata(c.metadata))
    differing = [t for t in c.tensors if not t.equal and t.comparable]
    if differing:
        yield "\n"
        yield from table_lines(_columns("role"), c.roles, _row)
        if len(c.layers) > 1:
            yield "\n"
            yield from table_lines(_columns("layer"), c.layers, _row)
        yield (
            "\n" + wrapped("SQNR is of what B has against A: the weights by the difference") + "\n"
        )
    yield f"kernels    {r.kernels}\ntime       {duration(r.seconds)}\n"


def _line(label: str, text: str) -> str:
    return wrapped(f"{label:<{LABEL_WIDTH - 1}} {text}", " " * LABEL_WIDTH) + "\n"


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(map(printable, names[:NAMED]))
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return f"{counted(len(names), 'tensor')}: {shown}{more}"


def _values(c: Comparison) -> str:
    equal = sum(t.equal for t in c.tensors)
    differing = [t for t in c.tensors if not t.equal and t.comparable]
    told = f"equal in {equal:,} of {counted(len(c.tensors), 'tensor')}"
    if not differing:
        return told
    worst = min(differing, key=_decibels)
    return (
        f"{told}, SQNR of all {in_decibels(c.sqnr_db)}; worst {printable(worst.name)}, "
        f"{in_decibels(worst.sqnr_db)}"
    )


def _decibels(t: ComparedTensor) -> float:
    return float("inf") if t.sqnr_db is None else t.sqnr_db


def _said(text: str | None) -> str:
    return "nothing" if text is None else printable(text)


def _metadata(changes: Mapping[str, Sequence[str | None]]) -> str:
    """Which keys differ; their values may be long."""
    if not changes:
        return "the same"
    groups = (
        ("only in A", [k for k, (_, b) in changes.items() if b is None]),
        ("only in B", [k for k, (a, _) in changes.items() if a is None]),
        ("changed", [k for k, (a, b) in changes.items() if a is not None and b is not None]),
    )
    return "; ".join(
        f"{len(keys)} {what} ({', '.join(map(printable, keys[:NAMED]))}"
        f"{', ...' if len(keys) > NAMED else ''})"
        for what, keys in groups
        if keys
    )


def _columns(by: str) -> list[Column]:
    return [
        Column(by, "left"),
        Column("tensors", "right", keep=2),
        Column("equal", "right", keep=3, quiet=True),
        Column("size of A", "right", keep=4),
        Column("size of B", "right", keep=5),
        Column("SQNR dB", "right", keep=9),
        Column("worst dB", "right", keep=6),
        Column("type", "left", keep=7, quiet=True),
    ]


def _row(g: ComparedGroup) -> Sequence[str]:
    figures = ("=" if f is None else f"{f:.2f}" for f in (g.sqnr_db, g.worst_sqnr_db))
    more = f" and {len(g.types) - 1} more" if len(g.types) > 1 else ""
    return (
        *(g.name, f"{g.tensors:,}", f"{g.equal:,}", size(g.a_bytes), size(g.b_bytes)),
        *figures,
        f"{g.types[0]}{more}" if g.types else "-",
    )
