#!/usr/bin/env python3
"""Independent reader and checker of `.qblk` files, version 1.x: standard library only.

    python reader.py FILE [--values]

Written from SPEC.md and ../schemes/SPEC.md alone and laid out in the order of SPEC.md.
Valid file: exit 0 and one JSON object on stdout. Refused file: exit 1 and
{"rule", "message", "tensor"} on stdout and stderr. Unreadable file or wrong usage: exit 2.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
import stat
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NoReturn

# "Json" is whatever json.JSONDecoder gives; every use is behind an explicit type check.
Json = Any


class Refusal(Exception):
    """The file breaks a rule of SPEC.md."""

    def __init__(self, rule: int, message: str, tensor: str | None = None) -> None:
        super().__init__(message)
        self.rule = f"QBLK-{rule:03d}"
        self.message = message
        self.tensor = tensor


def refuse(rule: int, message: str, tensor: str | None = None) -> NoReturn:
    raise Refusal(rule, message, tensor)


# ---------------------------------------------------------------- 1. The file as a whole

MAGIC = bytes.fromhex("89 51 42 4C 4B 0D 0A 0A")
PREAMBLE = 64
MAX_HEADER = 67_108_864
CHUNK = 1 << 20


def align64(n: int) -> int:
    return (n + 63) // 64 * 64


def read_preamble(file: memoryview) -> tuple[int, bytes, int]:
    """QBLK-001 to 006. Returns minor version, header and payload_offset."""
    if len(file) < PREAMBLE or file[:8] != MAGIC:
        refuse(1, "not a qblk file: magic missing or shorter than 64 bytes")
    major, minor, reserved, header_length, payload_offset, file_length = struct.unpack_from(
        "<BBHIQQ", file, 8
    )
    if major != 1:
        refuse(2, f"major version {major} is not known")
    if reserved != 0:
        refuse(3, "reserved bytes are not 0")
    if file_length != len(file):
        refuse(4, f"file_length says {file_length}, the file has {len(file)} bytes")
    if not 2 <= header_length <= MAX_HEADER:
        refuse(5, f"header_length {header_length} is out of range")
    if payload_offset % 64 or not PREAMBLE + header_length <= payload_offset <= file_length:
        refuse(5, f"payload_offset {payload_offset} is misplaced")
    header = bytes(file[PREAMBLE : PREAMBLE + header_length])
    if hashlib.sha256(bytes(file[:32]) + header).digest() != file[32:64]:
        refuse(6, "header_sha256 does not match")
    return minor, header, payload_offset


def pieces(part: memoryview, size: int) -> Iterator[bytes]:
    for at in range(0, len(part), size):
        yield part[at : at + size].tobytes()


def all_zero(part: memoryview) -> bool:
    return not any(piece.strip(b"\0") for piece in pieces(part, CHUNK))


# ---------------------------------------------------------------- 2. The header

MAX_DEPTH = 16
MAX_INTEGER = 2**53 - 1
MAX_TENSORS = 1_000_000
MAX_FILES = 10_000
# A string, or the rest of the text when it is not closed: linear in any case.
STRING = re.compile(r'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
# An escape; group 1 is a surrogate that is not half of a pair.
ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]|(u[dD][89a-fA-F])|.)", re.DOTALL)


def parse_header(raw: bytes) -> dict[str, Json]:
    """QBLK-008 and 009. Nesting is judged on the text, before anything recursive sees it."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as fault:
        refuse(8, f"header is not UTF-8: {fault.reason} at byte {fault.start}")
    skeleton = STRING.sub('""', text)
    stray = re.search(r"[^\x21-\x7e]", skeleton)
    if stray:
        refuse(8, f"white space or a stray character outside strings: {stray.group()!a}")
    if not skeleton.startswith("{"):
        refuse(8, "header is not a JSON object")
    depth = 0
    for bracket in re.finditer(r"[\[\]{}]", skeleton):
        depth += 1 if bracket.group() in "[{" else -1
        if depth > MAX_DEPTH:
            refuse(8, f"header is nested deeper than {MAX_DEPTH}")
    del skeleton
    repeated: list[str] = []

    def take_pairs(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        for (left, _), (right, _) in pairwise(pairs):
            if left > right:
                refuse(8, f"keys are not sorted: {left[:50]!a} before {right[:50]!a}")
            if left == right:
                repeated.append(left)
        return dict(pairs)

    def take_integer(digits: str) -> int:
        if len(digits) > 17 or abs(int(digits)) > MAX_INTEGER:
            refuse(8, f"integer outside +-(2^53 - 1): {digits[:20]}")
        return int(digits)

    def take_constant(word: str) -> NoReturn:
        refuse(8, f"{word} is not JSON")

    decoder = json.JSONDecoder(
        object_pairs_hook=take_pairs, parse_int=take_integer, parse_constant=take_constant
    )
    try:
        header = decoder.decode(text)
    except (ValueError, RecursionError) as fault:
        refuse(8, f"header is not JSON: {str(fault)[:100]}")
    if any(escape.group(1) for escape in ESCAPE.finditer(text)):
        refuse(8, "lone surrogate in a string")
    if repeated:
        refuse(9, f"key occurs twice: {repeated[0][:50]!a}")
    if type(header) is not dict:
        refuse(8, "header is not a JSON object")
    return header


def canonical(value: Json) -> bytes:
    """Canonical JSON of QBLK-008, of objects without floating numbers (for QBLK-024)."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text.encode("utf-8")


def need(
    holder: dict[str, Json], key: str, kind: type, where: str, tensor: str | None = None
) -> Json:
    """QBLK-010: the key is there and has exactly this JSON type (true is not an integer)."""
    if key not in holder:
        refuse(10, f"{where} lacks {key!r}", tensor)
    value = holder[key]
    if kind is float:
        if type(value) not in (int, float):
            refuse(10, f"{key!r} of {where} is not a number", tensor)
    elif type(value) is not kind:
        refuse(10, f"{key!r} of {where} is not of type {kind.__name__}", tensor)
    return value


def check_top(header: dict[str, Json]) -> None:
    """QBLK-010 (top-level keys, then limits) and 011."""
    files = need(header, "files", list, "header")
    for value in need(header, "metadata", dict, "header").values():
        if type(value) is not str:
            refuse(10, "a value of 'metadata' is not a string")
    need(header, "provenance", dict, "header")
    features = need(header, "required_features", list, "header")
    if not all(type(feature) is str for feature in features):
        refuse(10, "'required_features' is not an array of strings")
    tensors = need(header, "tensors", list, "header")
    if len(tensors) > MAX_TENSORS or len(files) > MAX_FILES:
        refuse(10, f"too many tensors ({len(tensors)}) or files ({len(files)})")
    for feature in features:
        if feature not in (NEWER, CODEBOOK, LEVELS):
            refuse(11, f"required feature is not known: {feature[:200]!a}")


# ---------------------------------------------------------------- 3. A tensor

# Section 3.1: bits of a value
DTYPES = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "I64": 64, "I32": 32,
    "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip
NEWER = "dtypes-1.1"  # the feature that has these besides
NEWER_DTYPES = {
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "C64": 64,
}  # fmt: skip
CODEBOOK = "codebook-1.2"  # the features that have the encodings of these kinds
LEVELS = "levels-1.3"
FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
CAST_TO = ("F32", "F16", "BF16")
RAW_KEYS: dict[str, type] = {"dtype": str, "kind": str}
AFFINE_KEYS: dict[str, type] = {
    "bits": int, "granularity": str, "kind": str, "row_length": int, "scale_dtype": str,
    "symmetric": bool,
}  # fmt: skip
CODEBOOK_KEYS: dict[str, type] = {"block": int, "kind": str, "scale_dtype": str, "table": str}
LEVELS_KEYS: dict[str, type] = {
    "bits": int, "block": int, "kind": str, "levels": list, "row_length": int, "scale_bits": int,
    "shift": int,
}  # fmt: skip
SEGMENT_KEYS: dict[str, type] = {"kind": str, "offset": int, "size": int}
ACTIVATION_KEYS: dict[str, type] = {
    "observer": str, "samples": int, "scale": float, "zero_point": int,
}  # fmt: skip


@dataclass(frozen=True)
class Segment:
    kind: str
    offset: int
    size: int


@dataclass(frozen=True)
class Affine:
    """Section 3.2: R rows of c values stored as C codes, K scales of one per `group` values."""

    bits: int
    symmetric: bool
    scale_dtype: str
    c: int
    rows: int
    stored: int  # C
    group: int  # values of a row that share a scale
    per_tensor: bool

    @property
    def scales(self) -> int:
        return 1 if self.per_tensor else self.rows * -(-self.c // self.group)

    def sizes(self) -> list[tuple[str, int]]:
        """The tables of section 4."""
        k = self.scales
        parts = [
            ("codes", self.rows * self.stored * self.bits // 8),
            ("scales", k * DTYPES[self.scale_dtype] // 8),
        ]
        if not self.symmetric:
            packed = 4 * (self.bits + 2) * -(-k // 32)
            parts.append(("zero_points", k if self.bits == 8 else packed))
        return parts


@dataclass(frozen=True)
class Codebook:
    """Section 3.2: N values in blocks of n, over the flattened tensor."""

    table: str
    block: int
    double: bool  # scales are codes in turn
    count: int  # N

    def sizes(self) -> list[tuple[str, int]]:
        """The tables of section 4."""
        codes, k = -(-self.count // 2), -(-self.count // self.block)
        if not self.double:
            return [("codes", codes), ("scales", 4 * k)]
        wide = 4 * -(-k // 256)
        return [("codes", codes), ("scales", k), ("scale_scales", wide), ("scale_offset", 4)]


@dataclass(frozen=True)
class Levels:
    """Section 3.2: R rows of c values stored as C codes, a step for every n values of a row."""

    bits: int
    block: int  # n
    levels: list[int]
    scale_bits: int
    shift: int
    c: int
    rows: int

    @property
    def stored(self) -> int:  # C
        return -(-self.c // 32) * 32

    @property
    def width(self) -> int:
        return self.scale_bits + {0: 0, 4: 1, 8: 4}[self.shift]

    @property
    def steps(self) -> int:  # K
        return self.rows * -(-self.c // self.block)

    def sizes(self) -> list[tuple[str, int]]:
        """The tables of section 4."""
        return [
            ("codes", self.rows * self.stored * self.bits // 8),
            ("scales", 4 * self.width * -(-self.steps // 32)),
            ("row_scales", 2 * self.rows),
        ]


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: list[int]
    source_dtype: str
    encoding: dict[str, Json]  # just the keys of section 3.2
    packed: Affine | Codebook | Levels | None
    segments: list[Segment]
    sha256: str


@dataclass(frozen=True)
class Companion:
    name: str
    segment: Segment
    sha256: str


def take_segments(entry: dict[str, Json], where: str, tensor: str | None) -> list[Segment]:
    """QBLK-010 for an array of segments."""
    segments = []
    for item in need(entry, "segments", list, where, tensor):
        if type(item) is not dict:
            refuse(10, f"a segment of {where} is not an object", tensor)
        values = [need(item, key, kind, "a segment", tensor) for key, kind in SEGMENT_KEYS.items()]
        segments.append(Segment(*values))
    return segments


def read_tensor(
    entry: Json, seen: set[str], dtypes: dict[str, int], kinds: dict[str, dict[str, type]]
) -> Tensor:
    """QBLK-010, 012, 013, 014, 015, 016, 017 of one tensor, in the order of section 6."""
    if type(entry) is not dict:
        refuse(10, "a tensor is not an object")
    name: str = need(entry, "name", str, "tensor")
    t = name if len(name) <= 1024 else None
    shape: list[int] = need(entry, "shape", list, "tensor", t)
    if not all(type(dim) is int for dim in shape):
        refuse(10, "a dimension is not an integer", t)
    source: str = need(entry, "source_dtype", str, "tensor", t)
    given: dict[str, Json] = need(entry, "encoding", dict, "tensor", t)
    kind: str = need(given, "kind", str, "encoding", t)
    known = kinds.get(kind, {})
    if kind == "affine" and "block" in given:
        known = {**known, "block": int}
    encoding = {k: need(given, k, form, "encoding", t) for k, form in sorted(known.items())}
    if not all(type(level) is int for level in encoding.get("levels", [])):
        refuse(10, "a level is not an integer", t)
    segments = take_segments(entry, "tensor", t)
    sha256: str = need(entry, "sha256", str, "tensor", t)
    for optional in ("decision", "error", "activation"):
        if optional in entry:
            need(entry, optional, dict, "tensor", t)
    activation: dict[str, Json] | None = entry.get("activation")
    if activation is not None:
        for key, form in ACTIVATION_KEYS.items():
            need(activation, key, form, "activation", t)

    if not 1 <= len(name.encode("utf-8")) <= 1024 or "\0" in name:
        refuse(12, "tensor name is empty, longer than 1,024 bytes or holds U+0000", t)
    if name in seen:
        refuse(12, "tensor name is not unique", t)
    seen.add(name)

    if len(shape) > 16 or not all(0 <= dim <= 2**48 for dim in shape):
        refuse(13, "more than 16 dimensions or a dimension out of range", t)
    if math.prod(dim or 1 for dim in shape) > MAX_INTEGER:
        refuse(13, "product of the dimensions exceeds 2^53 - 1", t)
    count = math.prod(shape)

    check_encoding(source, encoding, kind, dtypes, kinds, t)
    packed: Affine | Codebook | Levels | None = None
    expected: list[tuple[str, int]]
    bits = 0
    if kind == "raw":
        bits = count * dtypes[encoding["dtype"]]
        expected = [("data", bits // 8)]
    else:
        if kind == "affine":
            packed = read_affine(encoding, shape, count, t)
        elif kind == "levels":
            packed = read_levels(encoding, shape, count, t)
        else:
            packed = read_codebook(encoding, count, t)
        expected = packed.sizes()
    if activation is not None:
        check_activation(activation, t)
    if bits % 8:
        refuse(17, f"{count} values of {source} do not end on a byte", t)
    if [(s.kind, s.size) for s in segments] != expected:
        refuse(17, f"segments are not (kind, size) {expected}", t)
    return Tensor(name, shape, source, encoding, packed, segments, sha256)


def check_encoding(
    source: str,
    encoding: dict[str, Json],
    kind: str,
    dtypes: dict[str, int],
    kinds: dict[str, dict[str, type]],
    t: str | None,
) -> None:
    """QBLK-014: section 3.2."""
    if source not in dtypes:
        refuse(14, f"source_dtype is not known: {source[:50]!a}", t)
    if kind not in kinds:
        refuse(14, f"encoding is not known: {kind[:50]!a}", t)
    if kind == "raw":
        dtype = encoding["dtype"]
        if dtype not in dtypes:
            refuse(14, f"dtype is not known: {dtype[:50]!a}", t)
        if dtype != source and not (source in FLOATING and dtype in CAST_TO):
            refuse(14, f"{source} cannot be stored as {dtype}", t)
    elif kind == "affine":
        blocks = encoding["granularity"] == "block"
        if encoding["bits"] not in (2, 3, 4, 5, 6, 8):
            refuse(14, f"bits {encoding['bits']} is not defined", t)
        if encoding["granularity"] not in ("tensor", "channel", "block"):
            refuse(14, "granularity is not defined", t)
        if blocks != ("block" in encoding):
            refuse(14, "'block' goes with granularity block, and only with it", t)
        if blocks and encoding["block"] not in (16, 32, 64, 128, 256):
            refuse(14, f"block {encoding['block']} is not defined", t)
        if encoding["scale_dtype"] not in (("F16", "BF16", "F32") if blocks else ("F32",)):
            refuse(14, "scale_dtype does not go with the granularity", t)
        if source not in FLOATING:
            refuse(14, f"an affine tensor cannot come from {source}", t)
    elif kind == "levels":
        check_levels(source, encoding, t)
    else:
        if encoding["table"] not in TABLES:
            refuse(14, f"table is not defined: {encoding['table'][:50]!a}", t)
        if encoding["block"] not in (32, 64, 128, 256):
            refuse(14, f"block {encoding['block']} is not defined", t)
        if encoding["scale_dtype"] not in ("F32", "U8"):
            refuse(14, "scale_dtype is not defined for codebooks", t)
        if source not in FLOATING:
            refuse(14, f"a codebook tensor cannot come from {source}", t)


def check_levels(source: str, encoding: dict[str, Json], t: str | None) -> None:
    """QBLK-014: levels of section 3.2."""
    table: list[int] = encoding["levels"]
    if encoding["bits"] not in (2, 3, 4, 5, 6):
        refuse(14, f"bits {encoding['bits']} is not defined for levels", t)
    if encoding["block"] not in (16, 32):
        refuse(14, f"block {encoding['block']} is not defined for levels", t)
    allowed = [(6, 0)] if encoding["bits"] > 4 else [(5, 0), (6, 4)]
    if encoding["bits"] == 2 and encoding["block"] == 16:
        allowed.append((4, 8))
    if (encoding["scale_bits"], encoding["shift"]) not in allowed:
        refuse(14, "scale_bits and shift do not go together", t)
    if len(table) != 1 << encoding["bits"]:
        refuse(14, f"{len(table)} levels", t)
    if not all(low < high for low, high in pairwise(table)):
        refuse(14, "levels do not ascend", t)
    furthest = {0: 0, 4: 4, 8: 120}[encoding["shift"]]
    if not (-127 <= table[0] < 0 < table[-1] <= 127 - furthest):
        refuse(14, f"levels from {table[0]} to {table[-1]}", t)
    if source not in FLOATING:
        refuse(14, f"a tensor of levels cannot come from {source}", t)


def read_affine(encoding: dict[str, Json], shape: list[int], count: int, t: str | None) -> Affine:
    """QBLK-015, and the geometry of section 3.2."""
    c, bits, n = encoding["row_length"], encoding["bits"], encoding.get("block")
    trailing = [math.prod(shape[at:]) for at in range(len(shape))] or [1]
    if count == 0 or c not in trailing:
        refuse(15, f"tensor is empty or row_length {c} is no product of trailing dimensions", t)
    unit = (n or 1) if bits == 8 else max(n or 32, 32)
    stored = -(-c // unit) * unit
    return Affine(
        bits=bits, symmetric=encoding["symmetric"], scale_dtype=encoding["scale_dtype"], c=c,
        rows=count // c, stored=stored, group=n or c,
        per_tensor=encoding["granularity"] == "tensor",
    )  # fmt: skip


def read_levels(encoding: dict[str, Json], shape: list[int], count: int, t: str | None) -> Levels:
    """QBLK-015, and the geometry of section 3.2."""
    c = encoding["row_length"]
    trailing = [math.prod(shape[at:]) for at in range(len(shape))] or [1]
    if count == 0 or c not in trailing:
        refuse(15, f"tensor is empty or row_length {c} is no product of trailing dimensions", t)
    return Levels(
        *(encoding["bits"], encoding["block"], encoding["levels"], encoding["scale_bits"]),
        *(encoding["shift"], c, count // c),
    )


def read_codebook(encoding: dict[str, Json], count: int, t: str | None) -> Codebook:
    """QBLK-015."""
    if count == 0:
        refuse(15, "tensor is empty", t)
    return Codebook(encoding["table"], encoding["block"], encoding["scale_dtype"] == "U8", count)


def check_activation(activation: dict[str, Json], t: str | None) -> None:
    """QBLK-016. (A decimal passes through binary64 on its way to binary32.)"""
    try:
        (scale,) = struct.unpack("<f", struct.pack("<f", activation["scale"]))
    except OverflowError:
        scale = math.inf
    if not 0 < scale < math.inf:
        refuse(16, "activation.scale is not a positive finite binary32", t)
    if not -128 <= activation["zero_point"] <= 127:
        refuse(16, "activation.zero_point is not in -128..127", t)


# ---------------------------------------------------------------- 4. Segments


def check_places(owned: list[tuple[Segment, str | None]], payload: int) -> None:
    """QBLK-018 over all segments."""
    end = 0
    for number, (segment, t) in enumerate(owned):
        if segment.offset != (align64(end) if number else 0):
            refuse(18, f"segment {segment.kind!r} begins at {segment.offset}", t)
        end = segment.offset + segment.size
    if end != payload:
        refuse(18, f"the segments end at {end}, the payload has {payload} bytes")


# schemes/SPEC.md section 4: planes of p bits from the largest power of two down. For a plane,
# table k takes bits p*k.. of each byte and shifts them to where the plane's bits belong.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1)}


def plane_tables(p: int, shift: int) -> list[bytes]:
    return [
        bytes(((byte >> p * k) & ((1 << p) - 1)) << shift for byte in range(256))
        for k in range(8 // p)
    ]


UNPACKERS: dict[int, list[tuple[int, list[bytes]]]] = {
    w: [(p, plane_tables(p, sum(planes[:at]))) for at, p in enumerate(planes)]
    for w, planes in PLANES.items()
}


def unpack(packed: bytes, width: int) -> bytes:
    """Whole groups of 32 values, 4 * width bytes each, to one byte a value."""
    if width == 8:  # one plane of 32 bytes: value j is byte j
        return packed
    groups = []
    at = 0
    while at < len(packed):
        group = 0
        for p, tables in UNPACKERS[width]:
            plane = packed[at : at + 4 * p]
            values = b"".join([plane.translate(table) for table in tables])
            group |= int.from_bytes(values, "little")
            at += 4 * p
        groups.append(group.to_bytes(32, "little"))
    return b"".join(groups)


def signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def scale_values(part: memoryview, dtype: str) -> Iterator[float]:
    for piece in pieces(part, 1 << 16):
        if dtype == "BF16":  # the upper half of a binary32
            wide = b"".join([b"\0\0" + piece[at : at + 2] for at in range(0, len(piece), 2)])
            yield from struct.unpack(f"<{len(wide) // 4}f", wide)
        elif dtype == "F16":
            yield from struct.unpack(f"<{len(piece) // 2}e", piece)
        else:
            yield from struct.unpack(f"<{len(piece) // 4}f", piece)


def zero_point_values(part: memoryview, affine: Affine) -> Iterator[int]:
    """All stored values: the K zero points, then the unused ones of the last group."""
    if affine.bits == 8:
        for piece in pieces(part, 1 << 16):
            yield from map(signed, piece)
    else:
        width = affine.bits + 2
        for piece in pieces(part, 4 * width * 1024):
            yield from unpack(piece, width)


def check_scales(tensor: Tensor, affine: Affine, parts: list[memoryview]) -> None:
    """QBLK-020."""
    may_be_negative = affine.symmetric and affine.bits < 8
    for number, scale in enumerate(scale_values(parts[1], affine.scale_dtype)):
        if not math.isfinite(scale):
            refuse(20, f"scale {number} is not finite", tensor.name)
        if not may_be_negative and math.copysign(1.0, scale) < 0:
            refuse(20, f"scale {number} is negative", tensor.name)


def check_zero_points(tensor: Tensor, affine: Affine, parts: list[memoryview], rule: int) -> None:
    """QBLK-021 for the K zero points, QBLK-023 for the unused ones of the last group."""
    if affine.symmetric or affine.bits == 8:
        return
    top = 4 * ((1 << affine.bits) - 1)
    for number, z in enumerate(zero_point_values(parts[2], affine)):
        if number < affine.scales:
            if rule == 21 and z > top:
                refuse(21, f"zero point {number} is {z}, above {top}", tensor.name)
        elif rule == 23 and z:
            refuse(23, f"unused value {number} of the zero points is not 0", tensor.name)


def check_minus_128(tensor: Tensor, affine: Affine, parts: list[memoryview]) -> None:
    """QBLK-022."""
    if affine.symmetric and affine.bits == 8:
        for piece in pieces(parts[0], CHUNK):
            if 0x80 in piece:
                refuse(22, "code -128 in a symmetric 8-bit tensor", tensor.name)


def store(values: list[float]) -> bytes:
    """Round to binary32, ties to even; what is too large becomes an infinity."""
    try:
        return struct.pack(f"<{len(values)}f", *values)
    except OverflowError:
        if len(values) == 1:
            return struct.pack("<f", math.copysign(math.inf, values[0]))
        return b"".join([store([value]) for value in values])


SPAN = 8192  # codes unpacked at a time: a multiple of every block and of 32


def decode(tensor: Tensor, affine: Affine, parts: list[memoryview]) -> Iterator[bytes]:
    """The values (schemes/SPEC.md section 2) as binary32, with QBLK-023 for the codes' padding.

    Code minus zero point times scale is exact in binary64 (at most 11 + 24 bits), so rounding
    once in store() gives the one binary32 multiplication that the specification asks for.
    """
    bits, c = affine.bits, affine.c
    base = [signed(u) if bits == 8 else u - (1 << (bits - 1)) for u in range(1 << bits)]
    scales = scale_values(parts[1], affine.scale_dtype)
    zero_points = iter(()) if affine.symmetric else zero_point_values(parts[2], affine)
    row_bytes = affine.stored * bits // 8
    scale = 0.0
    z = 0
    for row in range(affine.rows):
        for first in range(0, affine.stored, SPAN):
            last = min(first + SPAN, affine.stored)
            begin = row * row_bytes
            packed = parts[0][begin + first * bits // 8 : begin + last * bits // 8].tobytes()
            codes = unpack(packed, bits)
            real = max(0, min(c, last) - first)
            if codes[real:].strip(b"\0"):
                refuse(23, f"padding of row {row} is not 0", tensor.name)
            step = min(affine.group, SPAN)
            for at in range(0, real, step):
                if (first + at) % affine.group == 0 and not (affine.per_tensor and row):
                    scale = next(scales)
                    z = 0 if affine.symmetric else next(zero_points)
                some = codes[at : min(at + step, real)]
                if affine.symmetric:
                    yield store([base[u] * scale for u in some])
                elif bits == 8:
                    yield store([(base[q] - z) * scale for q in some])
                else:
                    yield store([(4 * u - z) / 4 * scale for u in some])


# schemes/SPEC.md section 10


def narrow(value: float) -> float:
    """Round to binary32."""
    (found,) = struct.unpack("<f", store([value]))
    return float(found)


TABLES = {
    name: struct.unpack(">16f", bytes.fromhex(text))
    for name, text in {
        "nf4": "bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000"
        "3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000",
        "fp4": "00000000 3baaaaab 3f2aaaab 3f800000 3eaaaaab 3f000000 3e2aaaab 3e800000"
        "80000000 bbaaaaab bf2aaaab bf800000 beaaaaab bf000000 be2aaaab be800000",
    }.items()
}


def dynamic_table() -> list[float]:
    """D: each line rounds once what it says, products and sums of binary64 being exact enough."""
    first = narrow(0.1)
    found = [0.0, 1.0]
    for i in range(7):
        c = 1 << i
        step = narrow(narrow(1 - first) / c)
        ends = [
            narrow(first + step * k) if 2 * k < c + 1 else narrow(1 - step * (c - k))
            for k in range(c + 1)
        ]
        for low, high in pairwise(ends):
            number = narrow(narrow(10.0 ** (i - 6)) * narrow(narrow(low + high) / 2))
            found += [number, -number]
    return sorted(found)


DYNAMIC = dynamic_table()


def check_codebook(tensor: Tensor, codebook: Codebook, parts: list[memoryview]) -> None:
    """QBLK-020 and QBLK-023."""
    for segment, part in zip(tensor.segments, parts, strict=True):
        if segment.kind == "codes" or (segment.kind == "scales" and codebook.double):
            continue
        for number, scale in enumerate(scale_values(part, "F32")):
            if not math.isfinite(scale):
                refuse(20, f"{segment.kind} {number} is not finite", tensor.name)
            if segment.kind != "scale_offset" and math.copysign(1.0, scale) < 0:
                refuse(20, f"{segment.kind} {number} is negative", tensor.name)
    if codebook.count % 2 and parts[0][-1] & 15:
        refuse(23, "the unused half of the last byte is not 0", tensor.name)


def codebook_scales(codebook: Codebook, parts: list[memoryview]) -> Iterator[float]:
    if not codebook.double:
        yield from scale_values(parts[1], "F32")
        return
    wide = list(scale_values(parts[2], "F32"))
    (offset,) = struct.unpack("<f", parts[3])
    at = 0
    for piece in pieces(parts[1], CHUNK):
        for code in piece:
            yield narrow(narrow(DYNAMIC[code] * wide[at // 256]) + offset)
            at += 1


def decode_codebook(codebook: Codebook, parts: list[memoryview]) -> Iterator[bytes]:
    """The values as binary32, a block at a time."""
    table, block = TABLES[codebook.table], codebook.block
    for number, scale in enumerate(codebook_scales(codebook, parts)):
        count = min(block, codebook.count - number * block)
        begin = number * block // 2
        pairs = parts[0][begin : begin + -(-count // 2)].tobytes()
        codes = [code for pair in pairs for code in (pair >> 4, pair & 15)]
        yield store([table[code] * scale for code in codes[:count]])


# schemes/SPEC.md section 11


def check_row_scales(tensor: Tensor, parts: list[memoryview]) -> None:
    """QBLK-020."""
    for number, scale in enumerate(scale_values(parts[2], "F16")):
        if not math.isfinite(scale) or math.copysign(1.0, scale) < 0:
            refuse(20, f"row scale {number} is negative or not finite", tensor.name)


def step_values(levels: Levels, parts: list[memoryview]) -> Iterator[int]:
    """All stored values: those of the K steps, then the unused ones of the last group."""
    for piece in pieces(parts[1], 4 * levels.width * 1024):
        yield from unpack(piece, levels.width)


def check_steps(tensor: Tensor, levels: Levels, parts: list[memoryview]) -> None:
    """QBLK-023 for the scales."""
    for number, value in enumerate(step_values(levels, parts)):
        if number >= levels.steps and value:
            refuse(23, f"unused value {number} of the scales is not 0", tensor.name)


def decode_levels(tensor: Tensor, levels: Levels, parts: list[memoryview]) -> Iterator[bytes]:
    """The values as binary32, with QBLK-023 for the codes' padding; every product is exact."""
    c, block, steps = levels.c, levels.block, 1 << levels.scale_bits
    lowest = -(steps // 2) if levels.scale_bits > 4 else 0
    values = step_values(levels, parts)
    row_bytes = levels.stored * levels.bits // 8
    for row, d in enumerate(scale_values(parts[2], "F16")):
        unit = d * 2.0 ** -(levels.scale_bits + 6)
        for first in range(0, levels.stored, SPAN):
            last = min(first + SPAN, levels.stored)
            begin = row * row_bytes
            bits = levels.bits
            packed = parts[0][begin + first * bits // 8 : begin + last * bits // 8].tobytes()
            codes = unpack(packed, bits)
            real = max(0, min(c, last) - first)
            if codes[real:].strip(b"\0"):
                refuse(23, f"padding of row {row} is not 0", tensor.name)
            for at in range(0, real, block):
                stored = next(values)
                scale = unit * (stored % steps + lowest)
                shift = stored // steps * levels.shift
                some = codes[at : min(at + block, real)]
                yield store([scale * (levels.levels[u] + shift) for u in some])


# Section 4.1


def check_digest(tensor: Tensor, parts: list[memoryview]) -> None:
    """QBLK-024."""
    bound = {
        "encoding": tensor.encoding,
        "name": tensor.name,
        "shape": tensor.shape,
        "source_dtype": tensor.source_dtype,
    }
    digest = hashlib.sha256(canonical(bound) + b"\n")
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    if digest.hexdigest() != tensor.sha256:
        refuse(24, "sha256 of the tensor does not match", tensor.name)


# ---------------------------------------------------------------- 5. Companion files


def read_companion(entry: Json, seen: set[str]) -> Companion:
    """QBLK-010, 025, 017 of one companion file."""
    if type(entry) is not dict:
        refuse(10, "a file is not an object")
    name: str = need(entry, "name", str, "file")
    segments = take_segments(entry, "file", None)
    sha256: str = need(entry, "sha256", str, "file")
    shown = ascii(name[:255])
    if not 1 <= len(name.encode("utf-8")) <= 255 or name in (".", ".."):
        refuse(25, f"file name is not allowed: {shown}")
    if re.search(r"[/\\:\x00-\x1f]", name):
        refuse(25, f"file name holds a forbidden character: {shown}")
    if name in seen:
        refuse(25, f"file name is not unique: {shown}")
    seen.add(name)
    if len(segments) != 1 or segments[0].kind != "data":
        refuse(25, f"file {shown} does not have just one segment of kind data")
    if segments[0].size < 0:
        refuse(17, f"file {shown} has a negative size")
    return Companion(name, segments[0], sha256)


# ---------------------------------------------------------------- 6. Order of refusal


def check(file: memoryview, with_values: bool) -> dict[str, Json]:
    """Everything, in the order of section 6; returns what is printed for a valid file."""
    minor, raw, payload_offset = read_preamble(file)
    header = parse_header(raw)
    check_top(header)
    tensor_names: set[str] = set()
    dtypes = DTYPES | NEWER_DTYPES if NEWER in header["required_features"] else DTYPES
    kinds = {"raw": RAW_KEYS, "affine": AFFINE_KEYS}
    if CODEBOOK in header["required_features"]:
        kinds["codebook"] = CODEBOOK_KEYS
    if LEVELS in header["required_features"]:
        kinds["levels"] = LEVELS_KEYS
    tensors = [read_tensor(entry, tensor_names, dtypes, kinds) for entry in header["tensors"]]
    file_names: set[str] = set()
    companions = [read_companion(entry, file_names) for entry in header["files"]]
    owned: list[tuple[Segment, str | None]] = [(s, t.name) for t in tensors for s in t.segments]
    owned += [(companion.segment, None) for companion in companions]
    payload = file[payload_offset:]
    check_places(owned, len(payload))

    if not all_zero(file[PREAMBLE + len(raw) : payload_offset]):
        refuse(7, "bytes between header and payload are not 0")
    end = 0
    for segment, t in owned:
        if not all_zero(payload[end : segment.offset]):
            refuse(19, f"bytes before segment {segment.kind!r} are not 0", t)
        end = segment.offset + segment.size

    told = []
    for tensor in tensors:
        parts = [payload[s.offset : s.offset + s.size] for s in tensor.segments]
        check_digest(tensor, parts)
        stream = pieces(parts[0], CHUNK)
        if isinstance(tensor.packed, Affine):
            check_scales(tensor, tensor.packed, parts)
            check_zero_points(tensor, tensor.packed, parts, 21)
            check_minus_128(tensor, tensor.packed, parts)
            check_zero_points(tensor, tensor.packed, parts, 23)
            stream = decode(tensor, tensor.packed, parts)
        elif isinstance(tensor.packed, Levels):
            check_row_scales(tensor, parts)
            check_steps(tensor, tensor.packed, parts)
            stream = decode_levels(tensor, tensor.packed, parts)
        elif tensor.packed is not None:
            check_codebook(tensor, tensor.packed, parts)
            stream = decode_codebook(tensor.packed, parts)
        digest = hashlib.sha256()
        shown = []
        for piece in stream:
            digest.update(piece)
            if with_values:
                shown.append(piece.hex())
        line: dict[str, Json] = {
            "name": tensor.name,
            "shape": tensor.shape,
            "source_dtype": tensor.source_dtype,
            "encoding": tensor.encoding,
            "values_sha256": digest.hexdigest(),
        }
        if with_values:
            line["values_hex"] = "".join(shown)
        told.append(line)
    for companion in companions:  # QBLK-026
        s = companion.segment
        if hashlib.sha256(payload[s.offset : s.offset + s.size]).hexdigest() != companion.sha256:
            refuse(26, f"sha256 of file {companion.name!a} does not match")
    return {
        "format": "qblk",
        "version": [1, minor],
        "metadata": header["metadata"],
        "tensors": told,
        "files": [{"name": f.name, "size": f.segment.size, "sha256": f.sha256} for f in companions],
    }


def main(arguments: list[str]) -> int:
    with_values = "--values" in arguments
    paths = [argument for argument in arguments if argument != "--values"]
    if len(paths) != 1 or paths[0].startswith("-"):
        print("usage: reader.py FILE [--values]", file=sys.stderr)
        return 2
    try:
        status = os.stat(paths[0])
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer
            raise OSError("not a regular file")
        with open(paths[0], "rb") as stream:
            # A mapping is read page by page: no segment is ever copied as a whole.
            mapped = status.st_size > 0  # an empty file cannot be mapped
            whole = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if mapped else b""
    except (OSError, ValueError) as fault:
        print(f"reader.py: {paths[0]!a}: {fault}", file=sys.stderr)
        return 2
    try:
        result = check(memoryview(whole), with_values)
    except Refusal as refusal:
        text = json.dumps(
            {"rule": refusal.rule, "message": refusal.message, "tensor": refusal.tensor}
        )
        print(text)
        print(text, file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
