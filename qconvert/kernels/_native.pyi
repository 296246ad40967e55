from typing import Any, TypeAlias

from numpy.typing import NDArray

from qconvert.kernels.compiled import Figures

Buffer: TypeAlias = NDArray[Any] | bytes | memoryview

def variants() -> tuple[str, ...]: ...
def variant() -> str: ...
def select(name: str, /) -> None: ...
def widen_bf16(raw: Buffer, out: Buffer, n: int, /) -> None: ...
def widen_f16(raw: Buffer, out: Buffer, n: int, /) -> None: ...
def widen_table(raw: Buffer, table: Buffer, out: Buffer, n: int, /) -> None: ...
def observe(
    x: Buffer, n: int, wide: bool, /
) -> tuple[int, int, int, int, float, float, float, float, float, float]: ...
def histogram(x: Buffer, n: int, bins: Buffer, /) -> None: ...
def extrema(
    x: Buffer, groups: int, length: int, low: Buffer, high: Buffer, zeros: Buffer, /
) -> None: ...
def power_sums(x: Buffer, n: int, pivot: float, /) -> tuple[float, float, float, float]: ...
def worst_step(
    weights: Buffer,
    values: Buffer,
    rows: int,
    columns: int,
    group: int,
    scale: Buffer,
    offset: Buffer | None,
    zero: Buffer,
    code_step: float,
    low: float,
    high: float,
    scale_rounding: Buffer | None,
    offset_rounding: Buffer | None,
    /,
) -> tuple[float, bool]: ...
def error_sums(x: Buffer, decoded: Buffer, n: int, /) -> tuple[float, float, float]: ...
def column_sums(columns: Buffer, length: int, groups: int, sums: Buffer, /) -> None: ...
def code_sums(
    columns: Buffer,
    length: int,
    groups: int,
    inverse: Buffer,
    offset: Buffer,
    low: int,
    top: int,
    mask: Buffer | None,
    su: Buffer,
    suu: Buffer,
    sxu: Buffer,
    /,
) -> None: ...
def long_sums(
    x: Buffer,
    weights: Buffer | None,
    rows: int,
    length: int,
    candidates: int,
    inverse: Buffer,
    offset: Buffer,
    low: int,
    top: int,
    sums: Buffer,
    /,
) -> None: ...
def search(
    x: Buffer,
    groups: int,
    length: int,
    counts: Buffer | None,
    low: Buffer,
    high: Buffer,
    has_zero: Buffer,
    weight: Buffer | None,
    reach: Buffer | None,
    period: int,
    bits: int,
    symmetric: bool,
    factors: Buffer,
    factor_count: int,
    moves: Buffer,
    move_count: int,
    scale: Buffer,
    zero: Buffer,
    found: Buffer,
    /,
) -> None: ...
def encode(
    x: Buffer,
    groups: int,
    length: int,
    scale: Buffer,
    zero: Buffer,
    bits: int,
    symmetric: bool,
    codes: Buffer,
    /,
) -> int: ...
def decode(
    codes: Buffer,
    groups: int,
    length: int,
    scale: Buffer,
    zero: Buffer,
    bits: int,
    symmetric: bool,
    x: Buffer,
    /,
) -> None: ...
def encode_rows(
    x: Buffer,
    rows: int,
    columns: int,
    scale: Buffer,
    zero: Buffer,
    groups: int,
    bits: int,
    symmetric: bool,
    block: int,
    mean_square: Buffer | None,
    period: int,
    packed: Buffer,
    /,
) -> tuple[float, float, float, int, float, float]: ...
def quantize_blocks(
    values: Buffer,
    source_type: int,
    groups: int,
    block: int,
    bits: int,
    symmetric: bool,
    scale_type: int,
    factors: Buffer,
    factor_count: int,
    moves: Buffer,
    move_count: int,
    low: float,
    high: float,
    pivot: float,
    weight: Buffer | None,
    reach: Buffer | None,
    mean_square: Buffer | None,
    period: int,
    codes: Buffer,
    scales: Buffer,
    zeros: Buffer,
    /,
) -> Figures | None: ...
def quantize_channels(
    values: Buffer,
    source_type: int,
    rows: int,
    columns: int,
    bits: int,
    symmetric: bool,
    either_side: bool,
    low: float,
    high: float,
    pivot: float,
    scale: Buffer | None,
    zero: Buffer | None,
    mean_square: Buffer | None,
    period: int,
    codes: Buffer,
    scales: Buffer,
    zeros: Buffer,
    /,
) -> Figures | None: ...
def all_finite(x: Buffer, n: int, /) -> bool: ...
def pack(values: Buffer, groups: int, width: int, packed: Buffer, /) -> None: ...
def unpack(packed: Buffer, groups: int, width: int, values: Buffer, /) -> None: ...
def integer_product(
    codes: Buffer, inputs: Buffer, rows: int, samples: int, length: int, sums: Buffer, /
) -> None: ...
def product(
    packed: Buffer,
    rows: int,
    row_codes: int,
    columns: int,
    scale: Buffer,
    zero: Buffer,
    groups: int,
    bits: int,
    symmetric: bool,
    block: int,
    inputs: Buffer,
    samples: int,
    zero_point: int,
    y: Buffer,
    /,
) -> None: ...
def ggml_types() -> tuple[tuple[str, int, int], ...]: ...
def ggml_encode(
    kind: int,
    blocks: Buffer,
    importance: Buffer | None,
    period: int,
    count: int,
    data: Buffer,
    /,
) -> None: ...
def ggml_quantize(
    kind: int,
    values: Buffer,
    source_type: int,
    importance: Buffer | None,
    period: int,
    count: int,
    data: Buffer,
    /,
) -> tuple[float, float, float] | None: ...
def cast(
    values: Buffer, source_type: int, count: int, type: int, out: Buffer, /
) -> tuple[float, float, float] | None: ...
def ggml_decode(kind: int, data: Buffer, count: int, blocks: Buffer, /) -> None: ...
