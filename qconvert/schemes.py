"""The table of schemes: what a user may name, as data.

Names and meaning: formats/schemes/SPEC.md section 1. A new scheme of a known family is a row of
this table; a new family is a class here, its row in `FAMILIES`, and a codec: `qconvert.codecs`.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Protocol

from qconvert.encoding import BITS, BLOCKS
from qconvert.errors import UsageError
from qconvert.exchange_schemes import (
    AWQ,
    BNB,
    COMPRESSED_TENSORS,
    EXCHANGE_GRAMMAR,
    EXCHANGE_SCHEMES,
    FP8,
    GPTQ,
    MLX,
    counterpart,
    ggml_counterpart,
    table_counterpart,
)
from qconvert.ggml_types import CASTS, WRITTEN
from qconvert.mixes import MIXES
from qconvert.ranges import RangeMethod, default_method


@dataclass(frozen=True, slots=True)
class Family:
    """A family of schemes.

    Attributes:
        codec: the module of its codec.
        described: whether the header of a qblk file can describe its encodings.
        feature: that such a file has to require, NAME-VERSION; None for what every reader knows.
    """

    codec: str
    described: bool
    feature: str | None = None


# By what a header calls them.
FAMILIES = {
    "raw": Family("qconvert.codecs.raw", described=True),
    "affine": Family("qconvert.codecs.affine", described=True),
    "codebook": Family("qconvert.codecs.codebook", described=True, feature="codebook-1.2"),
    "levels": Family("qconvert.codecs.levels", described=True, feature="levels-1.3"),
    "ggml": Family("qconvert.codecs.ggml", described=False),
    "moved": Family("qconvert.codecs.moving", described=False),
    COMPRESSED_TENSORS: Family("qconvert.codecs.exchange.compressed_tensors", described=False),
    FP8: Family("qconvert.codecs.exchange.fp8", described=False),
    MLX: Family("qconvert.codecs.exchange.mlx", described=False),
    GPTQ: Family("qconvert.codecs.exchange.gptq", described=False),
    AWQ: Family("qconvert.codecs.exchange.awq", described=False),
    BNB: Family("qconvert.codecs.exchange.bitsandbytes", described=False),
}

# bitsandbytes' tables, by code: create_normal_map in QLoRA (Dettmers et al., 2023), section 3, to
# binary32, and sign, two bits of exponent and one of mantissa over 192.
CODEBOOKS = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        *(0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4),
        *(-0.0, -1 / 192, -2 / 3, -1.0, -1 / 3, -1 / 2, -1 / 6, -1 / 4),
    ),
}
CODEBOOK_BLOCKS = (32, 64, 128, 256)

# Levels of codes by their bits, for weights that are near Gaussian, fitted together with signed
# scales of blocks: formats/schemes/SPEC.md section 11.
LEVELS = {
    2: (-127, -43, 17, 85),
    3: (-127, -77, -45, -19, 6, 33, 64, 109),
    4: (-127, -102, -79, -61, -46, -32, -20, -9, 2, 13, 24, 36, 49, 65, 83, 109),
    5: (
        *(-127, -117, -105, -94, -80, -72, -64, -56, -48, -41, -35, -29, -23, -17, -12, -7, -1),
        *(4, 9, 15, 21, 26, 32, 38, 45, 51, 58, 66, 74, 82, 94, 113),
    ),
    6: (
        *(-127, -120, -111, -106, -100, -95, -90, -83, -78, -74, -70, -65, -61, -58, -54, -50),
        *(-47, -44, -40, -37, -34, -31, -28, -26, -23, -20, -17, -15, -12, -10, -7, -4, -2, 1, 3),
        *(6, 8, 10, 13, 16, 18, 21, 23, 26, 29, 31, 34, 37, 40, 43, 46, 50, 53, 57, 61, 64, 68, 72),
        *(76, 81, 88, 93, 99, 109),
    ),
}
LEVEL_BLOCKS = (16, 32)
# Those of codes of 2 bits that lie where a zero point of the block puts them.
PLACED_LEVELS = (-125, -79, -41, 5)
# Bits of a scale, and what bits besides add to the levels; fine ones are those of codes of 5 and
# 6 bits. Which bits there are: `qconvert.kernels.records.LevelCode`.
PLAIN_STEPS, SHIFTED_STEPS, FINE_STEPS, PLACED_STEPS = (5, 0), (6, 4), (6, 0), (4, 8)
SHIFTED, PLACED = "s", "z"  # variants by the letter of their names
VARIANTS = {0: "", 4: SHIFTED, 8: PLACED}  # by their shifts


def steps_of(bits: int, variant: str = "") -> tuple[int, int]:
    """Bits of a scale and the shift, for codes of so many bits."""
    if variant == PLACED:
        return PLACED_STEPS
    if bits > 4:
        return FINE_STEPS
    return SHIFTED_STEPS if variant == SHIFTED else PLAIN_STEPS


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
class CodebookScheme:
    """Codes of a table, a key of `CODEBOOKS`, with a scale a block, itself quantized if
    ``double``.
    """

    family: ClassVar[str] = "codebook"
    for_vectors: ClassVar[bool] = False
    default_range: ClassVar[RangeMethod | None] = None
    book: str
    block: int
    double: bool

    @property
    def name(self) -> str:
        return f"{self.book}_block{self.block}{'_dq' if self.double else ''}"

    def at_least(self, bits: int) -> CodebookScheme:
        """This scheme: there is none of more bits."""
        return self


@dataclass(frozen=True, slots=True)
class LevelScheme:
    """Codes of integer levels, `LEVELS`, with a signed scale a block and a scale a row.

    Attributes:
        bits, block: of a code, and values that share a scale.
        variant: `SHIFTED` for finer scales that may move the levels, `PLACED` for a zero point a
            block and scales without sign, or nothing.
        table: levels that were fitted to a tensor before; None for the usual ones, or those that
            will be.
    """

    family: ClassVar[str] = "levels"
    for_vectors: ClassVar[bool] = False
    default_range: ClassVar[RangeMethod | None] = None
    bits: int
    block: int
    variant: str = ""
    table: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        return f"c{self.bits}{self.variant}_block{self.block}"

    @property
    def levels(self) -> tuple[int, ...]:
        """Of each code, ascending."""
        if self.table:
            return self.table
        return PLACED_LEVELS if self.variant == PLACED else LEVELS[self.bits]

    def at_least(self, bits: int) -> LevelScheme:
        """This scheme, or the same with so many bits, 6 at most, if it has fewer and can have
        them.
        """
        if self.variant == SHIFTED or bits <= self.bits:
            return self
        return LevelScheme(min(bits, max(LEVELS)), self.block)


@dataclass(frozen=True, slots=True)
class GgmlScheme:
    """A ggml block type: a name of `qconvert.ggml_types.GGML_TYPES`.

    Attributes:
        scaled: whether a tensor has a scale of its own besides, where a reader multiplies by it;
            NVFP4 alone.
    """

    family: ClassVar[str] = "ggml"
    for_vectors: ClassVar[bool] = False
    default_range: ClassVar[RangeMethod | None] = None
    name: str
    ggml_type: str
    scaled: bool = False

    def at_least(self, bits: int) -> GgmlScheme:
        """This scheme: more bits where they count are the business of a mix."""
        return self


@dataclass(frozen=True, slots=True)
class MixScheme:
    """Several ggml types in one GGUF file: a name of `qconvert.mixes.MIXES`."""

    family: ClassVar[str] = "mix"  # of a file, so that it has no codec
    default_range: ClassVar[RangeMethod | None] = None
    name: str


@dataclass(frozen=True, slots=True)
class KeepScheme:
    """What is quantized stays so, in the codes that it has: see `qconvert.codecs.moving`."""

    family: ClassVar[str] = "keep"  # of a file, so that it has no codec
    default_range: ClassVar[RangeMethod | None] = None
    name: str = "keep"


Scheme = TensorScheme | MixScheme | KeepScheme


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
    *(
        CodebookScheme(book, block, double)
        for book in CODEBOOKS
        for block in CODEBOOK_BLOCKS
        for double in (False, True)
    ),
    *(LevelScheme(bits, block) for bits in LEVELS for block in LEVEL_BLOCKS),
    LevelScheme(4, 16, SHIFTED),
    LevelScheme(2, 16, PLACED),
    *(CastScheme(dtype.lower(), dtype) for dtype in CASTS),
    *(GgmlScheme(t.name.lower(), t.name) for t in WRITTEN),
    *EXCHANGE_SCHEMES,
)

TENSOR_SCHEMES = {s.name: s for s in _ALL}
SCHEMES: dict[str, Scheme] = {
    **TENSOR_SCHEMES,
    **{name: MixScheme(name) for name in MIXES if name not in TENSOR_SCHEMES},
    "keep": KeepScheme(),
}

SCHEME_GRAMMAR = (
    "q{2,3,4,5,6,8}_{tensor|channel|block16|block32|block64|block128|block256}[_sym|_asym], "
    "{nf4|fp4}_block{32|64|128|256}[_dq], {c2|c3|c4|c5|c6}_block{16|32}, c4s_block16, "
    "c2z_block16, f32, f16, bf16; "
    f"directories: {EXCHANGE_GRAMMAR}; keep, of a quantized source; "
    "GGUF: " + ", ".join(dict.fromkeys((*MIXES, *(s.name for s in _ALL if s.family == "ggml"))))
)


def adapted(scheme: Scheme, families: Collection[str]) -> Scheme:
    """A scheme as a container of these families has it: one with the same grid in place of ours.

    Itself where it is of these families already, or has no counterpart among them.
    """
    if scheme.family in families:
        return scheme
    if isinstance(scheme, CodebookScheme):
        book, block, double = scheme.book, scheme.block, scheme.double
        tables = (table_counterpart(f, book, block, double) for f in families)
        return next((other for other in tables if other), scheme)
    if isinstance(scheme, GgmlScheme):
        named = (ggml_counterpart(f, scheme.name) for f in families)
        return next((other for other in named if other), scheme)
    if not isinstance(scheme, AffineScheme) or scheme.granularity == "tensor":
        return scheme
    found = (counterpart(f, scheme.bits, scheme.block, scheme.symmetric) for f in families)
    return next((other for other in found if other), scheme)


def parse_scheme(text: str) -> Scheme:
    """The scheme of that name, case ignored.

    Raises:
        UsageError: no such scheme; names the nearest ones.
    """
    name = text.strip().lower()
    if name in SCHEMES:
        return SCHEMES[name]
    near = difflib.get_close_matches(name, SCHEMES, n=3, cutoff=0.6)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else "qconvert quantize --list-schemes shows all"
    )
    begun = [] if near else [n for n in SCHEMES if name and n.startswith(f"{name}_")]
    if begun:  # the name of a format, or of a part of one
        hint = f"schemes that begin so: {' '.join(begun)}"
    raise UsageError(f"unknown scheme '{text}'", hint=hint)
