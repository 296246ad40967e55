"""`quantize --list-schemes`."""

from __future__ import annotations

from qconvert.report import SchemesReport
from qconvert.stages.scheme_list import list_schemes as stage


def list_schemes() -> SchemesReport:
    """Every scheme, with its bits, what runs it and what it is for."""
    return stage()
