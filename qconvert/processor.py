"""What the processor says it can do, as far as integer products of weights care."""

from __future__ import annotations

import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_LONGEST = 1 << 20  # bytes of it that are read: the first processor stands for all

# Flags as Linux names them, what each is for, and the name that people know.
_KNOWN = {
    "avx2": ("AVX2", "32 products of bytes in two instructions"),
    "avx_vnni": ("AVX-VNNI", "32 products of bytes in one instruction"),
    "avx512f": ("AVX-512", "registers of 64 bytes"),
    "avx512_vnni": ("AVX-512 VNNI", "64 products of bytes in one instruction"),
    "amx_int8": ("AMX", "products of whole tiles of bytes"),
    "asimd": ("NEON", "16 products of bytes in two instructions"),
    "asimddp": ("NEON dotprod", "16 products of bytes in one instruction"),
    "i8mm": ("NEON i8mm", "products of small matrices of bytes"),
}


def features() -> dict[str, str]:
    """Names of what helps with products of bytes, with what each does; empty where the system does
    not say.
    """
    found = _told("flags") or _told("Features")
    flags = found.split()
    return dict(_KNOWN[flag] for flag in _KNOWN if flag in flags)


def model_name() -> str:
    """The processor's own name, else its architecture."""
    return _told("model name") or platform.machine()


def _told(key: str) -> str:
    """What the system says of the first processor; nothing where it has no such file."""
    try:
        with _CPUINFO.open("rb") as file:
            text = file.read(_LONGEST).decode("utf-8", "replace")
    except OSError:
        return ""
    lines = (line.partition(":") for line in text.splitlines())
    return next((value.strip() for name, _, value in lines if name.strip() == key), "")
