"""ggml's tensor types: what a block of each holds and takes, by its name in GGUF.

The facts are ggml's (``GGML_TYPE_*`` in ggml.h, block structures in ggml-common.h at 0c1e57098);
tests hold them against gguf-py, against the native table and against what the help lists.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A type as it lies in a file: ``block`` values in ``nbytes`` bytes.

    Attributes:
        number: in the file.
        written: whether we quantize to it.
    """

    name: str
    number: int
    block: int
    nbytes: int
    written: bool = False


GGML_TYPES: dict[str, GgmlType] = {
    t.name: t
    for t in (
        GgmlType("F32", 0, 1, 4),
        GgmlType("F16", 1, 1, 2),
        GgmlType("BF16", 30, 1, 2),
        GgmlType("F64", 28, 1, 8),
        GgmlType("I8", 24, 1, 1),
        GgmlType("I16", 25, 1, 2),
        GgmlType("I32", 26, 1, 4),
        GgmlType("I64", 27, 1, 8),
        GgmlType("Q4_0", 2, 32, 18, written=True),
        GgmlType("Q4_1", 3, 32, 20, written=True),
        GgmlType("Q5_0", 6, 32, 22, written=True),
        GgmlType("Q5_1", 7, 32, 24, written=True),
        GgmlType("Q8_0", 8, 32, 34, written=True),
        GgmlType("IQ4_NL", 20, 32, 18, written=True),
        GgmlType("IQ4_XS", 23, 256, 136, written=True),
        GgmlType("MXFP4", 39, 32, 17, written=True),
        GgmlType("NVFP4", 40, 64, 36, written=True),
        GgmlType("TQ1_0", 34, 256, 54, written=True),
        GgmlType("TQ2_0", 35, 256, 66, written=True),
        GgmlType("Q1_0", 41, 128, 18, written=True),
        GgmlType("Q2_0", 42, 64, 18, written=True),
        GgmlType("Q2_K", 10, 256, 84, written=True),
        GgmlType("Q3_K", 11, 256, 110, written=True),
        GgmlType("Q4_K", 12, 256, 144, written=True),
        GgmlType("Q5_K", 13, 256, 176, written=True),
        GgmlType("Q6_K", 14, 256, 210, written=True),
        GgmlType("Q8_1", 9, 32, 40),
        GgmlType("Q8_K", 15, 256, 292),
        GgmlType("IQ1_S", 19, 256, 50),
        GgmlType("IQ1_M", 29, 256, 56),
        GgmlType("IQ2_XXS", 16, 256, 66),
        GgmlType("IQ2_XS", 17, 256, 74),
        GgmlType("IQ2_S", 22, 256, 82),
        GgmlType("IQ3_XXS", 18, 256, 98),
        GgmlType("IQ3_S", 21, 256, 110),
    )
}
WRITTEN = tuple(t for t in GGML_TYPES.values() if t.written)
CASTS = ("F32", "F16", "BF16")  # what a floating tensor may be cast to
