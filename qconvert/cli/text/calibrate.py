"""What `calibrate` observed, for people."""

from __future__ import annotations

from qconvert.cli.text.fitting import Column
from qconvert.cli.text.pieces import next_step, number, table
from qconvert.errors import printable
from qconvert.quantities import duration
from qconvert.report import CalibratedFisher, CalibrateReport


def calibrate_text(r: CalibrateReport) -> str:
    rows = [
        (
            layer.name,
            f"{layer.samples:,}",
            f"{layer.features:,}",
            number(layer.low),
            number(layer.high),
            number(layer.scale),
            str(layer.zero_point),
            number(layer.channel_absmax_ratio, 3),
        )
        for layer in r.layers
    ]
    columns = [Column("layer", "left")] + [
        Column(name, "right", keep)
        for name, keep in (
            ("samples", 2),
            ("features", 1),
            ("low", 7),
            ("high", 7),
            ("scale", 3),
            ("zero point", 4),
            ("widest/median channel", 6),
        )
    ]
    written = "" if r.written else " (nothing written)"
    told = (
        table(columns, rows)
        + f"\n{len(r.layers)} layers, observer {r.observer} -> {printable(r.output)}{written}\n"
        + _text_lines(r)
        + f"kernels    {r.kernels}\ntime       {duration(r.seconds)}\n"
    )
    if not r.written:
        return told
    name = printable(r.output)
    return told + next_step(f"qconvert quantize MODEL --scheme q8_channel --calibration {name}")


def _text_lines(r: CalibrateReport) -> str:
    """What a run over text has to say besides its layers."""
    lines = []
    if r.chunks is not None:
        went_on = f", resumed after {r.resumed_at:,}" if r.resumed_at else ""
        lines.append(f"text       {r.tokens:,} tokens in {r.chunks:,} pieces{went_on}\n")
    if r.device:
        lines.append(f"device     {r.device}\n")
    lines += [f"no token   {printable(name)}\n" for name in r.unreached]
    if r.fisher:
        lines.append(_fisher(r.fisher))
    for what, path in (("imatrix", r.imatrix), ("record", r.record)):
        if path:
            lines.append(f"{what:<10} {printable(path)}\n")
    return "".join(lines)


def _fisher(f: CalibratedFisher) -> str:
    kept = "a block at a time" if f.blocks else "of a whole window: the blocks are not known"
    return (
        f"Fisher     of {f.matrices:,} matrices from {f.labels:,} sampled labels, seed {f.seed}\n"
        f"memory     statistics in {f.passes:,} passes over the text, activations {kept}\n"
    ) + "".join(f"no gradient of its outputs: {printable(name)}\n" for name in f.without_output)
