"""The page of `bench`."""

from __future__ import annotations

from collections.abc import Sequence

from qconvert.page.parts import (
    Cell,
    Chart,
    Column,
    Fact,
    Finding,
    Page,
    Table,
    number,
    table_of,
    warned,
)
from qconvert.page.svg import bars
from qconvert.quantities import counted, shape_text, size
from qconvert.report import (
    BenchReport,
    FileCost,
    LayerCost,
    Measurement,
    MemoryChoice,
    MemoryFit,
    SkippedLine,
)

COLUMNS = [
    Column("line"),
    Column("median ms", "number", "of all runs"),
    Column("least ms", "number"),
    Column("rate", "number", "work a second, in the unit beside it"),
    Column("unit"),
    Column("GB/s", "number", "of weights, as the source or the codes hold them"),
    Column("speed", "long", "against other lines of the section, for the same work"),
]
CHOICES = [
    Column("scheme"),
    Column("container"),
    Column("file", "number"),
    Column("fits", "text", "with room for a context"),
    Column("expected SQNR dB", "number", "of the poorest matrix"),
    Column("tokens a second", "number", "at most, as fast as memory is read"),
    Column("context", "number", "tokens whose keys and values have room, in float16"),
]
LAYERS = [
    Column("kind of layer"),
    Column("matrices", "number", "that are alike, of which one was measured"),
    Column("shape"),
    Column("stored"),
    Column("bytes", "number", "of all of them"),
    Column("ms a token", "number", "of all of them, with one row of inputs"),
    Column("speed of float32", "number", "against the product of float32 weights by BLAS"),
    Column("speed of ONNX Runtime", "number", "against its product of about as many bits"),
    Column("product", "text", "integer, or decoded to float32 where the codes have none"),
]


def bench_page(r: BenchReport) -> Page:
    """How fast what is here."""
    sections = list(dict.fromkeys(m.section for m in r.measurements))
    charts, tables = [], []
    for section in sections:
        lines = [m for m in r.measurements if m.section == section]
        units = {m.unit for m in lines}
        for unit in sorted(units):
            rows = [(m.name, m.rate, f"{m.rate:.4g}") for m in lines if m.unit == unit]
            caption = f"{unit}: longer is faster. Medians of {r.runs} runs that took turns."
            charts.append(Chart(f"{section}, {unit}", bars(rows, section), caption))
        tables.append(table_of(section, COLUMNS, lines, _row))
    threads = counted(r.threads, "thread")
    return Page(
        command="bench",
        title=next((f.path for f in (r.file, r.memory) if f), r.machine),
        status="fail" if r.status == "fail" else "done",
        verdict=f"{len(r.measurements)} lines, {threads}, medians of {r.runs} runs",
        findings=[
            *warned(r.warnings),
            *(
                Finding("bad", f"{c.name} takes {100 * (c.ratio - 1):+.1f} % against before")
                for c in r.compared
                if c.slower
            ),
            *(Finding("note", told) for told in dict.fromkeys(map(_skipped, r.skipped))),
        ],
        facts=[
            *(_file_facts(r.file) if r.file else ()),
            *(_memory_facts(r.memory) if r.memory else ()),
            Fact("threads", str(r.threads)),
            Fact("runs", str(r.runs), "of each line, which took turns"),
        ],
        charts=charts,
        tables=[
            *([_layers(r.file)] if r.file else ()),
            *([table_of("schemes", CHOICES, r.memory.choices, _choice)] if r.memory else ()),
            *tables,
        ],
        closing=[Fact("machine", r.machine)],
    )


def _memory_facts(m: MemoryFit) -> list[Fact]:
    best = next((c for c in m.choices if c.scheme == m.best), None)
    told = f"{size(best.nbytes)} of {size(m.limit)}" if best else f"within {size(m.limit)}"
    return [Fact("best choice", best.scheme if best else "nothing fits", told)]


def _choice(c: MemoryChoice) -> Sequence[Cell]:
    return [
        Cell(c.scheme),
        Cell(c.container),
        Cell(size(c.nbytes), c.nbytes),
        Cell("yes" if c.fits else "no"),
        number(c.sqnr_db),
        number(c.bound_tokens_per_second),
        number(c.context, 9),
    ]


def _skipped(s: SkippedLine) -> str:
    return f"{s.name} was skipped: {s.reason}"


def _file_facts(f: FileCost) -> list[Fact]:
    facts = [
        Fact("weights in memory", size(f.nbytes), f"{size(f.float_nbytes)} in float32"),
        Fact("read for a token", size(f.token_bytes)),
    ]
    if f.bound_tokens_per_second:
        told = f"tokens a second, as memory gives {f.read_gigabytes_per_second:.3g} GB a second"
        facts.append(Fact("no program exceeds", f"{f.bound_tokens_per_second:,.4g}", told))
    if f.tokens_per_second:
        told = "tokens a second, by products alone: no attention, norms, sampling"
        facts.append(Fact("products of qconvert", f"{f.tokens_per_second:,.4g}", told))
    if f.processor:
        facts.append(Fact("processor has", ", ".join(f.processor), "for products of bytes"))
    return facts


def _layers(f: FileCost) -> Table:
    def row(layer: LayerCost) -> Sequence[Cell]:
        return [
            Cell(layer.roles),
            number(layer.count, 9),
            Cell(shape_text(layer.shape)),
            Cell(layer.stored),
            Cell(size(layer.count * layer.nbytes), layer.count * layer.nbytes),
            number(1000 * layer.count * layer.seconds),
            number(layer.float_ratio, 3),
            number(layer.peer_ratio, 3),
            Cell("integer" if layer.integer else "decoded"),
        ]

    slowest_first = sorted(f.layers, key=lambda layer: -layer.count * layer.seconds)
    return table_of("Where a token's time goes", LAYERS, slowest_first, row)


def _row(m: Measurement) -> list[Cell]:
    told = "; ".join(f"{ratio:.3g} x {name}" for name, ratio in m.ratios.items())
    return [
        Cell(m.name),
        number(1000 * m.seconds),
        number(1000 * min(m.times)),
        number(m.rate),
        Cell(m.unit),
        number(m.gigabytes_per_second, 3),
        Cell(told or "–"),
    ]
