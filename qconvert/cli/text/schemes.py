"""The schemes that may be named, for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from qconvert.cli.text.fitting import Column
from qconvert.cli.text.pieces import table_lines, wrapped
from qconvert.report import ListedScheme, SchemesReport

EXPLAINED = (
    "bits are per weight with scales and all, of a matrix of 4096 x 4096; of what is a mix, of all "
    "of Llama 3.1 8B. Schemes of codes with scales, q8_channel and the like, take _sym or _asym at "
    "their end, and without one it is decided for each tensor: bits are the most then. If unsure: "
    "--preset balanced"
)
COLUMNS = [Column("scheme", "left"), Column("bits", "right", keep=9), Column("what it is", "left")]


def schemes_text(r: SchemesReport) -> Iterator[str]:
    """A table for each container."""
    groups: dict[tuple[str, str], list[ListedScheme]] = {}
    for s in r.schemes:
        if not _settled(s):
            groups.setdefault((s.container, s.runs), []).append(s)
    for (container, runs), found in groups.items():
        yield wrapped(f"{container}, for {runs}") + "\n\n"
        yield from table_lines(COLUMNS, found, _row)
        yield "\n"
    yield wrapped(EXPLAINED) + "\n"


def _settled(s: ListedScheme) -> bool:
    """Whether it is one of ours with its symmetry in the name, of which a line below tells."""
    return s.container == "qblk" and s.name.endswith(("_sym", "_asym"))


def _row(s: ListedScheme) -> Sequence[str]:
    return s.name, "-" if s.bits is None else f"{s.bits:.2f}", s.purpose
