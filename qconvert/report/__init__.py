"""What the stages found, as data; `to_json` gives the documented objects of ``--json``.

A report has no clock and no host in it, and paths as they were given, so that two runs compare
equal; ``bench`` is the exception.
"""

from __future__ import annotations

from qconvert.report.base import Report, dump, error_json, finite
from qconvert.report.bench import (
    BenchReport,
    Compared,
    FileCost,
    LayerCost,
    Measurement,
    MemoryChoice,
    MemoryFit,
    SkippedLine,
)
from qconvert.report.calibrate import CalibratedFisher, CalibratedLayer, CalibrateReport
from qconvert.report.inspect import (
    ChannelSummary,
    ComparedGroup,
    ComparedTensor,
    Comparison,
    CurvePoint,
    Finding,
    GridEnds,
    Histogram,
    InputLayer,
    InputsView,
    InspectReport,
    SchemePoint,
    SizeCurve,
    TensorGroup,
    TensorSummary,
    TypeTally,
)
from qconvert.report.quantize import (
    Equalisation,
    EqualisedGroup,
    Finetuning,
    Prediction,
    QuantizedTensor,
    QuantizeReport,
    QuantizeSetReport,
)
from qconvert.report.schemes import ListedScheme, SchemesReport
from qconvert.report.tune import JudgedModel, TunedBlock, TuneReport, TuningStep
from qconvert.report.verify import (
    Check,
    EmbeddingQuality,
    Execution,
    LlamaCppRun,
    PairedHistogram,
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
    "ChannelSummary",
    "Check",
    "Compared",
    "ComparedGroup",
    "ComparedTensor",
    "Comparison",
    "CurvePoint",
    "EmbeddingQuality",
    "Equalisation",
    "EqualisedGroup",
    "Execution",
    "FileCost",
    "Finding",
    "Finetuning",
    "GridEnds",
    "Histogram",
    "InputLayer",
    "InputsView",
    "InspectReport",
    "JudgedModel",
    "LayerCost",
    "ListedScheme",
    "LlamaCppRun",
    "Measurement",
    "MemoryChoice",
    "MemoryFit",
    "PairedHistogram",
    "Prediction",
    "QuantizeReport",
    "QuantizeSetReport",
    "QuantizedTensor",
    "Report",
    "SchemePoint",
    "SchemesReport",
    "SizeCurve",
    "SkippedLine",
    "TensorGroup",
    "TensorSummary",
    "TokenQuality",
    "TuneReport",
    "TunedBlock",
    "TuningStep",
    "TypeTally",
    "Verdict",
    "VerifiedTensor",
    "VerifyReport",
    "dump",
    "error_json",
    "finite",
]
