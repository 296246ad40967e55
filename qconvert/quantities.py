"""Quantities with their units, as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def size(nbytes: int) -> str:
    """Bytes in decimal units, three digits."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return (
        f"{nbytes} B"
        if unit == "B"
        else f"{value:.3g} {unit}"
        if value < 1000
        else f"{value:,.0f} {unit}"
    )


def shape_text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) if shape else "scalar"


def duration(seconds: float) -> str:
    """Seconds, or minutes where these are many."""
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def counted(n: int, noun: str) -> str:
    """So many of a thing whose plural has an s."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def figure(value: float, digits: int = 4) -> str:
    """A number in so many digits, but with all that a large one has before the point."""
    return f"{value:,.0f}" if 10**digits <= abs(value) < 1e12 else f"{value:.{digits}g}"
