"""The kernels that run: native code where it was built, else the NumPy reference.

Both have the functions of `reference.KERNELS` and give the same bits; `describe` says which it is,
for every report. ``QCONVERT_KERNELS`` forces ``reference``, ``native``, or one of native's variants
by name (``portable``, ``avx2``, ...).

Callers write ``kernels.encode(...)`` and never ask which runs; nobody imports a kernel by name,
or it would not follow `running`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any

from qconvert.errors import MachineError, UsageError
from qconvert.kernels import reference

if TYPE_CHECKING:
    from qconvert.kernels.reference import *  # noqa: F403

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


_built = _choose(os.environ.get(VARIABLE) or None)
_running: ModuleType = _built or reference  # the one switch


def __getattr__(name: str) -> Any:
    """A kernel of those that run."""
    if name in reference.KERNELS:
        return getattr(_running, name)
    raise AttributeError(f"module 'qconvert.kernels' has no attribute '{name}'")


def describe() -> str:
    """What runs."""
    if _built is not None and _running is _built:
        return f"native, {_built.variant()}"
    if _built is not None or os.environ.get(VARIABLE):
        return "reference"
    return "reference (native not built: install where there is a C compiler)"


def available() -> tuple[str, ...]:
    """What `running` takes here, the fastest last; the reference alone where it was chosen."""
    return ("reference", *(_built.variants() if _built is not None else ()))


@contextmanager
def running(name: str) -> Iterator[None]:
    """Run ``name``, one of `available`, inside the block, in all threads; for measurements and
    tests.
    """
    global _running
    before, variant = _running, None
    if name == "reference":
        _running = reference
    else:
        assert _built is not None
        _running, variant = _built, _built.variant()
        _built.select(name)
    try:
        yield
    finally:
        _running = before
        if variant is not None and _built is not None:
            _built.select(variant)


__all__ = ["VARIABLE", "available", "describe", "running"]
__all__ += reference.__all__
