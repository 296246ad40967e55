from typing import Any, TypeAlias

from numpy.typing import NDArray

Buffer: TypeAlias = NDArray[Any] | bytes | memoryview
# The fields of `ErrorSums` but the count.
Errors: TypeAlias = tuple[float, float, float, int, float, float]
# Errors, values outside, the fields of `GroupStatistics`, extremes and power sums.
Figures: TypeAlias = tuple[
    Errors,
    int,
    tuple[float, float, float, float],
    tuple[float, float, float, float, float, float],
]

def variants() -> tuple[str, ...]: ...
def variant() -> str: ...
def select(name: str, /) -> None: ...
def ggml_types() -> tuple[tuple[str, int, int], ...]: ...
def signatures() -> dict[str, list[str]]: ...
def widen_bf16(*, raw: Buffer, out: Buffer) -> None: ...
def widen_f16(*, raw: Buffer, out: Buffer) -> None: ...
def widen_table(*, raw: Buffer, table: Buffer, out: Buffer) -> None: ...
def observe(
    *, x: Buffer, n: int, wide: bool
) -> tuple[int, int, int, int, float, float, float, float, float, float]: ...
def histogram(*, x: Buffer, bins: Buffer) -> None: ...
def extrema(
    *, x: Buffer, groups: int, length: int, low: Buffer, high: Buffer, zeros: Buffer
) -> None: ...
def all_finite(*, x: Buffer) -> bool: ...
def error_sums(*, x: Buffer, decoded: Buffer) -> tuple[float, float, float]: ...
def worst_step(
    *,
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
) -> tuple[float, bool]: ...
def power_sums(*, x: Buffer, pivot: float) -> tuple[float, float, float, float]: ...
def long_sums(
    *,
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
) -> None: ...
def search(
    *,
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
    moves: Buffer,
    scale: Buffer,
    zero: Buffer,
    found: Buffer,
) -> None: ...
def encode(
    *,
    x: Buffer,
    groups: int,
    length: int,
    scale: Buffer,
    zero: Buffer,
    bits: int,
    symmetric: bool,
    codes: Buffer,
) -> int: ...
def decode(
    *,
    codes: Buffer,
    groups: int,
    length: int,
    scale: Buffer,
    zero: Buffer,
    bits: int,
    symmetric: bool,
    x: Buffer,
) -> None: ...
def encode_rows(
    *,
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
) -> Errors: ...
def quantize_blocks(
    *,
    data: Buffer,
    dtype: str,
    groups: int,
    block: int,
    bits: int,
    symmetric: bool,
    scale_dtype: str,
    factors: Buffer,
    moves: Buffer,
    weight: Buffer | None,
    reach: Buffer | None,
    mean_square: Buffer | None,
    period: int,
    codes: Buffer,
    scales: Buffer,
    zeros: Buffer,
    low: float,
    high: float,
    pivot: float,
) -> Figures | None: ...
def quantize_stream(
    *,
    data: Buffer,
    dtype: str,
    groups: int,
    block: int,
    bits: int,
    symmetric: bool,
    scale_dtype: str,
    factors: Buffer,
    moves: Buffer,
    weight: Buffer | None,
    reach: Buffer | None,
    mean_square: Buffer | None,
    period: int,
    codes: Buffer,
    scales: Buffer,
    zeros: Buffer,
    biased: bool,
) -> Errors | None: ...
def quantize_channels(
    *,
    data: Buffer,
    dtype: str,
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
) -> Figures | None: ...
def pack(*, values: Buffer, groups: int, width: int, packed: Buffer) -> None: ...
def unpack(*, values: Buffer, groups: int, width: int, packed: Buffer) -> None: ...
def pack_stream(
    *, codes: Buffer, rows: int, columns: int, bits: int, stride: int, packed: Buffer
) -> None: ...
def unpack_stream(
    *, codes: Buffer, rows: int, columns: int, bits: int, stride: int, packed: Buffer
) -> None: ...
def cast(
    *, data: Buffer, dtype: str, count: int, to: str, out: Buffer
) -> tuple[float, float, float] | None: ...
def integer_dots(
    *, codes: Buffer, inputs: Buffer, spans: int, rows: int, samples: int, length: int, sums: Buffer
) -> None: ...
def product(
    *,
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
) -> None: ...
def ggml_encode(
    *, ggml_type: str, x: Buffer, importance: Buffer | None, blocks: int, out: Buffer
) -> None: ...
def ggml_quantize(
    *, ggml_type: str, data: Buffer, dtype: str, importance: Buffer | None, blocks: int, out: Buffer
) -> tuple[float, float, float] | None: ...
def ggml_decode(*, ggml_type: str, data: Buffer, blocks: int, x: Buffer) -> None: ...
def codebook_encode(
    *,
    x: Buffer,
    count: int,
    scale: Buffer,
    block: int,
    midpoints: Buffer,
    midpoint_count: int,
    entries: Buffer,
    out: Buffer,
) -> None: ...
def codebook_decode(
    *, data: Buffer, count: int, scale: Buffer, block: int, table: Buffer, x: Buffer
) -> None: ...
def levels_encode(
    *,
    x: Buffer,
    rows: int,
    columns: int,
    unit: Buffer,
    bits: int,
    block: int,
    step_bits: int,
    shift: int,
    levels: Buffer,
    weights: Buffer | None,
    mean_square: Buffer | None,
    codes: Buffer,
    steps: Buffer,
) -> tuple[float, float, float, int, float, float]: ...
def levels_decode(
    *,
    packed: Buffer,
    rows: int,
    columns: int,
    unit: Buffer,
    steps: Buffer,
    shifts: Buffer,
    bits: int,
    block: int,
    step_bits: int,
    shift: int,
    levels: Buffer,
    x: Buffer,
) -> None: ...
def levels_product(
    *,
    packed: Buffer,
    rows: int,
    columns: int,
    unit: Buffer,
    steps: Buffer,
    shifts: Buffer,
    bits: int,
    block: int,
    step_bits: int,
    shift: int,
    levels: Buffer,
    inputs: Buffer,
    samples: int,
    zero_point: int,
    y: Buffer,
) -> None: ...
def compensate(
    *,
    x: Buffer,
    rows: int,
    columns: int,
    order: Buffer,
    levels: Buffer,
    scale: Buffer,
    zero: Buffer,
    offset: Buffer,
    length: int,
    gram: Buffer,
    feedback: Buffer,
    passes: int,
    scale_dtype: str | None,
    scale_unit: Buffer | None,
    scale_low: int,
    scale_high: int,
    offset_unit: Buffer | None,
    offset_low: int,
    offset_high: int,
    codes: Buffer,
) -> None: ...
def sweep_columns(
    *,
    rows: int,
    columns: int,
    first: int,
    width: int,
    levels: Buffer,
    scale: Buffer,
    zero: Buffer,
    offset: Buffer,
    length: int,
    gram: Buffer,
    shares: Buffer,
    slope: Buffer,
    values: Buffer,
    codes: Buffer,
    moves: Buffer,
    places: Buffer,
) -> tuple[int, bool]: ...
def multiply_ordered(
    *,
    sums: Buffer,
    left: Buffer,
    right: Buffer,
    order: Buffer | None,
    rows: int,
    depth: int,
    right_rows: int,
    columns: int,
    begin: int,
    end: int,
) -> None: ...
