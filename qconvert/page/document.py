"""The page of a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import jinja2
from markupsafe import Markup, escape

from qconvert import __version__
from qconvert.errors import printable
from qconvert.page.bench import bench_page
from qconvert.page.calibrate import calibrate_page
from qconvert.page.inspect import inspect_page
from qconvert.page.parts import ROWS_OPENED, Page
from qconvert.page.quantize import quantize_page
from qconvert.page.tune import tune_page
from qconvert.page.verify import verify_page
from qconvert.report import (
    BenchReport,
    CalibrateReport,
    InspectReport,
    QuantizeReport,
    Report,
    TuneReport,
    VerifyReport,
)
from qconvert.words import WORDS

BUILDERS: dict[type[Report], Callable[[Any], Page]] = {
    BenchReport: bench_page,
    CalibrateReport: calibrate_page,
    InspectReport: inspect_page,
    QuantizeReport: quantize_page,
    TuneReport: tune_page,
    VerifyReport: verify_page,
}
LONGEST = 4096  # characters of a name or a reason
BUFFERED = 1000  # pieces of the template that are written at a time


def document(report: Report, about: str = "") -> Iterator[str]:
    """The page of a report, in pieces of HTML, which describes itself as ``about``.

    It loads nothing, from the network or from files beside it, and its policy forbids that too.
    """
    page = BUILDERS[type(report)](report)
    parts = _template().stream(
        page=page, version=__version__, about=about, kernels=report.kernels, words=WORDS
    )
    parts.enable_buffering(BUFFERED)
    return parts


def _breakable(name: str) -> Markup:
    """A name whose lines may break after its dots."""
    return Markup("<wbr>").join(escape(part) for part in name.replace(".", ".\0").split("\0"))


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qconvert.page", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    # Names come from files of strangers: what a browser would draw backwards or not at all is
    # shown by its number, as on a terminal.
    environment.filters["printable"] = lambda text: printable(str(text), LONGEST)
    environment.filters["breakable"] = _breakable
    environment.globals["opened"] = ROWS_OPENED
    return environment.get_template("page.html")
