"""Codes of integer levels with a signed step a block and a scale a row: formats/schemes/SPEC.md
section 11, formats/qblk/SPEC.md section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from qconvert import kernels
from qconvert.codecs.codec import (
    Codec,
    Coded,
    Encoder,
    Encoding,
    Facts,
    Grid,
    HeaderFields,
    Outcome,
    Segment,
    Stored,
    rescaled_numbers,
    smaller,
)
from qconvert.codecs.codes import Codes
from qconvert.codecs.compensation import Rounder, values_at_once, weighted_noise
from qconvert.codecs.level_tables import fitted_code
from qconvert.codecs.source import RUN_VALUES, largest_weight, rows_of, tiles_of
from qconvert.errors import WeightError
from qconvert.geometry import PACK_GROUP, Tile, row_length, tiles
from qconvert.kernels.arithmetic import level_rows, level_steps, row_factor
from qconvert.kernels.records import (
    F32,
    U8,
    Activations,
    Bytes,
    CodeGrid,
    Encoded,
    LevelCode,
    LevelSteps,
    Multiples,
)
from qconvert.model import DTYPES, Model, TensorInfo
from qconvert.schemes import (
    LEVEL_BLOCKS,
    LEVELS,
    PLACED_STEPS,
    SHIFTED,
    VARIANTS,
    LevelScheme,
    steps_of,
)

CHECKED = 1 << 18  # scales of rows that are looked at at once
HALF_MAX = 65504.0  # of binary16
FITTED = "fitted"  # a table that is the tensor's own, in the notes of a header


@dataclass(frozen=True, slots=True)
class LevelEncoding(Encoding):
    """Rows of codes with steps and a scale.

    Attributes:
        code: what codes and steps mean.
        row_length: values of a row.
    """

    code: LevelCode
    row_length: int

    @property
    def name(self) -> str:
        return LevelScheme(self.code.bits, self.code.block, VARIANTS[self.code.shift]).name

    @property
    def bits(self) -> float:
        return self.code.bits

    @property
    def multiplies(self) -> bool:
        return True

    @property
    def width(self) -> int:
        """Bits of a stored step, with its shift."""
        return self.code.step_bits + self.code.shift_bits

    @property
    def row_bytes(self) -> int:
        """Bytes of the codes of a row."""
        return -(-self.row_length // PACK_GROUP) * 4 * self.code.bits

    def rows(self, shape: tuple[int, ...]) -> int:
        """Rows of a tensor."""
        return math.prod(shape) // self.row_length

    def segments(self, shape: tuple[int, ...]) -> tuple[Segment, ...]:
        rows = self.rows(shape)
        groups = -(-rows * self.code.blocks(self.row_length) // PACK_GROUP)
        return (
            Segment("codes", rows * self.row_bytes),
            Segment("scales", groups * 4 * self.width, self.width),
            Segment("row_scales", 2 * rows),
        )

    def to_json(self) -> dict[str, object]:
        return {
            "bits": self.code.bits,
            "block": self.code.block,
            "kind": "levels",
            "levels": list(self.code.levels),
            "row_length": self.row_length,
            "scale_bits": self.code.step_bits,
            "shift": self.code.shift,
        }

    def columns(self, shape: tuple[int, ...]) -> int:
        return self.row_length

    # --- reading ---

    def coded(self, stored: Stored, tile: Tile) -> Coded:
        codes, steps = self._packed(stored, tile), self._steps(stored, tile)
        table, shape = self.code.levels, steps.steps.shape
        unpacked = kernels.unpack(codes, self.code.bits).reshape(tile.rows, -1)
        gap = max(high - low for low, high in pairwise(table))
        grid = Grid(
            scale=steps.scale * np.float32(gap),  # of the widest gap between two levels
            low=table[0],
            high=table[-1],
            code_step=gap,
            always_scaled=False,
            group=self.code.block,
            zero=-steps.shifts.reshape(shape).astype(np.int32),
        )
        values = kernels.levels_decode(codes, tile.columns, steps, self.code)
        return Coded(values, level_rows(unpacked[:, : tile.columns], steps, self.code), grid)

    def codes(self, stored: Stored) -> Codes:
        tile = Tile(self.rows(stored.shape), self.row_length, 0, True)
        steps = self._steps(stored, tile)
        unpacked = kernels.unpack(self._packed(stored, tile), self.code.bits)
        return Codes(
            np.ascontiguousarray(unpacked.reshape(tile.rows, -1)[:, : self.row_length]),
            steps.scale,
            -steps.shifts.astype(np.float32),
            self.code.block,
            self.code.bits,
            self.code.table.astype(np.float32),
        )

    def product(self, stored: Stored, first: int, last: int, a: Activations) -> F32:
        tile = Tile(last - first, self.row_length, first * self.row_length, True)
        packed, steps = self._packed(stored, tile), self._steps(stored, tile)
        return kernels.levels_product(packed, self.row_length, steps, self.code, a)

    def unscalable(self, shape: tuple[int, ...]) -> str | None:
        return None

    def rescaled(self, stored: Stored, first: int, factors: F32) -> dict[str, Bytes]:
        raw = stored.read("row_scales", 2 * first, 2 * len(factors))
        scales = np.frombuffer(raw, "<f2").reshape(-1, 1)
        return {"row_scales": rescaled_numbers(scales, factors).tobytes()}

    def _packed(self, stored: Stored, tile: Tile) -> U8:
        """The codes of a tile, whose first column is a multiple of 32."""
        first, low = divmod(tile.start, self.row_length)
        width = -(-tile.columns // PACK_GROUP) * 4 * self.code.bits
        place = first * self.row_bytes + low * self.code.bits // 8
        return np.frombuffer(stored.read("codes", place, tile.rows * width), np.uint8)

    def _steps(self, stored: Stored, tile: Tile) -> LevelSteps:
        """The steps of a tile, whose first column is that of a block."""
        first, low = divmod(tile.start, self.row_length)
        per_tile = self.code.blocks(tile.columns)
        begin = first * self.code.blocks(self.row_length) + low // self.code.block
        step = self._stored_steps(stored, begin, tile.rows * per_tile)
        rows = stored.read("row_scales", 2 * first, 2 * tile.rows)
        return level_steps(step.reshape(tile.rows, per_tile), rows, self.code)

    def _stored_steps(self, stored: Stored, begin: int, count: int) -> U8:
        """Steps as stored, a byte each, with what fills the last group of 32 where it is read."""
        group = 4 * self.width
        low, high = begin // PACK_GROUP, -(-(begin + count) // PACK_GROUP)
        packed = stored.read("scales", low * group, (high - low) * group)
        found = kernels.unpack(np.frombuffer(packed, np.uint8), self.width)
        skip = begin - low * PACK_GROUP
        return found[skip : skip + count]

    def check(self, stored: Stored) -> None:
        """Hold the payload against QBLK-020 and QBLK-023."""
        rows = self.rows(stored.shape)
        for start in range(0, rows, CHECKED):
            count = min(CHECKED, rows - start)
            scales = np.frombuffer(stored.read("row_scales", 2 * start, 2 * count), "<f2")
            if not np.isfinite(scales).all() or np.signbit(scales).any():
                stored.refuse(20, "a scale of a row is negative or not finite")
        steps = rows * self.code.blocks(self.row_length)
        last = steps // PACK_GROUP * PACK_GROUP
        if steps % PACK_GROUP:
            filled = self._stored_steps(stored, last, PACK_GROUP)
            if filled[steps - last :].any():
                stored.refuse(23, "padding of the scales is not 0")
        if self.row_length % PACK_GROUP:
            self._check_padding(stored, rows)

    def _check_padding(self, stored: Stored, rows: int) -> None:
        """The last group of codes of each row."""
        group, real = 4 * self.code.bits, self.row_length % PACK_GROUP
        for tile in tiles(rows, self.row_bytes):
            data = np.frombuffer(stored.read("codes", tile.start, tile.stop - tile.start), np.uint8)
            if not tile.last:
                continue
            ends = data.reshape(tile.rows, -1)[:, -group:]
            codes = kernels.unpack(np.ascontiguousarray(ends).ravel(), self.code.bits)
            if codes.reshape(tile.rows, -1)[:, real:].any():
                stored.refuse(23, "padding codes are not 0")


# --- writing --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LevelEncoder(Encoder):
    """Steps that are searched, and the nearest levels.

    Attributes:
        mean_square: of the input channels, (columns,), where known.
        rounder: see `Facts`.
        gain_db: of a table that was fitted to the tensor; 0 where it is the usual one.
    """

    model: Model
    tensor: TensorInfo
    code: LevelEncoding
    mean_square: F32 | None
    rounder: Rounder | None = None
    gain_db: float = 0.0

    @property
    def encoding(self) -> LevelEncoding:
        return self.code

    def tiles(self) -> Iterator[Tile]:
        return tiles_of(self.tensor, values_at_once(self.rounder, self.tensor, RUN_VALUES))

    def encode(self, tile: Tile) -> Encoded:
        x = rows_of(self.model, self.tensor, tile)
        done = kernels.levels_encode(x, self.code.code, self.mean_square)
        if not np.isfinite(np.frombuffer(done.segments["row_scales"], "<f2")).all():
            raise WeightError(
                "the scale of a row does not fit binary16",
                path=self.model.path,
                tensor=self.tensor.name,
                found=f"weights up to {largest_weight(self.model, self.tensor, tile):g}",
                wanted=f"at most {int(HALF_MAX / row_factor(self.code.code)) // 100 * 100:,}",
                hint=f"keep the tensor with --keep '{self.tensor.name}', or choose another scheme",
            )
        return self._compensated(x, done, self.rounder) if self.rounder else done

    def _compensated(self, x: F32, done: Encoded, rounder: Rounder) -> Encoded:
        """Other codes for whole rows (R, C) than the nearest, and steps that suit them."""
        code, (rows, columns) = self.code.code, x.shape
        step = np.frombuffer(done.segments["scales"], np.uint8).reshape(rows, -1)
        steps = level_steps(step, done.segments["row_scales"], code)
        zero, (lowest, highest) = -steps.shifts.astype(np.float32), code.steps
        unit = np.broadcast_to(steps.unit[:, None], zero.shape)
        grid = CodeGrid(
            *(code.table.astype(np.float32), steps.scale, zero, np.zeros_like(zero), code.block),
            Multiples(unit, lowest, highest),
        )
        before = kernels.unpack(np.frombuffer(done.segments["codes"], np.uint8), code.bits)
        padded = before.reshape(rows, -1)
        padded[:, :columns], grid = rounder.codes(x, padded[:, :columns], grid)
        packed = kernels.pack(padded.ravel(), code.bits)
        chosen = np.rint(grid.scale / np.where(unit != 0, unit, np.float32(1)))
        chosen = np.where(unit != 0, chosen, steps.steps).astype(np.int8)
        shifted = step >> code.step_bits << code.step_bits
        stored = shifted | (chosen - np.int8(lowest)).astype(np.uint8)
        steps = replace(steps, steps=chosen)
        decoded = kernels.levels_decode(packed, columns, steps, code)
        _, noise, worst = kernels.error_sums(x, decoded)
        error = replace(done.error, noise=noise, worst=worst)
        if self.mean_square is not None:
            weighted = weighted_noise(x, decoded, self.mean_square[None])
            error = replace(error, weighted_noise=weighted)
        segments = {**done.segments, "codes": packed.data, "scales": stored.tobytes()}
        return replace(done, segments=segments, error=error)

    def outcome(self, seen: Encoded) -> Outcome:
        notes = self.rounder.note() if self.rounder else {}
        if self.gain_db:
            notes |= {"table": FITTED, "table_gain_db": round(self.gain_db, 3)}
        return Outcome(seen.error, notes or None, weighted=self.mean_square is not None)


def level_code(scheme: LevelScheme) -> LevelCode:
    """What the codes of a scheme mean."""
    steps = steps_of(scheme.bits, scheme.variant)
    return LevelCode(scheme.bits, scheme.block, *steps, scheme.levels)


def planned(scheme: LevelScheme, tensor: TensorInfo) -> LevelEncoding:
    """The encoding that a tensor takes."""
    return LevelEncoding(level_code(scheme), row_length(tensor.shape))


def _refuses(scheme: LevelScheme, tensor: TensorInfo) -> str | None:
    columns = row_length(tensor.shape)
    if columns > RUN_VALUES:  # a row is searched at once
        return f"rows of {columns:,} values are longer than the {RUN_VALUES:,} of {scheme.name}"
    return smaller(planned(scheme, tensor), tensor, scheme.name)


def _encoder(model: Model, tensor: TensorInfo, scheme: LevelScheme, facts: Facts) -> Encoder:
    code = planned(scheme, tensor)
    mean_square, gain = facts.mean_square(code.row_length), 0.0
    if facts.tables and scheme.table is None:
        levels, gain = fitted_code(model, tensor, code.code, mean_square)
        code = replace(code, code=levels)
    return LevelEncoder(model, tensor, code, mean_square, facts.rounder, gain)


def _has_steps(code: LevelCode) -> bool:
    """Whether codes of these bits and blocks can have such steps."""
    steps = code.step_bits, code.shift
    if steps == PLACED_STEPS:
        return code.bits == 2 and code.block == 16
    return steps in {steps_of(code.bits, variant) for variant in ("", SHIFTED)}


def _parse(fields: HeaderFields) -> Encoding:
    levels = fields.field(fields.described, "levels", list)
    code = LevelCode(
        fields.integer("bits"),
        fields.integer("block"),
        fields.integer("scale_bits"),
        fields.integer("shift"),
        tuple(levels),
    )
    columns = fields.integer("row_length")
    if any(not isinstance(n, int) or isinstance(n, bool) for n in levels):
        fields.refuse(10, "a level is not an integer")
    if (
        code.bits not in LEVELS
        or code.block not in LEVEL_BLOCKS
        or not _has_steps(code)
        or len(levels) != 1 << code.bits
        or any(low >= high for low, high in pairwise(levels))
        or not -127 <= levels[0] < 0 < levels[-1] <= 127 - code.shifts[-1]
        or not DTYPES[fields.source_dtype].floating
    ):
        fields.impossible("encoding of levels")
    fields.check_row_length(columns)
    return LevelEncoding(code, columns)


CODEC: Codec[LevelScheme] = Codec(
    *("levels", planned, _refuses, _encoder, _parse), uncompensated=lambda scheme, tensor: None
)
