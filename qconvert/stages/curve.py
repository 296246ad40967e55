"""inspect --curve: what a file of each size is predicted to lose, before any is written; and what
one scheme for all tensors would lose.
"""

from __future__ import annotations

import math
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qconvert.calibration.file import Calibration
from qconvert.containers import CONTAINERS
from qconvert.errors import UsageError, about
from qconvert.files import open_model
from qconvert.files.dequantized import dequantized
from qconvert.progress import Progress
from qconvert.report import CurvePoint, SchemePoint, SizeCurve
from qconvert.schemes import parse_scheme
from qconvert.stages.budget import INFORMED, Choices, choices_of
from qconvert.stages.equalisation import rescaled
from qconvert.stages.quantize_options import PRESETS, UNDER_BUDGET, Budget, QuantizeOptions
from qconvert.stages.sensitivities import CANDIDATES
from qconvert.stages.target import Prepared, target_of

FINE, MIDDLE, COARSE = 0.25, 0.5, 1.0  # bits between budgets: up to 5, up to 7, up to 9
MARKS = (0.01, 0.001)  # nats that the smallest file is named for


@dataclass(frozen=True, slots=True)
class CurveOptions:
    """Options of ``qconvert inspect --curve``."""

    calibration: Path | None = None
    container: str = "qblk"
    sensitivities: Path | None = None
    threads: int | None = None


def size_curve(source: Path, options: CurveOptions, progress: Progress) -> SizeCurve:
    """Budgets over all sizes that a model can have, each with its best mix of schemes.

    Raises:
        UsageError: a calibration without Fisher information; without one mixes are chosen by what
            tensors of each role usually need, and nothing is predicted.
        InputError: the model, the calibration or the sensitivities cannot be used.
    """
    asked = QuantizeOptions(
        scheme=parse_scheme(UNDER_BUDGET[options.container]),
        container=options.container,
        calibration=options.calibration,
        threads=options.threads,
        budget=Budget(sensitivities=options.sensitivities),
        dry_run=True,
    )
    container = CONTAINERS[options.container]
    with ExitStack() as files, about(source):
        opened = open_model(source)
        files.callback(opened.close)
        plain = dequantized(opened)
        calibration = None
        if options.calibration:
            calibration = files.enter_context(Calibration(options.calibration))
            calibration.check_model(plain)
            if not calibration.has_fisher:
                raise UsageError(
                    "the calibration does not say how much errors matter", hint=INFORMED
                )
        output = source.with_name(source.name + container.suffix)
        prepare = partial(target_of(container).prepare, opened, options=asked, output=output)
        plain, prepared, known, _ = rescaled(plain, prepare, calibration, asked, files, progress)
        choices = choices_of(prepared, asked, plain, container.name, known, progress)
        points = [_point(choices, prepared, bits) for bits in _budgets(*choices.ends(prepared))]
        uniform = [_uniform(choices, prepared, name) for name in CANDIDATES[container.name]]
        least = points[0].bits  # which a preset may lie below, where shapes allow no less
        presets = {
            name: _point(choices, prepared, max(bits[container.name], least))
            for name, bits in PRESETS.items()
        }
    return SizeCurve(
        container=container.name,
        points=points,
        uniform=sorted((p for p in uniform if p), key=lambda p: p.nbytes),
        presets=presets,
        smallest={
            str(mark): next((p.bits for p in points if p.kl is not None and p.kl <= mark), None)
            for mark in MARKS
        },
        without=choices.without,
    )


def _budgets(least: float, most: float) -> list[float]:
    """Bits per weight from the least that can be to 9, and the most."""
    found, bits = [least], FINE * (math.floor(least / FINE) + 1)
    while bits < min(most, 9.5):
        found.append(bits)
        bits += FINE if bits < 5 else MIDDLE if bits < 7 else COARSE
    return [*found, most]


def _point(choices: Choices, prepared: Prepared, bits: float) -> CurvePoint:
    # A budget is met where no rounding of the bits lies between it and the size.
    found = choices.within(Budget(bits=bits * (1 + 1e-12)), prepared)
    return CurvePoint(
        bits=bits,
        nbytes=choices.total(found, prepared),
        kl=found.loss if choices.informed else None,
        sqnr_db=choices.sqnr_db(found),
        schemes=dict(Counter(choices.schemes(found).values()).most_common()),
    )


def _uniform(choices: Choices, prepared: Prepared, name: str) -> SchemePoint | None:
    """All tensors under one scheme, where any can take it."""
    found = choices.uniform(name)
    if found is None:
        return None
    nbytes = choices.total(found, prepared)
    return SchemePoint(
        scheme=name,
        nbytes=nbytes,
        kl=found.loss if choices.informed else None,
        sqnr_db=choices.sqnr_db(found),
        others=sum(s != name for s in choices.schemes(found).values()),
    )
