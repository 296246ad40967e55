"""The table of schemes: what a user may name, as data.

Names and meaning: formats/schemes/SPEC.md section 1. A new scheme is a row of this table and a
quantizer that takes its class.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from qconvert.encoding import BITS, BLOCKS
from qconvert.errors import UsageError
from qconvert.mixes import MIXES


@dataclass(frozen=True, slots=True)
class AffineScheme:
    """Codes with scales; ``symmetric`` is None where the tool decides per tensor."""

    name: str
    bits: int
    granularity: str
    block: int
    symmetric: bool | None

    def resolved(self, symmetric: bool) -> AffineScheme:
        """This scheme with symmetric or asymmetric settled."""
        return affine_scheme(self.bits, self.granularity, self.block, symmetric)

    def with_bits(self, bits: int) -> AffineScheme:
        """The same granularity and symmetry at another width."""
        return affine_scheme(bits, self.granularity, self.block, self.symmetric)


@dataclass(frozen=True, slots=True)
class CastScheme:
    """Every floating tensor in one floating dtype."""

    name: str
    dtype: str


@dataclass(frozen=True, slots=True)
class GgmlScheme:
    """A ggml block type: ``block`` values in ``nbytes`` bytes."""

    name: str
    ggml_type: str
    block: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class MixScheme:
    """Several ggml types in one GGUF file: a name of `qconvert.mixes.MIXES`."""

    name: str


Scheme = AffineScheme | CastScheme | GgmlScheme | MixScheme


def affine_scheme(bits: int, granularity: str, block: int, symmetric: bool | None) -> AffineScheme:
    suffix = {None: "", True: "_sym", False: "_asym"}[symmetric]
    unit = f"block{block}" if granularity == "block" else granularity
    return AffineScheme(f"q{bits}_{unit}{suffix}", bits, granularity, block, symmetric)


def _affine_table() -> tuple[AffineScheme, ...]:
    units = [("tensor", 0), ("channel", 0)] + [("block", n) for n in BLOCKS]
    return tuple(
        affine_scheme(bits, granularity, block, symmetric)
        for bits in BITS
        for granularity, block in units
        for symmetric in (None, True, False)
    )


_ALL: tuple[Scheme, ...] = (
    *_affine_table(),
    CastScheme("f32", "F32"),
    CastScheme("f16", "F16"),
    CastScheme("bf16", "BF16"),
    GgmlScheme("q4_0", "Q4_0", 32, 18),
    GgmlScheme("q4_1", "Q4_1", 32, 20),
    GgmlScheme("q5_0", "Q5_0", 32, 22),
    GgmlScheme("q5_1", "Q5_1", 32, 24),
    GgmlScheme("q8_0", "Q8_0", 32, 34),
    GgmlScheme("iq4_nl", "IQ4_NL", 32, 18),
    GgmlScheme("iq4_xs", "IQ4_XS", 256, 136),
    GgmlScheme("mxfp4", "MXFP4", 32, 17),
    GgmlScheme("nvfp4", "NVFP4", 64, 36),
    GgmlScheme("tq1_0", "TQ1_0", 256, 54),
    GgmlScheme("tq2_0", "TQ2_0", 256, 66),
    GgmlScheme("q2_k", "Q2_K", 256, 84),
    GgmlScheme("q3_k", "Q3_K", 256, 110),
    GgmlScheme("q4_k", "Q4_K", 256, 144),
    GgmlScheme("q5_k", "Q5_K", 256, 176),
    GgmlScheme("q6_k", "Q6_K", 256, 210),
)

SCHEMES: dict[str, Scheme] = {s.name: s for s in _ALL}
SCHEMES |= {name: MixScheme(name) for name in MIXES if name not in SCHEMES}

SCHEME_GRAMMAR = (
    "q{2,3,4,5,6,8}_{tensor|channel|block16|block32|block64|block128|block256}[_sym|_asym], "
    "f32, f16, bf16; GGUF: "
    + ", ".join(dict.fromkeys((*MIXES, *(s.name for s in _ALL if isinstance(s, GgmlScheme)))))
)


def parse_scheme(text: str) -> Scheme:
    """The scheme of that name, case ignored.

    Raises:
        UsageError: no such scheme; names the nearest ones.
    """
    name = text.strip().lower()
    if name in SCHEMES:
        return SCHEMES[name]
    near = difflib.get_close_matches(name, SCHEMES, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else f"schemes: {SCHEME_GRAMMAR}"
    raise UsageError(f"unknown scheme '{text}'", hint=hint)
