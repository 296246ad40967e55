"""What a shell offers for values that qconvert knows; file names are the shell's own matter."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from qconvert.schemes import SCHEMES

# By name, since the modules that define them load NumPy, and a shell waits for every key.
OBSERVERS = ("minmax", "ema", "percentile", "mse", "entropy", "nmse")
SORTS = (
    *("name", "dtype", "size", "values", "min", "max", "mean", "std", "absmax", "crest"),
    *("channel", "kurtosis", "outliers", "near-zero", "zeros", "bad", "sqnr"),
)
VARIABLE = "_QCONVERT_COMPLETE"  # set by the shell's function, to which of its questions this is


def schemes(incomplete: str) -> list[str]:
    """Schemes that begin so."""
    return _begun(SCHEMES, incomplete)


def tensor_schemes(incomplete: str) -> list[str]:
    """``GLOB=SCHEME``, once the glob is there."""
    glob, equals, name = incomplete.rpartition("=")
    return [f"{glob}={found}" for found in _begun(SCHEMES, name)] if equals else []


def observers(incomplete: str) -> list[str]:
    """Observers that begin so."""
    return _begun(OBSERVERS, incomplete)


def among(*values: str) -> Callable[[str], list[str]]:
    """Of these values those that begin so."""

    def completer(incomplete: str) -> list[str]:
        return _begun(values, incomplete)

    return completer


def _begun(names: Iterable[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete.lower())]
