"""Schemes of directories that other tools load: rows of a table for each of their formats.

A format is a container, a family of schemes and a codec of the same name. What a scheme writes is
told in formats/exchange; its name is the format's own word for it where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

from qconvert.ranges import RangeMethod, default_method

# Families, by what people and configurations call them.
COMPRESSED_TENSORS = "compressed-tensors"
FP8 = "fp8"
MLX = "mlx"
GPTQ = "gptq"
AWQ = "awq"
BNB = "bnb"
MLX_AFFINE = "affine"  # of its modes the one with integers
NOT_ROUNDED = "its numbers are not rounded that way"  # of floating codes, to make up for errors


@dataclass(frozen=True, slots=True)
class ExchangeScheme:
    """A scheme of another tool's format.

    Attributes:
        name: as on the command line.
        bits: of a code.
        group: columns that share a scale; 0 where a row has one.
        symmetric: whether zero points are fixed.
        number: what codes are: ``int``, or the name of a floating type.
        scale_dtype: of scales, where that is the model's; settled when a model is at hand.
        activations: ``dynamic`` where readers make the layer's input eight bits as it comes,
            ``static`` where they do with the range of a calibration.
    """

    family: ClassVar[str]
    for_vectors: ClassVar[bool] = False
    name: str
    bits: int
    group: int
    symmetric: bool = True
    number: str = "int"
    scale_dtype: str = "BF16"
    activations: str = ""

    @property
    def default_range(self) -> RangeMethod | None:
        """How ranges are chosen unless somebody says so."""
        return default_method(self.bits) if self.number == "int" else None

    def at_least(self, bits: int) -> Self:
        """This scheme: a directory keeps to the schemes that its readers know."""
        return self

    def with_scales(self, dtype: str) -> Self:
        """This scheme for a model whose numbers are of this dtype."""
        return replace(self, scale_dtype=dtype)

    def with_parts(self, names: tuple[str, ...]) -> Self:
        """This scheme for one of several tensors that readers multiply as one."""
        return self


@dataclass(frozen=True, slots=True)
class CompressedTensorsScheme(ExchangeScheme):
    """A scheme of compressed-tensors; names are those of its presets, W4A16 and so on.

    Attributes:
        micro: the ``format`` of small floating numbers, whose scales are bytes; none of others.
        whole: whether a tensor has one scale.
        parts: tensors that have one scale of the tensor together.
    """

    family: ClassVar[str] = COMPRESSED_TENSORS
    micro: str = ""
    whole: bool = False
    parts: tuple[str, ...] = field(default=(), compare=False)

    @property
    def one_input(self) -> bool:
        """Whether a scale of inputs, too, is one for all `parts`."""
        return self.whole or bool(self.micro)

    def with_scales(self, dtype: str) -> Self:
        """This scheme for a model whose numbers are of this dtype."""
        return self if self.micro else replace(self, scale_dtype=dtype)

    def with_parts(self, names: tuple[str, ...]) -> Self:
        """This scheme for one of several tensors that readers multiply as one."""
        return replace(self, parts=names)


@dataclass(frozen=True, slots=True)
class Fp8Scheme(ExchangeScheme):
    """A scheme of FP8 checkpoints with ``weight_scale_inv``."""

    family: ClassVar[str] = FP8


def _compressed_tensors() -> tuple[CompressedTensorsScheme, ...]:
    groups = {"": 128, "_g32": 32, "_g64": 64, "_g128": 128, "_channel": 0}
    return tuple(
        CompressedTensorsScheme(f"w{bits}a16{asym}{suffix}", bits, group, symmetric=not asym)
        for bits in (4, 8, 2, 3, 5, 6)
        for asym in ("", "_asym")
        for suffix, group in groups.items()
    )


@dataclass(frozen=True, slots=True)
class MlxScheme(ExchangeScheme):
    """A scheme of MLX.

    Attributes:
        mode: MLX's word: ``affine`` has a scale and a bias a group, the others small floating
            numbers.
    """

    family: ClassVar[str] = MLX
    mode: str = MLX_AFFINE

    def at_least(self, bits: int) -> MlxScheme:
        """This scheme, or the same with so many bits if it has fewer: modules may differ."""
        if self.bits >= bits:
            return self
        return replace(self, name=f"mlx_{bits}bit_g{self.group}", bits=bits)

    def with_scales(self, dtype: str) -> MlxScheme:
        """This scheme for a model whose numbers are of this dtype."""
        return replace(self, scale_dtype=dtype) if self.mode == MLX_AFFINE else self


def _mlx() -> tuple[MlxScheme, ...]:
    return tuple(
        MlxScheme(f"mlx_{bits}bit_g{group}", bits, group, symmetric=False)
        for bits in (2, 3, 4, 5, 6, 8)
        for group in (32, 64, 128)
    )


def _mlx_floating() -> tuple[MlxScheme, ...]:
    modes = (("mxfp4", 4, 32, "e2m1"), ("mxfp8", 8, 32, "e4m3"), ("nvfp4", 4, 16, "e2m1"))
    return tuple(
        MlxScheme(f"mlx_{mode}", bits, group, number=number, scale_dtype="U8", mode=mode)
        for mode, bits, group, number in modes
    )


@dataclass(frozen=True, slots=True)
class GptqScheme(ExchangeScheme):
    """A scheme of GPTQ: symmetric, for that is all that vLLM and SGLang take."""

    family: ClassVar[str] = GPTQ

    def with_scales(self, dtype: str) -> GptqScheme:
        """This scheme, whose scales are F16 whatever the model has."""
        return replace(self, scale_dtype="F16")


def _gptq() -> tuple[GptqScheme, ...]:
    groups = {"g128": 128, "g64": 64, "g32": 32, "channel": 0}
    return tuple(
        GptqScheme(f"gptq_{bits}bit_{unit}", bits, group)
        for bits in (4, 8)
        for unit, group in groups.items()
    )


@dataclass(frozen=True, slots=True)
class AwqScheme(ExchangeScheme):
    """A scheme of AWQ."""

    family: ClassVar[str] = AWQ

    def with_scales(self, dtype: str) -> AwqScheme:
        """This scheme, whose scales are F16 whatever the model has."""
        return replace(self, scale_dtype="F16")


def _awq() -> tuple[AwqScheme, ...]:
    return tuple(
        AwqScheme(f"awq_4bit_g{group}{sym}", 4, group, symmetric=bool(sym))
        for sym in ("", "_sym")
        for group in (128, 64, 32)
    )


@dataclass(frozen=True, slots=True)
class BnbScheme(ExchangeScheme):
    """A scheme of bitsandbytes.

    Attributes:
        double: whether scales are quantized in turn.
    """

    family: ClassVar[str] = BNB
    double: bool = False


def _bnb() -> tuple[BnbScheme, ...]:
    return (
        *(
            BnbScheme(f"bnb_{book}{'_dq' if double else ''}", 4, 64, number=book, double=double)
            for book in ("nf4", "fp4")
            for double in (False, True)
        ),
        BnbScheme("bnb_int8", 8, 0),
    )


EXCHANGE_SCHEMES: tuple[ExchangeScheme, ...] = (
    *_compressed_tensors(),
    CompressedTensorsScheme("w8a8", 8, 0, activations="dynamic"),
    CompressedTensorsScheme("w8a8_static", 8, 0, activations="static"),
    CompressedTensorsScheme("fp8_dynamic", 8, 0, number="e4m3", activations="dynamic"),
    CompressedTensorsScheme("fp8_static", 8, 0, number="e4m3", activations="static"),
    CompressedTensorsScheme("fp8", 8, 0, number="e4m3", activations="static", whole=True),
    CompressedTensorsScheme("fp8_tensor", 8, 0, number="e4m3", activations="dynamic", whole=True),
    CompressedTensorsScheme("fp8_block", 8, 128, number="e4m3", activations="dynamic"),
    CompressedTensorsScheme(
        *("nvfp4a16", 4, 16), number="e2m1", scale_dtype="F8_E4M3", micro="nvfp4-pack-quantized"
    ),
    CompressedTensorsScheme(
        *("nvfp4a4", 4, 16),
        number="e2m1",
        scale_dtype="F8_E4M3",
        activations="static",
        micro="nvfp4-pack-quantized",
    ),
    CompressedTensorsScheme(
        *("mxfp4a16", 4, 32), number="e2m1", scale_dtype="U8", micro="mxfp4-pack-quantized"
    ),
    CompressedTensorsScheme(
        *("mxfp8a16", 8, 32), number="e4m3", scale_dtype="U8", micro="mxfp8-quantized"
    ),
    Fp8Scheme("fp8_block128", 8, 128, number="e4m3", activations="dynamic"),
    *_mlx(),
    *_mlx_floating(),
    *_gptq(),
    *_awq(),
    *_bnb(),
)

# What is written of them where all names are listed.
EXCHANGE_GRAMMAR = (
    "w{2|3|4|5|6|8}a16[_asym][_g32|_g64|_g128|_channel], w8a8[_static], "
    "fp8[_{dynamic|static|tensor|block}], {nvfp4|mxfp4|mxfp8}a16, nvfp4a4, fp8_block128, "
    "mlx_{2|3|4|5|6|8}bit_{g32|g64|g128}, mlx_{mxfp4|mxfp8|nvfp4}, "
    "gptq_{4|8}bit_{g32|g64|g128|channel}, "
    "awq_4bit_{g32|g64|g128}[_sym], bnb_{nf4|fp4}[_dq], bnb_int8"
)


# Schemes that go by the name of a type of ggml where a directory is asked for: the same numbers,
# and compressed-tensors' preset NVFP4, which makes inputs such numbers too.
_BY_GGML = {
    (COMPRESSED_TENSORS, "nvfp4"): "nvfp4a4",
    (MLX, "nvfp4"): "mlx_nvfp4",
    (MLX, "mxfp4"): "mlx_mxfp4",
}


def ggml_counterpart(family: str, name: str) -> ExchangeScheme | None:
    """The scheme of a family that goes by the name of a ggml type; None where it has none."""
    found = _BY_GGML.get((family, name))
    return next((scheme for scheme in EXCHANGE_SCHEMES if scheme.name == found), None)


def counterpart(
    family: str, bits: int, group: int, symmetric: bool | None
) -> ExchangeScheme | None:
    """The scheme of a family whose integer codes stand on the same grid, None where it has none.

    Args:
        group: columns that share a scale, 0 where a row has one.
        symmetric: None where either will do: the first in the table then.
    """
    for scheme in EXCHANGE_SCHEMES:
        alike = (scheme.number, scheme.activations) == ("int", "")
        alike = alike and (scheme.bits, scheme.group) == (bits, group)
        if scheme.family == family and alike and symmetric in (None, scheme.symmetric):
            return scheme
    return None


def table_counterpart(family: str, table: str, block: int, double: bool) -> ExchangeScheme | None:
    """The scheme of a family with the same table of codes, blocks and scales; None if there is
    none.
    """
    for scheme in EXCHANGE_SCHEMES:
        if isinstance(scheme, BnbScheme) and scheme.family == family:
            found = scheme.number, scheme.group, scheme.double
            if found == (table, block, double):
                return scheme
    return None
