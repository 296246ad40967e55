"""Chooses the kernels once and says which: the NumPy reference, or native code that gives the same
bits.

``QCONVERT_KERNELS=reference`` or ``native`` forces one.
"""

from __future__ import annotations

import os

from qconvert.errors import UsageError
from qconvert.kernels import reference

VARIABLE = "QCONVERT_KERNELS"


def describe() -> str:
    """What runs, for reports.

    Raises:
        UsageError: the environment forces kernels that this installation does not have.
    """
    forced = os.environ.get(VARIABLE, "reference")
    if forced != "reference":
        raise UsageError(
            f"{VARIABLE} asks for kernels that this version does not have",
            found=forced,
            wanted="reference",
        )
    return "reference"


__all__ = ["describe", "reference"]
