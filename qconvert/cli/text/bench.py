"""What `bench` measured, for people."""

from __future__ import annotations

from collections.abc import Sequence

from qconvert.cli.text.fitting import Column
from qconvert.cli.text.pieces import fitted, number, table
from qconvert.errors import printable
from qconvert.quantities import counted, duration, shape_text, size
from qconvert.report import BenchReport, Compared, FileCost, MemoryFit


def bench_text(r: BenchReport) -> str:
    threads = counted(r.threads, "thread")
    parts = [f"{r.machine}; {threads}, medians of {counted(r.runs, 'run')} that took turns\n"]
    if r.file:
        parts += _file_cost(r.file)
    if r.memory:
        parts += _memory_fit(r.memory)
    sections = dict.fromkeys([m.section for m in r.measurements] + [s.section for s in r.skipped])
    for section in sections:
        rows = []
        for m in (m for m in r.measurements if m.section == section):
            figures = (f"{1000 * m.seconds:.4g} ms", f"{m.rate:.4g} {m.unit}")
            head = (m.name, *figures, number(m.gigabytes_per_second, 3))
            ratios = [(f"{number(x, 3)} x", name) for name, x in m.ratios.items()] or [("", "")]
            rows += [(*(head if i == 0 else ("",) * 4), *x) for i, x in enumerate(ratios)]
        columns = [
            Column(section, "left"),
            Column("median", "right", keep=8),
            Column("rate", "right", keep=4),
            Column("GB/s", "right", keep=3),
            Column("speed", "right", keep=7),
            Column("of", "left", keep=6),
        ]
        parts.append("\n" + table(columns, rows))
        parts += [
            f"skipped    {printable(s.name)}: {printable(s.reason)}\n"
            for s in r.skipped
            if s.section == section
        ]
    if r.compared:
        parts.append(_compared_text(r.compared))
    parts.append(f"\nkernels    {r.kernels}\ntime       {duration(r.seconds)}\n")
    return fitted("".join(parts))


def _file_cost(f: FileCost) -> list[str]:
    """What a token costs, in sentences, and where its time goes."""
    lines = [f"\n{printable(f.path)}: {size(f.nbytes)} of weights, "]
    lines.append(f"{size(f.float_nbytes)} in float32\n")
    lines.append(f"bytes      A token reads {size(f.token_bytes)} of weights.\n")
    if f.bound_tokens_per_second:
        lines.append(
            f"bound      Memory gives {f.read_gigabytes_per_second:.3g} GB a second here, so that "
            f"no program makes more than {number(f.bound_tokens_per_second, 3)} tokens a second of "
            "this file.\n"
        )
    if f.tokens_per_second:
        lines.append(
            f"products   qconvert's take {1000 / f.tokens_per_second:.4g} ms a token, which is "
            f"{f.tokens_per_second:,.4g} tokens a second without attention, norms and sampling.\n"
        )
    if not all(layer.integer for layer in f.layers):
        lines.append(
            "decoded    What is marked so has no integer product in qconvert: programs that have "
            "one, such as llama.cpp, are faster.\n"
        )
    if f.experts:
        lines.append("experts    All experts are counted; a token meets few of them.\n")
    told = ", ".join(f"{name} ({what})" for name, what in f.processor.items())
    lines.append(f"processor  It has {told or 'nothing that the system tells of'}.\n\n")
    whole = sum(layer.count * layer.seconds for layer in f.layers) or 1.0
    held = any(layer.peer_ratio for layer in f.layers)
    rows = [
        (
            layer.roles,
            f"{layer.count} x {shape_text(layer.shape)}",
            layer.stored,
            f"{1000 * layer.count * layer.seconds:.3g} ms",
            f"{100 * layer.count * layer.seconds / whole:.0f} %",
            f"{layer.float_ratio:.2g} x",
            *((f"{layer.peer_ratio:.2g} x" if layer.peer_ratio else "-",) if held else ()),
            "integer" if layer.integer else "decoded",
        )
        for layer in sorted(f.layers, key=lambda layer: -layer.count * layer.seconds)
    ]
    columns = [
        Column("kind of layer", "left"),
        Column("matrices", "right", keep=6),
        Column("stored", "left", keep=7),
        Column("a token", "right", keep=9),
        Column("share", "right", keep=3),
        Column("speed of float32", "right", keep=8),
        *((Column("speed of ONNX Runtime", "right", keep=8),) if held else ()),
        Column("product", "left", keep=4),
    ]
    lines.append(table(columns, rows))
    return lines


def _memory_fit(m: MemoryFit) -> list[str]:
    """The best choice in sentences, and all of them."""
    lines = [f"\n{printable(m.path)} within {size(m.limit)} of memory\n"]
    best = next((c for c in m.choices if c.scheme == m.best), None)
    if best is None:
        least = min(m.choices, key=lambda c: c.nbytes, default=None)
        told = f": the smallest file, {least.scheme}, takes {size(least.nbytes)}" if least else ""
        room = f", and a context of {m.context:,} tokens {size(m.context * m.context_bytes)}"
        lines.append(f"best       Nothing fits{told}{room if m.context else ''}.\n\n")
    else:
        lines.append(
            f"best       --scheme {best.scheme}: the file takes {size(best.nbytes)}"
            + ("" if best.context is None else f" and leaves a context of {best.context:,} tokens")
            + ".\n"
        )
        if best.bound_tokens_per_second:
            lines.append(
                f"speed      Memory gives {m.read_gigabytes_per_second:.3g} GB a second here, so "
                f"that no program makes more than {number(best.bound_tokens_per_second, 3)} tokens "
                "a second of it. Smaller files are faster.\n\n"
            )
    columns = [
        Column("scheme", "left"),
        Column("file", "right", keep=9),
        Column("fits", "left", keep=9),
        Column("expected SQNR dB", "right", keep=8),
        Column("tokens a second at most", "right", keep=7),
        Column("context left", "right", keep=6),
        Column("container", "left", keep=5),
    ]
    rows = [
        (
            c.scheme,
            size(c.nbytes),
            "yes" if c.fits else "no",
            number(c.sqnr_db, 3),
            number(c.bound_tokens_per_second, 3),
            "-" if c.context is None else f"{c.context:,}",
            c.container,
        )
        for c in m.choices
    ]
    lines.append(table(columns, rows))
    if best:
        left = m.limit - m.context * m.context_bytes
        limit = f"{left // 10**6}M" if left > 10**8 else f"{left // 1000}K"
        lines.append(
            "\nbudget     Bits spread over the tensors lose less than one scheme for all of them:\n"
            f"           qconvert quantize {printable(m.path)} --target-size {limit}\n"
        )
    return lines


def _compared_text(compared: Sequence[Compared]) -> str:
    slower = [c for c in compared if c.slower]
    if not slower:
        return f"\ncompared   None of {len(compared)} lines is slower than before.\n"
    told = "1 line is" if len(slower) == 1 else f"{len(slower)} lines are"
    lines = [f"\ncompared   {told} slower than before, of {len(compared)}:\n"]
    lines += [
        f"           {printable(c.name)}: {100 * (c.ratio - 1):+.1f} % (noise "
        f"{100 * c.noise:.1f} %)\n"
        for c in sorted(slower, key=lambda c: -c.ratio)
    ]
    return "".join(lines)
