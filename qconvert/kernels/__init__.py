"""The kernels that run, chosen once: native code where it was built, else the NumPy reference.

Both give the same bits; `describe` says which it is, for every report. ``QCONVERT_KERNELS`` forces
``reference``, ``native``, or one of native's variants by name (``portable``, ``avx2``, ...).

Callers write ``kernels.encode(...)``. Where native code does several steps in one pass, they ask
for `fused` and take the steps one by one when it is None.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

from qconvert.errors import MachineError, UsageError
from qconvert.kernels import reference
from qconvert.kernels.reference import (
    HISTOGRAM_BINS,
    Moments,
    PowerSums,
    lane_sum,
    weighted_code_sums,
    weighted_error_sums,
    zero_steps,
)

VARIABLE = "QCONVERT_KERNELS"


def _choose(wanted: str | None) -> ModuleType | None:
    """The native kernels, or None for the reference.

    Raises:
        UsageError: the environment asks for kernels that are not to be had.
        MachineError: native kernels are there and do not load: slowness must not hide that.
    """
    if wanted == "reference":
        return None
    try:
        from qconvert.kernels import compiled
    except ImportError as e:
        built = importlib.util.find_spec("qconvert.kernels._native") is not None
        if built:
            raise MachineError(
                "the native kernels cannot be loaded",
                found=str(e),
                hint=f"install qconvert again, or set {VARIABLE}=reference",
            ) from e
        if wanted is None:
            return None
        raise UsageError(
            f"{VARIABLE}={wanted}: the native kernels were not built",
            hint="install again where there is a C compiler, or unset the variable",
        ) from e
    if wanted not in (None, "native"):
        if wanted not in compiled.variants():
            raise UsageError(
                f"unknown kernels in {VARIABLE}",
                found=wanted,
                wanted=", ".join(("reference", "native", *compiled.variants())),
            )
        compiled.select(wanted)
    return compiled


fused = _choose(os.environ.get(VARIABLE) or None)


def describe() -> str:
    """What runs."""
    if fused is not None:
        return f"native, {fused.variant()}"
    if os.environ.get(VARIABLE):
        return "reference"
    return "reference (native not built: install where there is a C compiler)"


if TYPE_CHECKING or fused is None:
    from qconvert.kernels.reference import (
        all_finite,
        code_sums,
        column_sums,
        decode,
        encode,
        error_sums,
        extrema,
        histogram,
        integer_product,
        moments,
        pack,
        power_sums,
        unpack,
        worst_step,
    )
    from qconvert.kernels.widening import widen
else:
    from qconvert.kernels.compiled import (
        all_finite,
        code_sums,
        column_sums,
        decode,
        encode,
        error_sums,
        extrema,
        histogram,
        integer_product,
        moments,
        pack,
        power_sums,
        unpack,
        widen,
        worst_step,
    )


def available() -> tuple[str, ...]:
    """What `running` takes here, the fastest last; the reference alone where it was chosen."""
    return ("reference", *(fused.variants() if fused is not None else ()))


@contextmanager
def running(name: str) -> Iterator[None]:
    """Run ``name``, one of `available`, inside the block, in all threads; for measurements.

    ``widen`` stays: what reads files has bound it.
    """
    chosen = fused
    if chosen is not None and name != "reference":
        before = chosen.variant()
        chosen.select(name)
        try:
            yield
        finally:
            chosen.select(before)
        return
    own = globals()
    switched = {"fused": None}
    switched |= {k: v for k, v in vars(reference).items() if k in __all__}
    before = {k: own[k] for k in switched}
    own.update(switched)
    try:
        yield
    finally:
        own.update(before)


__all__ = [
    "HISTOGRAM_BINS",
    "Moments",
    "PowerSums",
    "all_finite",
    "available",
    "code_sums",
    "column_sums",
    "decode",
    "describe",
    "encode",
    "error_sums",
    "extrema",
    "fused",
    "histogram",
    "integer_product",
    "lane_sum",
    "moments",
    "pack",
    "power_sums",
    "running",
    "unpack",
    "weighted_code_sums",
    "weighted_error_sums",
    "widen",
    "worst_step",
    "zero_steps",
]
