"""The table of schemes: what a user may name, as data.

Names and meaning: formats/schemes/SPEC.md section 1. A new scheme of a known family is a row of
this table; a new family is a class here, its row in `FAMILIES`, and a codec: `qconvert.codecs`.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import ClassVar, Protocol

from qconvert.encoding import BITS, BLOCKS
from qconvert.errors import UsageError
from qconvert.ggml_types import CASTS, WRITTEN
from qconvert.mixes import MIXES
from qconvert.ranges import RangeMethod, default_method

# Families of schemes, by what a header calls them, and the modules of their codecs.
FAMILIES = {
    "raw": "qconvert.codecs.raw",
    "affine": "qconvert.codecs.affine",
    "ggml": "qconvert.codecs.ggml",
}


class TensorScheme(Protocol):
    """What a single tensor can take.

    Attributes:
        family: a key of `FAMILIES`.
        for_vectors: whether it is for every floating tensor, not for matrices alone.
        name: as on the command line.
    """

    family: ClassVar[str]
    for_vectors: ClassVar[bool]

    @property
    def name(self) -> str: ...

    @property
    def default_range(self) -> RangeMethod | None:
        """How ranges are chosen unless somebody says so; None where there are none to choose."""

    def at_least(self, bits: int) -> TensorScheme:
        """This scheme, or the same with so many bits if it has fewer and can have them."""


@dataclass(frozen=True, slots=True)
class AffineScheme:
    """Codes with scales; ``symmetric`` is None where the tool decides per tensor."""

    family: ClassVar[str] = "affine"
    for_vectors: ClassVar[bool] = False
    name: str
    bits: int
    granularity: str
    block: int
    symmetric: bool | None

    @property
    def default_range(self) -> RangeMethod:
        """How ranges are chosen unless somebody says so."""
        return default_method(self.bits)

    def at_least(self, bits: int) -> AffineScheme:
        """This scheme, or the same with so many bits if it has fewer."""
        return self if self.bits >= bits else self.with_bits(bits)

    def resolved(self, symmetric: bool) -> AffineScheme:
        """This scheme with symmetric or asymmetric settled."""
        return affine_scheme(self.bits, self.granularity, self.block, symmetric)

    def with_bits(self, bits: int) -> AffineScheme:
        """The same granularity and symmetry at another width."""
        return affine_scheme(bits, self.granularity, self.block, self.symmetric)


@dataclass(frozen=True, slots=True)
class CastScheme:
    """Every floating tensor in one floating dtype."""

    family: ClassVar[str] = "raw"
    for_vectors: ClassVar[bool] = True
    default_range: ClassVar[RangeMethod | None] = None
    name: str
    dtype: str

    def at_least(self, bits: int) -> CastScheme:
        """This scheme: a dtype has bits enough."""
        return self


@dataclass(frozen=True, slots=True)
class GgmlScheme:
    """A ggml block type: a name of `qconvert.ggml_types.GGML_TYPES`."""

    family: ClassVar[str] = "ggml"
    for_vectors: ClassVar[bool] = False
    default_range: ClassVar[RangeMethod | None] = None
    name: str
    ggml_type: str

    def at_least(self, bits: int) -> GgmlScheme:
        """This scheme: more bits where they count are the business of a mix."""
        return self


@dataclass(frozen=True, slots=True)
class MixScheme:
    """Several ggml types in one GGUF file: a name of `qconvert.mixes.MIXES`."""

    family: ClassVar[str] = "mix"  # of a file, so that it has no codec
    default_range: ClassVar[RangeMethod | None] = None
    name: str


Scheme = TensorScheme | MixScheme


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


_ALL: tuple[TensorScheme, ...] = (
    *_affine_table(),
    *(CastScheme(dtype.lower(), dtype) for dtype in CASTS),
    *(GgmlScheme(t.name.lower(), t.name) for t in WRITTEN),
)

TENSOR_SCHEMES = {s.name: s for s in _ALL}
SCHEMES: dict[str, Scheme] = {
    **TENSOR_SCHEMES,
    **{name: MixScheme(name) for name in MIXES if name not in TENSOR_SCHEMES},
}

SCHEME_GRAMMAR = (
    "q{2,3,4,5,6,8}_{tensor|channel|block16|block32|block64|block128|block256}[_sym|_asym], "
    "f32, f16, bf16; GGUF: "
    + ", ".join(dict.fromkeys((*MIXES, *(s.name for s in _ALL if s.family == "ggml"))))
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
