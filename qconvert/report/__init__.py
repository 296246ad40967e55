"""What the stages found, as data; `to_json` gives the documented objects of ``--json``.

A report has no clock and no host in it, and paths as they were given, so that two runs compare
equal; ``bench`` is the exception.
"""

from __future__ import annotations

from qconvert.report.base import Report, dump, error_json, finite
from qconvert.report.bench import BenchReport, Measurement, SkippedLine
from qconvert.report.calibrate import CalibratedFisher, CalibratedLayer, CalibrateReport
from qconvert.report.inspect import CurvePoint, Histogram, InspectReport, SizeCurve, TensorSummary
from qconvert.report.quantize import (
    Equalisation,
    EqualisedGroup,
    Finetuning,
    Prediction,
    QuantizedTensor,
    QuantizeReport,
)
from qconvert.report.verify import (
    Check,
    EmbeddingQuality,
    Execution,
    TokenQuality,
    Verdict,
    VerifiedTensor,
    VerifyReport,
)

__all__ = [
    "BenchReport",
    "CalibrateReport",
    "CalibratedFisher",
    "CalibratedLayer",
    "Check",
    "CurvePoint",
    "EmbeddingQuality",
    "Equalisation",
    "EqualisedGroup",
    "Execution",
    "Finetuning",
    "Histogram",
    "InspectReport",
    "Measurement",
    "Prediction",
    "QuantizeReport",
    "QuantizedTensor",
    "Report",
    "SizeCurve",
    "SkippedLine",
    "TensorSummary",
    "TokenQuality",
    "Verdict",
    "VerifiedTensor",
    "VerifyReport",
    "dump",
    "error_json",
    "finite",
]
