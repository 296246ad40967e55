#!/usr/bin/env python3
"""Make the test vectors of the `.qblk` format; standard library only.

    python regenerate.py           write them
    python regenerate.py --check   exit 1 if a committed file differs, is missing or is extra

Nothing of a reader or writer is used here. Codes, scales and zero points are byte literals
packed by hand, expected values are written out or follow from small code lists by the
formulas of schemes/SPEC.md section 2. The helpers only assemble: JSON, places, SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
MAGIC = bytes.fromhex("89 51 42 4c 4b 0d 0a 0a")
FILES: dict[str, bytes] = {}
VALID: list[tuple[str, str]] = []
INVALID: dict[str, dict[str, str]] = {}

# ---------------------------------------------------------------- assembling


def dumps(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return text.encode("utf-8")


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def hexa(text: str) -> bytes:
    """Bytes in hex; `00*13` repeats a byte."""
    parts = [part.partition("*") for part in text.split()]
    return b"".join(bytes.fromhex(one) * int(times or 1) for one, _, times in parts)


class Tensor:
    """A header entry, its segments and (for valid files) the expected bytes of its values."""

    def __init__(
        self,
        name: str,
        shape: list[int],
        source: str,
        encoding: dict[str, Any],
        segments: list[tuple[str, bytes]],
        values: bytes = b"",
        **more: Any,
    ) -> None:
        self.segments = segments
        self.values = values
        bound = {"encoding": encoding, "name": name, "shape": shape, "source_dtype": source}
        message = dumps(bound) + b"\n"
        for _, data in segments:
            message += hashlib.sha256(data).digest()
        self.entry = {**bound, "segments": [], "sha256": sha(message), **more}


class File:
    def __init__(self, name: str, data: bytes, kind: str = "data", **more: Any) -> None:
        self.name, self.data = name, data
        self.segments = [(kind, data)]
        self.entry: dict[str, Any] = {"name": name, "segments": [], "sha256": sha(data), **more}


def raw(name: str, shape: list[int], dtype: str, data: bytes, source: str = "") -> Tensor:
    encoding = {"dtype": dtype, "kind": "raw"}
    return Tensor(name, shape, source or dtype, encoding, [("data", data)], data)


def f32(values: Iterable[float]) -> bytes:
    out = b""
    for value in values:
        try:
            out += struct.pack("<f", value)
        except OverflowError:
            out += struct.pack("<f", math.copysign(math.inf, value))
    return out


def affine(
    name: str,
    shape: list[int],
    row: int,
    bits: int,
    per: str | int,
    codes: str,
    scales: str,
    zeros: str | None = None,
    values: Iterable[float] = (),
    *,
    scale_dtype: str = "",
    source: str = "F32",
    segments: list[tuple[str, bytes]] | None = None,
    encoding: dict[str, Any] | None = None,
    **more: Any,
) -> Tensor:
    given: dict[str, Any] = {
        "bits": bits,
        "granularity": "block" if isinstance(per, int) else per,
        "kind": "affine",
        "row_length": row,
        "scale_dtype": scale_dtype or ("F16" if isinstance(per, int) else "F32"),
        "symmetric": zeros is None,
    }
    if isinstance(per, int):
        given["block"] = per
    given.update(encoding or {})
    parts = [("codes", hexa(codes)), ("scales", hexa(scales))]
    if zeros is not None:
        parts.append(("zero_points", hexa(zeros)))
    return Tensor(name, shape, source, given, segments or parts, f32(values), **more)


def make(
    tensors: Iterable[Tensor] = (),
    files: Iterable[File] = (),
    *,
    metadata: dict[str, Any] | None = None,
    provenance: Any = None,
    features: Any = None,
    extra: dict[str, Any] | None = None,
    edit: Callable[[dict[str, Any]], Any] | None = None,  # the header, before it is written
    text: Callable[[bytes], bytes] | None = None,  # the header as written
    places: list[int] | None = None,  # offsets of all segments, instead of the right ones
    gap: int = 0,  # zeros before the payload, beyond the needed ones
    tail: bytes = b"",  # after the last segment
    fields: dict[str, int] | None = None,  # of the preamble
    magic: bytes = MAGIC,
    damage: Callable[[bytearray, int], Any] | None = None,  # the file, after all digests
) -> bytes:
    payload = bytearray()
    offsets = iter(places or [])
    owners: list[Tensor | File] = [*tensors, *files]
    for owner in owners:
        owner.entry["segments"] = []
        for kind, data in owner.segments:
            right = (len(payload) + 63) // 64 * 64
            at = next(offsets) if places else right
            owner.entry["segments"].append({"kind": kind, "offset": at, "size": len(data)})
            payload.extend(bytes(max(0, at + len(data) - len(payload))))
            payload[at : at + len(data)] = data
    payload += tail
    header = {
        "files": [owner.entry for owner in owners if isinstance(owner, File)],
        "metadata": metadata or {},
        "provenance": provenance or {},
        "required_features": features or [],
        "tensors": [owner.entry for owner in owners if isinstance(owner, Tensor)],
        **(extra or {}),
    }
    header = json.loads(dumps(header))
    if edit:
        edit(header)
    blob = dumps(header)
    if text:
        changed = text(blob)
        assert changed != blob
        blob = changed
    start = (64 + len(blob) + 63) // 64 * 64 + gap
    f = {
        "major": 1,
        "minor": 0,
        "reserved": 0,
        "header_length": len(blob),
        "payload_offset": start,
        "file_length": start + len(payload),
        **(fields or {}),
    }
    front = magic + struct.pack("<BBHIQQ", *f.values())
    front += hashlib.sha256(front + blob).digest()
    whole = bytearray(front + blob + bytes(start - 64 - len(blob)) + payload)
    if damage:
        damage(whole, start)
    return bytes(whole)


def valid(
    name: str,
    why: str,
    tensors: Iterable[Tensor] = (),
    files: Iterable[File] = (),
    *,
    metadata: dict[str, str] | None = None,
    **more: Any,
) -> None:
    tensors, files = list(tensors), list(files)
    expected = {
        "format": "qblk",
        "version": [1, more.get("fields", {}).get("minor", 0)],
        "metadata": dict(sorted((metadata or {}).items())),
        "tensors": [
            {
                "name": t.entry["name"],
                "shape": t.entry["shape"],
                "source_dtype": t.entry["source_dtype"],
                "encoding": dict(sorted(t.entry["encoding"].items())),
                "values_sha256": sha(t.values),
                "values_hex": t.values.hex(),
            }
            for t in tensors
        ],
        "files": [{"name": f.name, "size": len(f.data), "sha256": sha(f.data)} for f in files],
    }
    VALID.append((name, why))
    FILES[f"valid/{name}.qblk"] = make(tensors, files, metadata=metadata, **more)
    FILES[f"valid/{name}.json"] = json.dumps(expected).encode() + b"\n"


def invalid(rule: int, case: str, why: str, data: bytes) -> None:
    name = f"QBLK-{rule:03d}-{case}.qblk"
    INVALID[name] = {"rule": f"QBLK-{rule:03d}", "why": why}
    FILES[f"invalid/{name}"] = data


# ---------------------------------------------------------------- valid files

# A group of 32 codes as packed by hand, and what it holds.
GROUP: dict[int, tuple[str, list[int]]] = {
    2: ("00 55 aa ff 00 55 aa ff", [j % 4 for j in range(32)]),
    3: ("00 55 aa ff 00 55 aa ff aa aa aa aa", [j % 8 for j in range(32)]),
    4: ("00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff", [j % 16 for j in range(32)]),
    5: ("00 11 22 33 44 55 66 77 88 99 aa bb cc dd ee ff f0*4", list(range(32))),
    6: ("00 22 44 66 88 aa cc ee 00 22 44 66 88 aa cc ee e4*8", list(range(0, 64, 2))),
}
# Two rows of 3 codes, each padded to a group.
CHANNEL: dict[int, tuple[str, list[int]]] = {
    2: ("01 02 03 00*5  03 00 02 00*5", [1, 2, 3, 3, 0, 2]),
    3: ("01 02 03 00*5 00 01 01 00  00 00 03 00*5 01 00 00 00", [1, 6, 7, 4, 0, 3]),
    4: ("01 0e 0f 00*13  08 00 09 00*13", [1, 14, 15, 8, 0, 9]),
    5: (
        "01 0e 0f 00*13 00 01 01 00  00 00 05 00*13 01 00 01 00",
        [1, 30, 31, 16, 0, 21],
    ),
    6: (
        "01 0e 0f 00*13 00 03 03 00*5  00 00 05 00*13 02 00 02 00*5",
        [1, 62, 63, 32, 0, 37],
    ),
}
# Two rows of 19 codes, each padded to a group: blocks of 16 and of 3 (+ 13 codes of padding).
UP, DOWN = range(19), range(18, -1, -1)
BLOCK: dict[int, tuple[str, list[int]]] = {
    2: (
        "00 15 2a 0f 00 05 0a 0f  3f 2a 15 00 0f 0a 05 00",
        [j % 4 for j in UP] + [3 - j % 4 for j in UP],
    ),
    3: (
        "00 15 2a 0f 00 05 0a 0f 0a 0a 0a 0a  3f 2a 15 00 0f 0a 05 00 15 15 15 05",
        [j % 8 for j in UP] + [7 - j % 8 for j in UP],
    ),
    4: (
        "00 11 22 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f"
        " ff ee dd 0c 0b 0a 09 08 07 06 05 04 03 02 01 00",
        [j % 16 for j in UP] + [15 - j % 16 for j in UP],
    ),
    5: (
        "00 11 22 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f 10 10 10 00"
        " ff ee dd 0c 0b 0a 09 08 07 06 05 04 03 02 01 00 0f 0f 0f 0f",
        [*UP, *(31 - j for j in UP)],
    ),
    6: (
        "88 99 aa 0b 0c 0d 0e 0f 00 01 02 03 04 05 06 07 3e 3e 3e 0e 0e 0e 0e 0e"
        " 22 11 00 0f 0e 0d 0c 0b 0a 09 08 07 06 05 04 03 01 01 01 00 00 00 00 00",
        [j + 40 for j in UP] + [*DOWN],
    ),
}
# Zero points, packed by hand with 2 bits more than the codes: one, two and four of them.
ZEROS: dict[int, list[tuple[str, list[int]]]] = {
    2: [("06 00*15", [6]), ("0c 01 00*14", [12, 1]), ("00 04 05 0c 00*12", [0, 4, 5, 12])],
    3: [
        ("05 00*15 01 00*3", [21]),
        ("0c 03 00*14 01 00*3", [28, 3]),
        ("00 00 07 0c 00*12 00 01 00 01", [0, 16, 7, 28]),
    ],
    4: [
        ("05 00*15 01 00*7", [21]),
        ("0c 02 00*14 03 00*7", [60, 2]),
        ("00 00 07 0c 00*12 00 01 02 03 00*4", [0, 16, 39, 60]),
    ],
    5: [
        ("05 00*15 02 00*7 01 00*3", [101]),
        ("0c 02 00*14 03 00*7 01 00*3", [124, 2]),
        ("00 00 07 0c 00*12 00 01 00 03 00*4 00 00 01 01", [0, 16, 71, 124]),
    ],
    6: [
        ("c9 00*31", [201]),
        ("fc 02 00*30", [252, 2]),
        ("00 10 87 fc 00*28", [0, 16, 135, 252]),
    ],
}
SCALES = (
    ("00 00 00 3f", [0.5]),
    ("00 00 80 3e 00 00 00 40", [0.25, 2.0]),
    ("00 38 00 3c 00 34 00 40", [0.5, 1.0, 0.25, 2.0]),
)
OWNER = ([0] * 32, [0] * 3 + [1] * 3, [0] * 16 + [1] * 3 + [2] * 16 + [3] * 3)
PLACE: tuple[tuple[str, list[int], int, str | int], ...] = (
    ("by.tensor", [32], 32, "tensor"),
    ("by.channel", [2, 3], 3, "channel"),
    ("by.block", [2, 19], 19, 16),
)


def widths() -> None:
    what = "one tensor per tensor, channel and block of 16 (rows of 19: padding)"
    for bits in (2, 3, 4, 5, 6):
        half = 2 ** (bits - 1)
        sym, asym = [], []
        for i, (name, shape, row, per) in enumerate(PLACE):
            packed, codes = (GROUP, CHANNEL, BLOCK)[i][bits]
            shex, s = SCALES[i]
            zhex, z = ZEROS[bits][i]
            pairs = list(zip(codes, OWNER[i], strict=True))
            exact = [(u - half) * s[g] for u, g in pairs]
            sym.append(affine(name, shape, row, bits, per, packed, shex, None, exact))
            exact = [(4 * u - z[g]) / 4 * s[g] for u, g in pairs]
            asym.append(affine(name, shape, row, bits, per, packed, shex, zhex, exact))
        valid(f"affine-q{bits}-sym", f"symmetric {bits} bits, {what}", sym)
        valid(f"affine-q{bits}-asym", f"asymmetric {bits} bits, {what}", asym)
    rows = "01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f 10 11 12 13 00*13"
    rows += " ff fe fd fc fb fa f9 f8 f7 f6 f5 f4 f3 f2 f1 f0 ef ee ed 00*13"
    block = [*range(1, 20), *range(-1, -20, -1)]
    (tensor_s, _), (channel_s, _), (block_s, s) = SCALES
    valid(
        "affine-q8-sym",
        f"symmetric 8 bits, {what}",
        [
            affine(
                "by.tensor", [8], 8, 8, "tensor", "81 9c ff 00 01 64 7f 02", tensor_s, None,
                [-63.5, -50.0, -0.5, 0.0, 0.5, 50.0, 63.5, 1.0],
            ),
            affine(
                "by.channel", [2, 3], 3, 8, "channel", "01 fe 7f 81 00 05", channel_s, None,
                [0.25, -0.5, 31.75, -254.0, 0.0, 10.0],
            ),
            affine(
                "by.block", [2, 19], 19, 8, 16, rows, block_s, None,
                [q * s[g] for q, g in zip(block, OWNER[2], strict=True)],
            ),
        ],
    )  # fmt: skip
    z = [0, -1, 100, -128]
    valid(
        "affine-q8-asym",
        f"asymmetric 8 bits (code -128 allowed), {what}",
        [
            affine(
                "by.tensor", [8], 8, 8, "tensor", "80 9c ff 00 01 64 7f 02", tensor_s, "fb",
                [-61.5, -47.5, 2.0, 2.5, 3.0, 52.5, 66.0, 3.5],
            ),
            affine(
                "by.channel", [2, 3], 3, 8, "channel", "01 fe 7f 80 00 05", channel_s, "7f 80",
                [-31.5, -32.25, 0.0, 0.0, 256.0, 266.0],
            ),
            affine(
                "by.block", [2, 19], 19, 8, 16, rows, block_s, "00 ff 64 80",
                [(q - z[g]) * s[g] for q, g in zip(block, OWNER[2], strict=True)],
            ),
        ],
    )  # fmt: skip


NIBBLES = GROUP[4][0]
Q4 = [float(j % 16 - 8) for j in range(32)]


def small() -> Tensor:
    """A raw tensor to hang other things on."""
    return raw("t", [4], "U8", b"\x01\x02\x03\x04")


def q4(name: str = "w", **more: Any) -> Tensor:
    values = [k * 0.5 for k in Q4]
    return affine(name, [32], 32, 4, "tensor", NIBBLES, "00 00 00 3f", None, values, **more)


def q4_asym(name: str = "w", **more: Any) -> Tensor:
    zeros = "05 00*15 01 00*7"
    return affine(name, [32], 32, 4, "tensor", NIBBLES, "00 00 00 3f", zeros, (), **more)


def q8(codes: str = "01 02 03 04", scale: str = "00 00 00 3f") -> Tensor:
    return affine("w", [4], 4, 8, "tensor", codes, scale)


ACTIVATION = {"observer": "minmax", "samples": 64, "scale": 0.0236, "zero_point": -128}


def valid_files() -> None:
    valid("file-minimal", "no tensors, no files; ends at payload_offset")
    valid(
        "file-gap",
        "192 bytes of zeros more than needed before the payload (the header's reserve)",
        [small()],
        gap=192,
    )
    kept = [
        raw("F64", [1], "F64", hexa("00*6 f8 3f")),
        raw("F32", [2], "F32", hexa("00 00 c0 7f 01 00 80 ff")),
        raw("F16", [2], "F16", hexa("00 3c 01 7c")),
        raw("BF16", [2], "BF16", hexa("80 3f 81 7f")),
        raw("F8_E4M3", [3], "F8_E4M3", hexa("38 7f ff")),
        raw("F8_E5M2", [3], "F8_E5M2", hexa("3c 7c 7d")),
        raw("I64", [1], "I64", hexa("00*7 80")),
        raw("I32", [1], "I32", hexa("ff ff ff 7f")),
        raw("I16", [1], "I16", hexa("00 80")),
        raw("I8", [2], "I8", hexa("80 7f")),
        raw("U64", [1], "U64", hexa("ff*8")),
        raw("U32", [1], "U32", hexa("ff*4")),
        raw("U16", [1], "U16", hexa("01 00")),
        raw("U8", [5], "U8", hexa("00 01 02 fe ff")),
        raw("BOOL", [3], "BOOL", hexa("00 01 01")),
    ]
    valid("raw-dtypes-float", "one kept tensor of every floating dtype, NaNs bit for bit", kept[:6])
    valid("raw-dtypes-other", "one kept tensor of every other dtype", kept[6:])
    newer = [
        raw("F8_E8M0", [3], "F8_E8M0", hexa("00 7f ff")),
        raw("F8_E4M3FNUZ", [3], "F8_E4M3FNUZ", hexa("40 7f 80")),
        raw("F8_E5M2FNUZ", [3], "F8_E5M2FNUZ", hexa("40 7f 80")),
        raw("F6_E2M3", [2, 2], "F6_E2M3", hexa("08 f8 ff")),
        raw("F6_E3M2", [8], "F6_E3M2", hexa("0c f3 ff 00 00 00")),
        raw("F4", [3, 2], "F4", hexa("21 f7 80")),
        raw("C64", [1], "C64", hexa("00 00 80 3f 00 00 c0 ff")),
        raw("F4.empty", [0, 3], "F4", b""),
        raw("U8", [1], "U8", hexa("07")),
    ]
    valid(
        "raw-dtypes-1.1",
        "one kept tensor of every dtype of version 1.1, of 8, 6, 4 and 64 bits; an empty one; a U8",
        newer,
        features=["dtypes-1.1"],
        fields={"minor": 1},
    )
    valid(
        "feature-unused",
        "the feature dtypes-1.1 is required and no tensor needs it, minor version 0",
        [small()],
        features=["dtypes-1.1"],
    )
    valid(
        "raw-shapes",
        "0-d, 1 element in 16 dimensions, 6-d, and empty tensors first, between and last",
        [
            raw("empty.first", [0], "F32", b""),
            raw("scalar", [], "F32", hexa("00 00 80 3f")),
            raw("sixteen", [1] * 16, "U8", b"\x07"),
            raw("empty.between", [3, 0, 2], "F16", b""),
            raw("six", [1, 2, 1, 3, 1, 2], "I8", hexa("00 01 02 03 04 05 06 07 08 09 0a 0b")),
            raw("empty.large", [0, 2**48, 31], "U8", b""),
        ],
    )
    valid(
        "raw-cast",
        "cast tensors: stored F32, F16 and BF16, source another floating dtype",
        [
            raw("a", [2], "F32", hexa("00 00 80 3f 00 00 e0 43"), "F8_E4M3"),
            raw("b", [2], "F16", hexa("00 3c 66 2e"), "F32"),
            raw("c", [2], "BF16", hexa("80 3f cd 3d"), "F64"),
            raw("d", [2], "F32", hexa("00 00 80 3f cd cc cc 3d"), "F64"),
            raw("e", [2], "BF16", hexa("80 3f cd 3d"), "F16"),
        ],
    )
    widths()
    valid(
        "affine-shapes",
        "0-d and 6-d affine tensors, rows of two and of all dimensions, rows of one value",
        [
            affine("scalar", [], 1, 8, "tensor", "fb", "00 00 00 40", None, [-10.0]),
            affine("scalar4", [], 1, 4, "channel", "0f 00*15", "00 00 00 40", None, [14.0]),
            affine(
                "six", [2, 1, 2, 1, 3, 1], 6, 8, "channel",
                "01 02 03 04 05 06 ff fe fd fc fb fa", "00 00 80 3f 00 00 00 3f", None,
                [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -0.5, -1.0, -1.5, -2.0, -2.5, -3.0],
            ),
            affine(
                "conv", [2, 1, 2, 2], 4, 4, "channel",
                "01 02 03 04 00*12  0f 0e 0d 0c 00*12", "00 00 80 3f 00 00 00 3f", None,
                [-7.0, -6.0, -5.0, -4.0, 3.5, 3.0, 2.5, 2.0],
            ),
            affine(
                "flat", [2, 3], 6, 8, "tensor", "01 02 03 04 05 06", "00 00 80 3f", "01",
                [0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
            ),
            affine(
                "column", [3, 1], 1, 8, "channel", "01 02 03",
                "00 00 80 3f 00 00 00 40 00 00 80 40", None, [1.0, 4.0, 12.0],
            ),
            affine(
                "column.block", [2, 1], 1, 2, 16, "03 00*7 00 00*7", "00 3c 00 40", None,
                [1.0, -4.0],
            ),
        ],
    )  # fmt: skip
    valid(
        "block-all-padding",
        "blocks of 16 below 8 bits, rows of 16: half a group is padding without scale, zero point",
        [
            affine(
                "odd", [2, 16], 16, 4, 16,
                "00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f"
                " 0f 0e 0d 0c 0b 0a 09 08 07 06 05 04 03 02 01 00",
                "00 3c 00 38", None,
                [float(k) for k in range(-8, 8)] + [k / 2 for k in range(7, -9, -1)],
            ),
            affine(
                "odd.asym", [1, 5], 5, 2, 16, "03 02 01 00 03 00*3", "00 3c", "04 00*15",
                [2.0, 1.0, 0.0, -1.0, 2.0],
            ),
        ],
    )  # fmt: skip
    valid(
        "block-short",
        "rows that are no multiple of the block: 33 in blocks of 32 (4 and 8 bits), 40 in 64",
        [
            affine(
                "b4", [33], 33, 4, 32, f"{NIBBLES} 0f 00*15", "00 38 00 40", None,
                [k / 2 for k in Q4] + [14.0],
            ),
            affine(
                "b8", [33], 33, 8, 32, "01*32 02 00*31", "00 38 00 40", "00 01",
                [0.5] * 32 + [2.0],
            ),
            affine(
                "b64", [40], 40, 4, 64, f"{NIBBLES} 01 02 03 04 05 06 07 08 00*8", "00 38", None,
                [k / 2 for k in Q4] + [k / 2 for k in range(-7, 1)],
            ),
        ],
    )  # fmt: skip
    valid(
        "block-128-256",
        "blocks of 128 and 256, exactly filled and short",
        [
            affine(
                "b128", [128], 128, 2, 128, f"{GROUP[2][0]} " * 4, "00 3c", None,
                [-2, -1, 0, 1] * 32,
            ),
            affine(
                "b256", [260], 260, 2, 256, f"{GROUP[2][0]} " * 8 + "03 02 01 00 00*60",
                "00 3c 00 40", None, [-2, -1, 0, 1] * 64 + [2.0, 0.0, -2.0, -4.0],
            ),
        ],
    )  # fmt: skip
    valid(
        "block-many-zero-points",
        "34 blocks: zero points fill one group of 32 and begin a second, padded one",
        [
            affine(
                "w", [34, 1], 1, 2, 16, "03 00*7 " * 34, "00 3c " * 34,
                "10 32 54 76 98 ba 0c 21 43 65 87 a9 cb 00 42 86  01 02 00*14",
                [
                    (12 - z) / 4
                    for z in (
                        *(0, 2, 4, 6, 8, 10, 12, 1, 3, 5, 7, 9, 11, 0, 2, 6),  # low nibbles
                        *(1, 3, 5, 7, 9, 11, 0, 2, 4, 6, 8, 10, 12, 0, 4, 8),  # high nibbles
                        *(1, 2),
                    )
                ],
            )
        ],
    )  # fmt: skip
    valid(
        "scale-negative",
        "negative and negative-zero scales in symmetric tensors below 8 bits; 0 times -0.5 is -0",
        [
            affine(
                "w", [32], 32, 4, "tensor", NIBBLES, "00 00 00 bf", None, [k * -0.5 for k in Q4]
            ),
            affine("b", [32], 32, 4, 32, NIBBLES, "00 b8", None, [k * -0.5 for k in Q4]),
            affine("z", [2], 2, 4, "tensor", "08 0f 00*14", "00 00 00 80", None, [-0.0, -0.0]),
        ],
    )
    valid(
        "scale-dtypes",
        "BF16 and F32 block scales; the smallest F16, BF16 and F32 scales",
        [
            affine(
                "bf16", [32], 32, 4, 32, NIBBLES, "c0 3f", None, [k * 1.5 for k in Q4],
                scale_dtype="BF16", source="BF16",
            ),
            affine(
                "f32", [32], 32, 4, 32, NIBBLES, "01 00 80 3f", "00*24",
                [j % 16 * (1 + 2**-23) for j in range(32)], scale_dtype="F32", source="F64",
            ),
            affine(
                "tiny16", [2], 2, 8, 32, "01 81 00*30", "01 00", None,
                [2.0**-24, -127 * 2.0**-24],
            ),
            affine(
                "tinyb", [2], 2, 8, 32, "01 81 00*30", "01 00", None, [2.0**-133, -127 * 2.0**-133],
                scale_dtype="BF16",
            ),
            affine(
                "tiny32", [2], 2, 8, "tensor", "01 81", "01 00*3", None,
                [2.0**-149, -127 * 2.0**-149],
            ),
            affine(
                "quarter", [4], 4, 2, "tensor", "00 01 02 03 00*4", "01 00*3", "02 00*15",
                [-0.0, 0.0, 2 * 2.0**-149, 2 * 2.0**-149],
            ),
        ],
    )  # fmt: skip
    valid(
        "scale-large",
        "products that round to infinity, and the largest that does not; a rounded product",
        [
            affine(
                "over", [4], 4, 8, "tensor", "01 02 fe ff", "ff ff 7f 7f", None,
                [struct.unpack("<f", hexa("ff ff 7f 7f"))[0] * k for k in (1, 2, -2, -1)],
            ),
            affine("round", [3], 3, 8, "tensor", "03 7f 81", "cd cc cc 3d", None,
                [float.fromhex("0x1.99999ap-4") * k for k in (3, 127, -127)]),
        ],
    )  # fmt: skip
    valid(
        "scale-zero",
        "blocks of zeros, scale 0: symmetric u = 8 and q = 0, asymmetric u = z = 0, q = z = -128",
        [
            affine(
                "sym", [64], 64, 4, 32, f"88*16 {NIBBLES}", "00 00 00 3c", None, [0.0] * 32 + Q4
            ),
            affine("sym8", [2], 2, 8, "tensor", "00 00", "00*4", None, [0.0, 0.0]),
            affine("asym", [4], 4, 4, "tensor", "00*16", "00*4", "00*24", [0.0] * 4),
            affine("asym8", [2], 2, 8, 16, "80 80 00*14", "00 00", "80", [0.0, 0.0]),
        ],
    )
    valid(
        "activation",
        "static activation parameters, scale as decimal and as integer number",
        [
            q4("a", activation=ACTIVATION),
            q4("b", activation={**ACTIVATION, "scale": 1, "zero_point": 127}),
            q4("c", activation={**ACTIVATION, "scale": 1e-45, "samples": 0}),
        ],
    )
    valid(
        "companion-files",
        "companion files behind a tensor; an empty one, a non-ASCII name, a name of 255 bytes",
        [small()],
        [
            File("config.json", b'{"a": 1}\n'),
            File("empty.txt", b""),
            File("größe 模型.txt", b"\x00\xff"),
            File("n" * 255, b"n"),
        ],
        metadata={"format": "pt"},
    )
    valid("companion-only", "a companion file and no tensor", [], [File("a", b"abc")])
    valid(
        "companion-empty-last",
        "the last segment is empty: the file ends at its aligned offset",
        [small()],
        [File("empty", b"")],
    )
    valid(
        "version-minor-7",
        "minor version 7, unknown keys in header, tensor, activation and file are ignored",
        [q4("w", zzz={"deep": [1.5, None, True]}, activation={**ACTIVATION, "window": "x"})],
        [File("a", b"abc", mtime=None)],
        extra={"aaa": [], "shards": {"n": 2}},
        fields={"minor": 7},
    )
    valid(
        "names",
        "non-ASCII, control and escaped characters, composed and decomposed, 1 and 1,024 bytes",
        [
            raw("größe.重み.\U0001f600", [1], "U8", b"\x01"),
            raw("é", [1], "U8", b"\x02"),
            raw("e\u0301", [1], "U8", b"\x03"),
            raw('\x01\t\n"\\/\x7f\u2028', [1], "U8", b"\x04"),
            raw("é" * 512, [1], "U8", b"\x05"),
            raw(" ", [1], "U8", b"\x06"),
        ],
    )
    valid(
        "header-keys-by-code-point",
        "U+FF5E sorts before U+1F600 (UTF-16 order would be the reverse)",
        metadata={"\uff5e": "tilde", "\U0001f600": "face", "": "empty", "A": "1", "a": "2"},
    )
    valid(
        "header-limits",
        "nested 16 deep, the largest and smallest integers, numbers in any spelling",
        provenance={
            "deep": json.loads("[" * 14 + "]" * 14),
            "numbers": [2**53 - 1, 1 - 2**53, 1.5, 1e300, -0.0],
        },
    )
    valid(
        "header-free-content",
        "decision, error and provenance are free content",
        [q4("w", decision={"why": "default"}, error={"sqnr_db": 21.5, "max": None})],
        provenance={"tool": "by hand", "list": [True, False, None]},
    )
    valid(
        "example-absmax-8bit",
        "worked example of schemes/SPEC.md section 9: 8 bits, one scale",
        [
            affine(
                "x", [8], 8, 8, "tensor", "21 f2 ba 23 c5 0a 2f 7f", "53 f6 47 3d", None,
                [q * float.fromhex("0x1.8feca6p-5") for q in (33, -14, -70, 35, -59, 10, 47, 127)],
            )
        ],
    )  # fmt: skip
    valid(
        "example-4bit-asym",
        "worked example of schemes/SPEC.md section 9: 4 bits, zero point 21 quarter steps",
        [
            affine(
                "x", [8], 8, 4, "tensor", "08 04 00 08 01 06 09 0f 00*8", "0a d7 23 3f",
                "05 00*15 01 00*7",
                [k / 4 * float.fromhex("0x1.47ae14p-1") for k in (11, -5, -21, 11, -17, 3, 15, 39)],
            )
        ],
    )  # fmt: skip


# ---------------------------------------------------------------- invalid files


def swap(old: str, new: str | bytes) -> Callable[[bytes], bytes]:
    return lambda blob: blob.replace(
        old.encode(), new if isinstance(new, bytes) else new.encode(), 1
    )


def put(at: int, value: int) -> Callable[[bytearray, int], Any]:
    return lambda whole, start: whole.__setitem__(at, value)


def in_payload(at: int, value: int) -> Callable[[bytearray, int], Any]:
    return lambda whole, start: whole.__setitem__(start + at, value)


# Codes, scales, and the values that bitsandbytes 0.50.2 gives for them on a CPU.
BITSANDBYTES = {
    "nf4": {
        "codes": (
            "0123456789abcdefac0c78a4f0469620002f3ac3464f2ecd16a7aaa0f8e45e215a1d538eed40cbc0"
            "0856e3854c20"
        ),
        "scales": ("0000c03fcdcccc3d"),
        "values": (
            "0000c0bf45ab85bfc8a049bff8a517bf7473dabeefe78dbe55da0bbe000000007e78f43d5430773e"
            "a603bd3e6cc2013f8a3b293f800b583fc6ce8a3f0000c03fa603bd3e8a3b293f0000c0bf8a3b293f"
            "000000007e78f43da603bd3e7473dabe0000c03f0000c0bf7473dabe55da0bbe5430773e55da0bbe"
            "c8a049bf0000c0bf0000c0bf0000c0bfc8a049bf0000c03ff8a517bfa603bd3e8a3b293ff8a517bf"
            "7473dabe55da0bbe7473dabe0000c03fc8a049bfc6ce8a3f8a3b293f800b583f45ab85bf55da0bbe"
            "a603bd3e00000000a603bd3ea603bd3ea603bd3e0000c0bf0000c03f7e78f43dc6ce8a3f7473dabe"
            "efe78dbec6ce8a3fc8a049bf45ab85bfcc5d97bc7e9dc93c8e948ebdab72663dcc5d97bc1ac221bd"
            "6662023cc30f943dc30f943dab72663daf03e9bccdccccbdc783343dfb680a3dc783343dcdccccbd"
            "cdccccbd6662023ccc5d97bc272d15bcc30f943d1ac221bd6662023ccc5d97bcaf03e9bcc783343d"
            "e71157bd"
        ),
    },
    "fp4": {
        "codes": (
            "0123456789abcdeffaa7f35aa12bdae65c03362cd60b192faf9b6c125b7df668a79fb56620c65a9e"
            "9e955f93dd02b6513ddd9258f48788b1fdc47740b0c3a53e"
        ),
        "scales": ("0000c03fcdcccc3d"),
        "values": (
            "000000000000003c0000803f0000c03f0000003f0000403f0000803e0000c03e00000080000000bc"
            "000080bf0000c0bf000000bf000040bf000080be0000c0be0000c0be000080bf000080bf0000c03e"
            "0000c0be0000c03f0000403f000080bf000080bf0000003c0000803f0000c0bf000040bf000080bf"
            "000080be0000803e0000403f000000bf000000000000c03f0000c03f0000803e0000803f000000bf"
            "000040bf0000803e000000000000c0bf0000003c000000bc0000803f0000c0be000080bf0000c0be"
            "000000bc0000c0bf0000803e000000bf0000003c0000803f0000403f0000c0bf0000c03e000040bf"
            "0000c0be0000803e0000803e00000080898888bdcdcccc3c898808bacdccccbccdccccbdcdcc4c3d"
            "8988883c8988883c8988883d00000000898808bd8988883ccdcc4c3d898888bd898808ba898888bc"
            "898808ba898888bc898808bacdcc4c3dcdcc4c3dcdccccbc898808bacdcccc3dcdcc4cbdcdcc4cbd"
            "000000008988883dcdccccbd8988883ccdcc4c3d8988083acdcccc3dcdcc4cbdcdcc4cbdcdcc4cbd"
            "898808ba8988883dcdcc4c3d00000080cdccccbc8988083d00000080cdcccc3c0000008000000080"
            "cdccccbd8988083acdccccbccdcc4cbd898808bd8988083dcdcccc3ccdcccc3c8988083d00000000"
            "cdccccbd00000000898808bdcdcccc3d898888bdcdcc4c3dcdcccc3d898888bc"
        ),
    },
    "dq": {
        "codes": (
            "5d350c86e9fb983bcb60b0c2438340f3392ec565b64a2c6f46db050d63bd185be8b597b030f8770d"
            "d09867e97bb8d99799e3585ad30f8bcf04f76400f0234d526b7311739a68082714670e"
        ),
        "scales": ("ff0382"),
        "wide": ("a470bd3e"),
        "offset": ("295c4f3f"),
        "values": (
            "f4435fbe92f4293fe797eebef4435fbe3e0a97bf3021053f2351c03d0109dcbd0c645a3f8774423e"
            "3e0a973fa627cc3e8774423e2351c03de797eebea627cc3e3021053fa627cc3e0109dcbd3e0a97bf"
            "a627cc3e3e0a97bf3021053f349d1ebf1ed9abbee797eebe2351c03de797eebe1ed9abbe3e0a97bf"
            "3e0a973fe797eebee797eebe8774423e349d1ebf0c645a3f3021053ff4435fbe0109dcbdf4435fbe"
            "a627cc3e0109dcbd1ed9abbef4b0943e349d1ebf3021053f0109dcbd3e0a973f1ed9abbe0109dcbd"
            "92f4293fa627cc3e3e0a97bff4435fbe3e0a97bf92f4293f0109dcbde797eebea627cc3e92f4293f"
            "524e52bf2351c03df4435fbea627cc3ecb9ba93ede5b153d738d1e3ef464adbdfd04973d00000000"
            "738d1e3ea09aeabe674c39bea09aeabea09aea3ede5b153d0000000000000000a09aeabe01fe833e"
            "01fe833ea09aeabefd04973dde5b153db8e22abd00000000cb9ba93efd04973d00000000738d1e3e"
            "738d1e3ede5b153d01fe833efd04973dfd04973d00000000fd04973dfd04973dcb9ba93e674c39be"
            "f464adbdde5b153df464adbdaaf4e63d01fe833e674c39bea09aeabea09aea3ede5b153d738d1e3e"
            "dac84e3ea09aea3ea09aeabe517605bea09aea3e00000000b8e22abd517605bea09aeabea09aeabe"
            "a09aea3ea09aeabe555e76be674c39be517605be01fe833ef464adbd555e76bea70a97bd05248c3e"
            "00000000e0c7a3bef15c10bff15c10bf00000000e0c7a3be807b053ed8224c3ea70a97bdbf03843d"
            "595c4fbfbf03843d52c2d9be00000000f15c10bf8aed6bbea70a97bd00000000595c4fbfb1e9153f"
        ),
    },
}


def codebook(
    kind: str,
    count: int,
    *,
    block: int = 64,
    source: str = "F32",
    shape: list[int] | None = None,
    encoding: dict[str, Any] | None = None,
    **changed: str,
) -> Tensor:
    """A tensor of `BITSANDBYTES`, perhaps with other bytes in a segment."""
    given = {**BITSANDBYTES[kind], **changed}
    double = "wide" in given
    parts = [("codes", bytes.fromhex(given["codes"])), ("scales", bytes.fromhex(given["scales"]))]
    if double:
        parts.append(("scale_scales", bytes.fromhex(given["wide"])))
        parts.append(("scale_offset", bytes.fromhex(given["offset"])))
    described = {
        "block": block,
        "kind": "codebook",
        "scale_dtype": "U8" if double else "F32",
        "table": "nf4" if kind == "dq" else kind,
    }
    values = bytes.fromhex(given["values"])
    described.update(encoding or {})
    return Tensor(kind, [count] if shape is None else shape, source, described, parts, values)


def valid_codebooks() -> None:
    for kind, count, what in (
        ("nf4", 91, "nf4: every code, a short last block, an odd number of values"),
        ("fp4", 128, "fp4: every code, -0 among them"),
        ("dq", 150, "nf4 with double quantized scales"),
    ):
        valid(
            f"codebook-{kind}",
            f"{what}; values by bitsandbytes",
            [codebook(kind, count)],
            features=["codebook-1.2"],
            fields={"minor": 2},
        )
    valid(
        "codebook-rows",
        "blocks that end within rows of 13, and a dtype of 1.1 beside them",
        [codebook("nf4", 91, shape=[7, 13]), raw("F4", [3, 2], "F4", hexa("21 f7 80"))],
        features=["codebook-1.2", "dtypes-1.1"],
        fields={"minor": 2},
    )


def invalid_codebooks() -> None:
    def file(*tensors: Tensor, features: tuple[str, ...] = ("codebook-1.2",)) -> bytes:
        return make(list(tensors), features=list(features), fields={"minor": 2})

    plain = codebook("nf4", 91)
    invalid(14, "codebook-no-feature", "a codebook without its feature", file(plain, features=()))
    for case, change, why in (
        ("table", {"table": "nf3"}, "table nf3"),
        ("block", {"block": 48}, "block 48"),
        ("scale", {"scale_dtype": "F16"}, "scales of F16"),
    ):
        changed = codebook("nf4", 91, encoding=change)
        invalid(14, f"codebook-{case}", f"a codebook with {why}", file(changed))
    invalid(14, "codebook-source", "a codebook of I32", file(codebook("nf4", 91, source="I32")))
    nothing = codebook("nf4", 0, codes="", scales="", values="")
    invalid(15, "codebook-empty", "a codebook of no value", file(nothing))
    scales = BITSANDBYTES["nf4"]["scales"]
    invalid(17, "codebook-codes", "a byte of codes too many", file(codebook("nf4", 89)))
    invalid(17, "codebook-scales", "a scale too few", file(codebook("nf4", 91, scales=scales[:8])))
    invalid(
        17,
        "codebook-double",
        "scales of F32 and their scales",
        file(codebook("dq", 150, encoding={"scale_dtype": "F32"})),
    )
    for case, tensor, why in (
        ("nan", codebook("nf4", 91, scales="0000c07f" + scales[8:]), "a scale is NaN"),
        ("negative", codebook("nf4", 91, scales=scales[:8] + "cdccccbd"), "a scale is negative"),
        ("minus-0", codebook("nf4", 91, scales="00000080" + scales[8:]), "a scale is -0"),
        ("wide-inf", codebook("dq", 150, wide="0000807f"), "a scale of scales is infinite"),
        ("wide-negative", codebook("dq", 150, wide="0000c0bf"), "a scale of scales is negative"),
        ("offset", codebook("dq", 150, offset="000080ff"), "the offset of scales is infinite"),
    ):
        invalid(20, f"codebook-{case}", why, file(tensor))
    filled = BITSANDBYTES["nf4"]["codes"][:-1] + "1"
    invalid(
        23,
        "codebook-half-byte",
        "the half byte behind the last code is 1",
        file(codebook("nf4", 91, codes=filled)),
    )


# schemes/SPEC.md section 11
LEVELS = {
    2: [-127, -43, 17, 85],
    3: [-127, -77, -45, -19, 6, 33, 64, 109],
    4: [-127, -102, -79, -61, -46, -32, -20, -9, 2, 13, 24, 36, 49, 65, 83, 109],
    5: [
        *(-127, -117, -105, -94, -80, -72, -64, -56, -48, -41, -35, -29, -23, -17, -12, -7),
        *(-1, 4, 9, 15, 21, 26, 32, 38, 45, 51, 58, 66, 74, 82, 94, 113),
    ],
    6: [
        *(-127, -120, -111, -106, -100, -95, -90, -83, -78, -74, -70, -65, -61, -58, -54, -50),
        *(-47, -44, -40, -37, -34, -31, -28, -26, -23, -20, -17, -15, -12, -10, -7, -4),
        *(-2, 1, 3, 6, 8, 10, 13, 16, 18, 21, 23, 26, 29, 31, 34, 37),
        *(40, 43, 46, 50, 53, 57, 61, 64, 68, 72, 76, 81, 88, 93, 99, 109),
    ],
}
# Steps -3, 15, -16, 0 plus 16 in 5 bits; -3, 31, -32, 0 plus 32 in 6; and in 7, the first and third
# shifted.
STEPS5 = ("0d 0f 00*14 00 01 00 01", [(-3, 0), (15, 0), (-16, 0), (0, 0)])
STEPS7 = ("0d 0f 00*14 01 03 00 02 00*4 01 00 01 00", [(-3, 4), (31, 0), (-32, 4), (0, 0)])
STEPS6 = ("0d 0f 00*14 01 03 00 02 00*4", [(-3, 0), (31, 0), (-32, 0), (0, 0)])
# Steps of 4 bits without a sign, s + 16 h / 8: a byte each.
STEPS8 = ("03 ff 71 00*29", [(3, 0), (15, 120), (1, 56), (0, 0)])
PLACED = [-125, -79, -41, 5]
ROW_SCALES = ("00 3c 00 34", [1.0, 0.25])


def levels(
    name: str,
    bits: int,
    *,
    codes: str = "",
    scales: str = "",
    rows: str = "",
    shifted: bool = False,
    placed: bool = False,
    source: str = "F32",
    shape: list[int] | None = None,
    segments: list[tuple[str, bytes]] | None = None,
    encoding: dict[str, Any] | None = None,
) -> Tensor:
    """Two rows of 19 codes in blocks of 16, each padded to a group, perhaps with other bytes."""
    packed, u = BLOCK[bits]
    fine = bits > 4
    packed_steps, steps = STEPS7 if shifted else STEPS6 if fine else STEPS5
    step_bits, shift_by, table = 6 if shifted or fine else 5, 4 if shifted else 0, LEVELS[bits]
    if placed:
        packed_steps, steps = STEPS8
        step_bits, shift_by, table = 4, 8, PLACED
    packed_rows, d = ROW_SCALES
    described = {
        "bits": bits,
        "block": 16,
        "kind": "levels",
        "levels": table,
        "row_length": 19,
        "scale_bits": step_bits,
        "shift": shift_by,
        **(encoding or {}),
    }
    divisor = {4: 1024, 5: 2048, 6: 4096}[step_bits]
    values = []
    for i, (code, block) in enumerate(zip(u, OWNER[2], strict=True)):
        step, shift = steps[block]
        values.append(d[i // 19] / divisor * step * (table[code] + shift))
    parts = [
        ("codes", hexa(codes or packed)),
        ("scales", hexa(scales or packed_steps)),
        ("row_scales", hexa(rows or packed_rows)),
    ]
    return Tensor(name, shape or [2, 19], source, described, segments or parts, f32(values))


def many_levels() -> Tensor:
    """Rows of 33: 34 steps, which fill a group and begin a second, padded one; a row scale of 0,
    the smallest and the largest, and a table of its own.
    """
    table = [-100, -3, 1, 127]
    d = [0.0, 2.0**-24, 65504.0, *([1.5] * 14)]
    values = []
    for scale in d:
        values += [scale / 2048 * 3 * table[j % 4] for j in range(32)]  # 19 - 16
        values.append(scale / 2048 * -16 * table[3])
    described = {
        "bits": 2,
        "block": 32,
        "kind": "levels",
        "levels": table,
        "row_length": 33,
        "scale_bits": 5,
        "shift": 0,
    }
    # Steps 3, -16, 3, -16, ... are 19, 0, 19, 0: bits 3, 0, ... and 1, 0, ...
    scales = "33 00*1 " * 8 + "ff 00 ff 00 " + "03 00*15 01 00*3"
    parts = [
        ("codes", hexa("00 55 aa ff 00 55 aa ff 03 00*7 " * 17)),
        ("scales", hexa(scales)),
        ("row_scales", hexa("00 00 01 00 ff 7b " + "00 3e " * 14)),
    ]
    return Tensor("many", [17, 33], "BF16", described, parts, f32(values))


def valid_levels() -> None:
    for bits in (2, 3, 4):
        valid(
            f"levels-c{bits}",
            f"levels of {bits} bits: rows of 19 in blocks of 16, steps -16 to 15, and 0",
            [levels("w", bits)],
            features=["levels-1.3"],
            fields={"minor": 3},
        )
    for bits in (5, 6):
        valid(
            f"levels-c{bits}",
            f"levels of {bits} bits: rows of 19 in blocks of 16, steps -32 to 31, and 0",
            [levels("w", bits)],
            features=["levels-1.3"],
            fields={"minor": 3},
        )
    valid(
        "levels-c4s",
        "levels of 4 bits with steps of 6 bits, some of them shifted",
        [levels("w", 4, shifted=True)],
        features=["levels-1.3"],
        fields={"minor": 3},
    )
    valid(
        "levels-c2z",
        "levels of 2 bits with steps of 4 bits without a sign, and shifts from 0 to 120",
        [levels("w", 2, placed=True)],
        features=["levels-1.3"],
        fields={"minor": 3},
    )
    valid(
        "levels-many",
        "34 steps in two groups of 32; row scales 0, 2^-24 and 65504; its own table; a codebook",
        [many_levels(), codebook("nf4", 91)],
        features=["codebook-1.2", "levels-1.3"],
        fields={"minor": 3},
    )


def invalid_levels() -> None:
    def file(*tensors: Tensor, features: tuple[str, ...] = ("levels-1.3",)) -> bytes:
        return make(list(tensors), features=list(features), fields={"minor": 3})

    invalid(
        14, "levels-no-feature", "levels without their feature", file(levels("w", 4), features=())
    )
    fractions = [-127, -43.5, 17, 85]
    invalid(
        10,
        "levels-fraction",
        "a level is no integer",
        file(levels("w", 2, encoding={"levels": fractions})),
    )
    for case, bits, change, why in (
        ("bits", 4, {"bits": 7}, "7 bits"),
        ("block", 4, {"block": 64}, "blocks of 64"),
        ("shift", 4, {"shift": 4}, "steps of 5 bits and a shift"),
        ("steps", 4, {"scale_bits": 6}, "steps of 6 bits without a shift"),
        ("fine-steps", 5, {"scale_bits": 5}, "steps of 5 bits for codes of 5"),
        ("unsigned", 2, {"scale_bits": 4}, "steps of 4 bits without a shift"),
        ("placed-bits", 3, {"scale_bits": 4, "shift": 8}, "zero points for codes of 3 bits"),
        (
            *("placed-block", 2),
            {"block": 32, "levels": PLACED, "scale_bits": 4, "shift": 8},
            "zero points for blocks of 32",
        ),
        ("fine-shift", 6, {"shift": 4}, "a shift for codes of 6 bits"),
        ("count", 2, {"levels": LEVELS[3]}, "8 levels for 2 bits"),
        ("order", 2, {"levels": [-127, 17, -43, 85]}, "levels that do not ascend"),
        ("equal", 2, {"levels": [-127, 17, 17, 85]}, "a level twice"),
        ("low", 2, {"levels": [-128, -43, 17, 85]}, "the level -128"),
        ("high", 2, {"levels": [-127, -43, 17, 128]}, "the level 128"),
        ("positive", 2, {"levels": [0, 17, 43, 85]}, "no level below 0"),
        ("negative", 2, {"levels": [-127, -43, -17, 0]}, "no level above 0"),
    ):
        invalid(14, f"levels-{case}", f"levels: {why}", file(levels("w", bits, encoding=change)))
    top = {"levels": [*LEVELS[4][:-1], 124]}
    invalid(
        14,
        "levels-shifted-high",
        "levels: 124 with a shift of 4",
        file(levels("w", 4, shifted=True, encoding=top)),
    )
    top = {"levels": [*PLACED[:-1], 8]}
    invalid(
        14,
        "levels-placed-high",
        "levels: 8 with shifts up to 120",
        file(levels("w", 2, placed=True, encoding=top)),
    )
    invalid(14, "levels-source", "levels of I32", file(levels("w", 4, source="I32")))
    invalid(15, "levels-empty", "levels of no value", file(levels("w", 4, shape=[0, 19])))
    invalid(
        15,
        "levels-row",
        "rows of 2 in a shape of [2, 19]",
        file(levels("w", 4, encoding={"row_length": 2})),
    )
    good = levels("w", 4).segments
    for case, parts, why in (
        ("missing", good[:2], "no row scales"),
        ("order", [good[0], good[2], good[1]], "row scales before the scales"),
        ("codes", [("codes", good[0][1] + b"\0"), *good[1:]], "a byte of codes too many"),
        ("scales", [good[0], ("scales", good[1][1][:-1]), good[2]], "a byte of scales too few"),
        ("rows", [*good[:2], ("row_scales", good[2][1][:2])], "a row scale too few"),
    ):
        invalid(17, f"levels-{case}", f"levels: {why}", file(levels("w", 4, segments=parts)))
    for case, rows, why in (
        ("nan", "00 3c 00 7e", "a row scale is NaN"),
        ("inf", "00 7c 00 34", "a row scale is infinite"),
        ("negative", "00 3c 00 b4", "a row scale is negative"),
        ("minus-0", "00 3c 00 80", "a row scale is -0"),
    ):
        invalid(20, f"levels-{case}", f"levels: {why}", file(levels("w", 4, rows=rows)))
    padded = BLOCK[4][0].replace("03 04", "03 14", 1)
    invalid(23, "levels-padding", "levels: a padding code is 1", file(levels("w", 4, codes=padded)))
    unused = "0d 0f 00*2 01 00*11 00 01 00 01"
    invalid(
        23, "levels-unused", "levels: an unused scale is 1", file(levels("w", 4, scales=unused))
    )


def invalid_preamble() -> None:
    base = make([small()])
    invalid(1, "empty", "no bytes at all", b"")
    invalid(1, "short", "63 bytes", base[:63])
    invalid(1, "magic", "first byte is 0x88", make([small()], magic=b"\x88" + MAGIC[1:]))
    unix = bytes.fromhex("89 51 42 4c 4b 0a 0a 0a")
    invalid(1, "text-mode", "CR of the magic became LF", make([small()], magic=unix))
    for major in (0, 2, 255):
        invalid(2, f"major-{major}", f"major version {major}", make(fields={"major": major}))
    invalid(3, "reserved-low", "byte 10 is 1", make(fields={"reserved": 1}))
    invalid(3, "reserved-high", "byte 11 is 128", make(fields={"reserved": 0x8000}))
    invalid(4, "truncated", "the last byte is missing", base[:-1])
    invalid(4, "preamble-only", "cut after the preamble", base[:64])
    invalid(4, "longer", "a byte behind the end", base + b"\0")
    invalid(4, "huge", "file_length 2^64 - 1", make(fields={"file_length": 2**64 - 1}))
    offset = {"payload_offset": 2**64 - 64}
    invalid(5, "header-too-short", "header_length 1", make(text=lambda b: b"0"))
    invalid(5, "header-none", "header_length 0", make(text=lambda b: b""))
    for name, length in (("header-too-long", 67_108_865), ("header-4gib", 2**32 - 1)):
        invalid(5, name, f"header_length {length}", make(fields={"header_length": length}))
    invalid(5, "payload-far", "payload_offset 2^64 - 64", make([small()], fields=offset))
    at = struct.unpack_from("<Q", base, 16)[0]
    invalid(
        5, "payload-unaligned", "payload_offset is 32 too small",
        make([small()], gap=64, fields={"payload_offset": at + 32}),
    )  # fmt: skip
    invalid(
        5, "payload-in-header", "payload_offset lies in the header",
        make([small()], fields={"payload_offset": 64}),
    )  # fmt: skip
    invalid(
        5, "payload-behind-end", "payload_offset is behind the end of the file",
        make([small()], fields={"payload_offset": at + 64}),
    )  # fmt: skip
    invalid(6, "digest", "a bit of header_sha256 is flipped", make(damage=lambda w, s: flip(w, 63)))
    invalid(6, "header", "a space of the header became a tab", tabbed())
    invalid(6, "minor", "minor version changed without the digest", make(damage=put(9, 1)))
    header_only = sha(base[64 : 64 + struct.unpack_from("<I", base, 12)[0]])
    invalid(
        6, "header-only", "digest of the header without bytes 0..31",
        base[:32] + bytes.fromhex(header_only) + base[64:],
    )  # fmt: skip
    invalid(
        7, "gap-last", "the byte before the payload is not 0",
        make([small()], gap=64, damage=in_payload(-1, 1)),
    )  # fmt: skip
    end = 64 + len(dumps({**EMPTY}))
    invalid(7, "gap-first", "the byte behind the header is a space", make(damage=put(end, 0x20)))


EMPTY: dict[str, Any] = {
    "files": [],
    "metadata": {},
    "provenance": {},
    "required_features": [],
    "tensors": [],
}


def flip(whole: bytearray, at: int) -> None:
    whole[at] ^= 1


def tabbed() -> bytes:
    whole = make(metadata={"a": "b c"})
    return whole.replace(b"b c", b"b\tc")


def invalid_header() -> None:
    note = {"n": "@"}  # text that the cases below replace
    for case, old, new, why in (
        ("space", '"files":[]', '"files": []', "a space outside strings"),
        ("newline", '"tensors":[]}', '"tensors":[]}\n', "a newline at the end"),
        ("bom", '{"files"', '\ufeff{"files"', "a byte order mark"),
        ("utf-8", "@", b"\xff", "0xFF in a string"),
        ("overlong", "@", b"\xc1\x81", "overlong UTF-8"),
        ("surrogate-utf-8", "@", b"\xed\xa0\x80", "a surrogate in UTF-8"),
        ("surrogate", "@", "\\ud800", "a lone surrogate as escape"),
        ("surrogate-low", "@", "\\udc00x", "a lone low surrogate as escape"),
        ("control", "@", "\x01", "a control character that is not escaped"),
        ("nan", '"@"', "NaN", "NaN"),
        ("infinity", '"@"', "Infinity", "Infinity"),
        ("minus-infinity", '"@"', "-Infinity", "-Infinity"),
        ("integer", '"@"', "9007199254740992", "integer 2^53"),
        ("integer-negative", '"@"', "-9007199254740992", "integer -2^53"),
        ("integer-long", '"@"', "1" + "0" * 3000, "an integer of 3,001 digits"),
        ("depth-17", '"@"', "[" * 15 + "]" * 15, "nested 17 deep"),
        ("depth-1500", '"@"', "[" * 1498 + "]" * 1498, "nested 1,500 deep"),
        ("open-1500", '"@"', "[" * 1500, "1,500 open brackets"),
        ("comma", '"@"}', '"@",}', "a comma too many"),
        ("quote", '"@"', "'@'", "single quotes"),
        ("cut", '"tensors":[]}', '"tensors":[]', "the last brace is missing"),
        ("two", '"tensors":[]}', '"tensors":[]}{}', "a second object behind the first"),
        ("unsorted", '"n":', '"zz":0,"n":', "keys out of order in an inner object"),
    ):
        invalid(8, case, why, make(provenance=note, text=swap(old, new)))
    invalid(8, "array", "the header is an array", make(text=lambda b: b"[]"))
    invalid(8, "nul", "the header is two zero bytes", make(text=lambda b: b"\0\0"))
    invalid(
        8, "unsorted-top", "top-level keys out of order",
        make(text=lambda b: b'{"metadata":{},"files":[],' + b.split(b'"metadata":{},')[1]),
    )  # fmt: skip
    invalid(
        8, "utf-16-order", "keys sorted by UTF-16 units instead of code points",
        make(metadata={"@": ""}, text=swap('"@":""', '"\U0001f600":"","\uff5e":""')),
    )  # fmt: skip
    for case, old, new, why in (
        ("top", '"files":[],', '"files":[],"files":[],', "a top-level key twice"),
        ("inner", '"n":"@"', '"n":"@","n":"@"', "a key of provenance twice, equal values"),
    ):
        invalid(9, case, why, make(provenance=note, text=swap(old, new)))
    invalid(
        9, "encoding", "bits twice in an encoding",
        make([q4()], text=swap('"bits":4', '"bits":4,"bits":4')),
    )  # fmt: skip
    for key in EMPTY:
        invalid(
            10, f"lacks-{key}", f"no {key}",
            make(edit=lambda h, key=key: h.pop(key)),  # type: ignore[misc]
        )  # fmt: skip
        wrong = "x" if key == "metadata" else None
        invalid(
            10, f"type-{key}", f"{key} is {json.dumps(wrong)}",
            make(edit=lambda h, key=key, wrong=wrong: h.update({key: wrong})),  # type: ignore[misc]
        )  # fmt: skip
    invalid(10, "metadata-number", "a number in metadata", make(metadata={"a": 1}))
    invalid(10, "feature-number", "a number in required_features", make(features=[1]))
    invalid(
        10, "many-files", "10,001 companion files (over 4 KiB, entries are all 0)",
        make(extra={"files": [0] * 10_001}),
    )  # fmt: skip
    for case, old, new, why in (
        ("shape-float", '"shape":[32]', '"shape":[32.0]', "a dimension with a fraction"),
        ("shape-exponent", '"shape":[32]', '"shape":[32e0]', "a dimension with an exponent"),
        ("shape-number", '"shape":[32]', '"shape":32', "shape is not an array"),
        ("shape-string", '"shape":[32]', '"shape":["32"]', "a dimension is a string"),
        ("bits-float", '"bits":4', '"bits":4.0', "bits with a fraction"),
        ("bits-string", '"bits":4', '"bits":"4"', "bits is a string"),
        ("row-float", '"row_length":32', '"row_length":3.2e1', "row_length with an exponent"),
        ("symmetric-number", '"symmetric":true', '"symmetric":1', "symmetric is 1"),
        ("offset-float", '"offset":0', '"offset":0.0', "an offset with a fraction"),
        ("offset-bool", '"offset":0', '"offset":false', "an offset is false"),
        ("size-float", '"size":16', '"size":16.0', "a size with a fraction"),
        ("segments-null", '"segments":[', '"segments":null,"segmentz":[', "segments is null"),
        ("name-number", '"name":"w"', '"name":7', "name is a number"),
        ("encoding-string", '"encoding":{', '"encoding":"raw","encodinh":{', "not an object"),
        ("source-null", '"source_dtype":"F32"', '"source_dtype":null', "source_dtype is null"),
        ("sha256-null", '"sha256":"', '"sha256":null,"sha257":"', "sha256 is null"),
        ("samples-float", '"samples":64', '"samples":64.0', "samples with a fraction"),
        ("scale-string", '"scale":0.0236', '"scale":"0.0236"', "activation.scale is a string"),
        ("observer-null", '"observer":"minmax"', '"observer":null', "observer is null"),
        ("tensor-number", '"tensors":[', '"tensors":[7,', "a tensor is a number"),
    ):
        invalid(10, case, why, make([q4(activation=ACTIVATION)], text=swap(old, new)))
    one = raw("t", [1], "U8", b"\x01")
    invalid(
        10, "shape-bool", "a dimension is true",
        make([one], text=swap('"shape":[1]', '"shape":[true]')),
    )  # fmt: skip
    for key in ("encoding", "name", "segments", "sha256", "shape", "source_dtype"):
        invalid(
            10, f"tensor-lacks-{key}", f"a tensor without {key}",
            make([small()], edit=lambda h, key=key: h["tensors"][0].pop(key)),  # type: ignore[misc]
        )  # fmt: skip
    for key in ("name", "segments", "sha256"):
        invalid(
            10, f"file-lacks-{key}", f"a companion file without {key}",
            make(
                [], [File("a", b"a")],
                edit=lambda h, key=key: h["files"][0].pop(key),  # type: ignore[misc]
            ),
        )  # fmt: skip
    for key in ("activation", "decision", "error"):
        more: dict[str, Any] = {key: "x"}
        invalid(10, f"{key}-string", f"{key} is a string", make([q4(**more)]))
    invalid(11, "feature", "an unknown required feature", make([small()], features=["sparse"]))
    invalid(11, "feature-empty", "an unknown required feature, named ''", make(features=[""]))


def invalid_tensors() -> None:
    for case, name, why in (
        ("empty", "", "an empty tensor name"),
        ("long", "n" * 1025, "a tensor name of 1,025 bytes"),
        ("long-utf-8", "é" * 512 + "n", "a tensor name of 513 characters and 1,025 bytes"),
        ("nul", "a\0b", "U+0000 in a tensor name"),
    ):
        invalid(12, case, why, make([raw(name, [1], "U8", b"\x01")]))
    invalid(12, "twice", "two tensors of one name", make([small(), q4("t")]))
    for case, shape, data, why in (
        ("dimensions", [1] * 17, b"\x01", "17 dimensions"),
        ("negative", [-1, -1], b"\x01", "negative dimensions, product 1"),
        ("large", [0, 2**48 + 1], b"", "a dimension of 2^48 + 1"),
        ("product", [0, 2**48, 32], b"", "product 2^53 with the 0 counted as 1"),
        ("product-far", [2**48] * 15 + [0], b"", "product 2^720 with the 0 counted as 1"),
    ):
        invalid(13, case, why, make([raw("t", shape, "U8", data)]))
    for case, dtype, source, data, why in (
        ("dtype", "F8", "F8", b"\x01", "unknown dtype F8"),
        ("dtype-case", "u8", "u8", b"\x01", "dtypes are upper case"),
        ("source", "F32", "F128", bytes(4), "unknown source_dtype"),
        ("cast-from-integer", "F32", "I32", bytes(4), "an integer tensor cannot be cast"),
        ("cast-to-integer", "I32", "F32", bytes(4), "a cast to an integer dtype"),
        ("cast-to-f64", "F64", "F32", bytes(8), "a cast to F64"),
        ("cast-to-f8", "F8_E4M3", "F32", bytes(1), "a cast to F8_E4M3"),
        ("without-feature", "C64", "C64", bytes(8), "a dtype of 1.1 without its feature"),
    ):
        invalid(14, case, why, make([raw("t", [1], dtype, data, source)]))
    newer = ["dtypes-1.1"]
    for case, tensor, why in (
        ("cast-from-newer", raw("t", [1], "F32", bytes(4), "F8_E8M0"), "a cast from F8_E8M0"),
        ("cast-to-newer", raw("t", [2], "F4", bytes(1), "F32"), "a cast to F4"),
        (
            "affine-newer",
            affine("w", [2], 2, 8, "tensor", "00 00", "00*4", source="F8_E4M3FNUZ"),
            "an affine tensor from F8_E4M3FNUZ",
        ),
    ):
        invalid(14, case, why, make([tensor], features=newer, fields={"minor": 1}))
    for case, tensor, why in (
        ("half-a-byte", raw("t", [3], "F4", hexa("21 03")), "3 values of 4 bits in 2 bytes"),
        ("half-a-byte-cut", raw("t", [3], "F4", hexa("21")), "3 values of 4 bits in 1 byte"),
        ("packed-apart", raw("t", [4], "F6_E2M3", hexa("00*4")), "4 values of 6 bits in 4 bytes"),
    ):
        invalid(17, case, why, make([tensor], features=newer, fields={"minor": 1}))
    both = ["dtypes-1.1", "sparse"]
    invalid(11, "feature-second", "a known and an unknown feature", make([small()], features=both))
    for case, tensor, why in (
        ("bits-7", affine("w", [32], 32, 7, "tensor", "00*28", "00*4"), "7 bits"),
        ("bits-1", affine("w", [32], 32, 1, "tensor", "00*4", "00*4"), "1 bit"),
        ("bits-16", affine("w", [32], 32, 16, "tensor", "00*64", "00*4"), "16 bits"),
        ("granularity", affine("w", [2], 2, 8, "row", "00*2", "00*4"), "granularity row"),
        ("block-48", affine("w", [48], 48, 8, 48, "00*48", "00 00"), "blocks of 48"),
        ("block-8", affine("w", [8], 8, 8, 8, "00*8", "00 00"), "blocks of 8"),
        ("block-512", affine("w", [1], 1, 8, 512, "00*512", "00 00"), "blocks of 512"),
        ("block-beside-tensor", q4(encoding={"block": 32}), "block with granularity tensor"),
        (
            "scale-f16-tensor",
            affine("w", [2], 2, 8, "tensor", "00 00", "00 00", scale_dtype="F16"),
            "F16 scale with granularity tensor",
        ),
        (
            "scale-bf16-channel",
            affine("w", [2], 2, 8, "channel", "00 00", "00 00", scale_dtype="BF16"),
            "BF16 scale with granularity channel",
        ),
        (
            "scale-f64",
            affine("w", [16], 16, 8, 16, "00*16", "00*8", scale_dtype="F64"),
            "F64 block scale",
        ),
        ("affine-integer", q4(source="I8"), "an affine tensor from I8"),
        ("affine-bool", q4(source="BOOL"), "an affine tensor from BOOL"),
        (
            "kind",
            Tensor("w", [1], "F32", {"kind": "lattice"}, [("data", b"\0")]),
            "unknown encoding",
        ),
    ):
        invalid(14, case, why, make([tensor]))
    for case, shape, row, codes, scales, why in (
        ("row", [4, 6], 8, "00*24", "00*12", "rows of 8 in [4, 6]"),
        ("row-leading", [2, 3], 2, "00*6", "00*12", "row_length is a leading dimension"),
        ("row-1", [2, 3], 1, "00*6", "00*24", "row_length 1 is no trailing product of [2, 3]"),
        ("row-0", [2, 3], 0, "00*6", "00*4", "row_length 0"),
        ("row-negative", [2, 3], -3, "00*6", "00*8", "row_length -3"),
        ("row-of-scalar", [], 2, "00", "00*4", "row_length 2 of a single value"),
        ("empty", [0, 4], 4, "", "", "an empty affine tensor"),
        ("empty-row", [4, 0], 0, "", "", "an empty affine tensor, rows of 0"),
    ):
        invalid(15, case, why, make([affine("w", shape, row, 8, "channel", codes, scales)]))
    for case, key, text in (
        ("scale-0", "scale", "0"),
        ("scale-minus-0", "scale", "-0.0"),
        ("scale-negative", "scale", "-0.5"),
        ("scale-large", "scale", "1e+39"),
        ("scale-infinite", "scale", "1e+999"),
        ("scale-small", "scale", "1e-46"),
        ("zero-point-high", "zero_point", "128"),
        ("zero-point-low", "zero_point", "-129"),
    ):
        whole = make(
            [q4(activation={**ACTIVATION, key: "@"})], text=swap(f'"{key}":"@"', f'"{key}":{text}')
        )
        invalid(16, case, f"activation.{key} {text}", whole)


def invalid_segments() -> None:
    codes, scales, zeros = hexa(NIBBLES), hexa("00 00 00 3f"), hexa("05 00*15 01 00*7")
    c, s, z = ("codes", codes), ("scales", scales), ("zero_points", zeros)
    for case, sym, parts, why in (
        ("order", True, [s, c], "scales before codes"),
        ("zero-points-extra", True, [c, s, z], "zero points in a symmetric tensor"),
        ("zero-points-missing", False, [c, s], "an asymmetric tensor without zero points"),
        ("kind", True, [("data", codes), s], "codes called data"),
        ("scales-missing", True, [c], "no scales"),
        ("codes-twice", True, [c, c, s], "codes twice"),
        ("codes-short", True, [("codes", codes[:-1]), s], "codes one byte short"),
        ("codes-long", True, [("codes", codes + b"\0"), s], "codes one byte long"),
        ("scales-long", True, [c, ("scales", scales * 2)], "two scales per tensor"),
        ("zero-points-short", False, [c, s, ("zero_points", b"\x15")], "zero points not packed"),
    ):
        tensor = q4(segments=parts) if sym else q4_asym(segments=parts)
        invalid(17, case, why, make([tensor]))
    for case, tensor, why in (
        (
            "padding-missing",
            affine("w", [2, 3], 3, 4, "channel", "21 03 54 06", "00*8"),
            "rows are not padded to 32 codes",
        ),
        (
            "padding-block-scale",
            affine("w", [16], 16, 4, 16, "00*16", "00*4"),
            "a scale for a block that is all padding",
        ),
        ("raw-short", raw("t", [4], "U8", b"\x01\x02\x03"), "a byte is missing"),
        ("raw-long", raw("t", [3], "U8", b"\x01\x02\x03\x04"), "a byte too many"),
        (
            "raw-kind",
            Tensor("t", [1], "U8", {"dtype": "U8", "kind": "raw"}, [("codes", b"\1")]),
            "data called codes",
        ),
        ("raw-none", Tensor("t", [0], "U8", {"dtype": "U8", "kind": "raw"}, []), "no segment"),
        ("huge", raw("t", [2**48, 31], "U8", b"\1"), "shape of 2^48 x 31 and one byte of data"),
    ):
        invalid(17, case, why, make([tensor]))

    def two() -> list[Tensor]:
        return [small(), raw("u", [4], "U8", b"\x05\x06\x07\x08")]

    for case, places, why in (
        ("first", [64, 128], "the first segment begins at 64"),
        ("hole", [0, 128], "a hole of 64 bytes"),
        ("overlap", [0, 0], "two segments at the same place"),
        ("unaligned", [0, 4], "the second segment is not aligned"),
        ("unaligned-32", [0, 32], "the second segment is aligned to 32 only"),
        ("swapped", [64, 0], "segments in the reverse of the header's order"),
    ):
        tensors = two()
        if case == "overlap":
            tensors[1] = raw("u", [4], "U8", b"\x01\x02\x03\x04")
        invalid(18, case, why, make(tensors, places=places))
    invalid(18, "tail", "64 zeros behind the last segment", make([small()], tail=bytes(64)))
    invalid(18, "tail-none", "a payload without segments", make(tail=bytes(64)))
    invalid(
        18, "outside", "the segment is cut off by the end of the file",
        make([small()], damage=lambda w, st: cut(w, 1)),
    )  # fmt: skip
    invalid(
        18, "offset-far", "an offset of 2^53 - 1",
        make([small()], text=swap('"offset":0', '"offset":9007199254740991')),
    )  # fmt: skip
    invalid(
        18, "offset-negative", "an offset of -64",
        make([small()], text=swap('"offset":0', '"offset":-64')),
    )  # fmt: skip
    invalid(
        18, "file-first", "a companion file before the tensor",
        make([small()], [File("a", b"abc")], places=[64, 0]),
    )  # fmt: skip
    invalid(
        18, "file-size", "a companion file longer than the file",
        make([], [File("a", b"abc")], text=swap('"size":3', '"size":4')),
    )  # fmt: skip
    invalid(19, "after", "the byte behind a segment", make(two(), damage=in_payload(4, 1)))
    invalid(19, "before", "the byte before a segment", make(two(), damage=in_payload(63, 1)))
    invalid(
        19, "before-file", "a byte before a companion file",
        make([small()], [File("a", b"abc")], damage=in_payload(63, 0x20)),
    )  # fmt: skip


def cut(whole: bytearray, count: int) -> None:
    """Drop bytes from the end and make file_length and the digest right again."""
    del whole[-count:]
    whole[24:32] = struct.pack("<Q", len(whole))
    length = struct.unpack_from("<I", whole, 12)[0]
    whole[32:64] = hashlib.sha256(bytes(whole[:32] + whole[64 : 64 + length])).digest()


def invalid_payload() -> None:
    group2, zeros4 = GROUP[2][0], "05 00*15 01 00*7"
    for case, tensor, why in (
        ("f32-inf", q8(scale="00 00 80 7f"), "an infinite F32 scale"),
        ("f32-nan", q8(scale="00 00 c0 7f"), "a NaN scale"),
        (
            "f32-minus-inf",
            affine("w", [32], 32, 4, "tensor", NIBBLES, "00 00 80 ff"),
            "-infinity where a negative scale is allowed",
        ),
        ("f16-inf", affine("w", [32], 32, 4, 32, NIBBLES, "00 7c"), "an infinite F16 scale"),
        ("f16-nan", affine("w", [32], 32, 4, 32, NIBBLES, "01 fe"), "a NaN F16 scale"),
        (
            "bf16-inf",
            affine("w", [32], 32, 4, 32, NIBBLES, "80 7f", scale_dtype="BF16"),
            "an infinite BF16 scale",
        ),
        (
            "bf16-nan",
            affine("w", [32], 32, 4, 32, NIBBLES, "81 7f", scale_dtype="BF16"),
            "a NaN BF16 scale",
        ),
        ("negative-8", q8(scale="00 00 00 bf"), "a negative scale in a symmetric 8-bit tensor"),
        ("minus-0-8", q8(scale="00 00 00 80"), "-0 as scale of a symmetric 8-bit tensor"),
        (
            "negative-asym",
            affine("w", [32], 32, 4, "tensor", NIBBLES, "00 00 00 bf", zeros4),
            "a negative scale in an asymmetric tensor",
        ),
        (
            "minus-0-asym",
            affine("w", [32], 32, 4, 32, NIBBLES, "00 80", zeros4),
            "-0 as scale in an asymmetric tensor",
        ),
        (
            "negative-asym-8",
            affine("w", [1], 1, 8, "tensor", "01", "00 00 00 bf", "00"),
            "a negative scale in an asymmetric 8-bit tensor",
        ),
        (
            "last",
            affine("w", [2, 16], 16, 8, 16, "01*32", "00 3c 00 fc"),
            "only the last of two scales is not finite",
        ),
    ):
        invalid(20, case, why, make([tensor]))
    for bits, zeros, z in (
        (2, "0d 00*15", 13),
        (3, "0d 00*15 01 00*3", 29),
        (4, "0d 00*15 03 00*7", 61),
        (5, "0d 00*15 03 00*7 01 00*3", 125),
        (6, "fd 00*31", 253),
    ):
        tensor = affine("w", [32], 32, bits, "tensor", GROUP[bits][0], "00 00 00 3f", zeros)
        invalid(21, f"q{bits}", f"zero point {z} at {bits} bits", make([tensor]))
    tensor = affine("w", [2, 1], 1, 2, "channel", "00*16", "00*8", "00 0f 00*14")
    invalid(21, "second", "the second of two zero points is 15 at 2 bits", make([tensor]))
    invalid(22, "tensor", "code -128, one scale", make([q8("01 80 03 04")]))
    tensor = affine("w", [17], 17, 8, 16, "01*16 80 00*15", "00 3c 00 3c")
    invalid(22, "block", "code -128 in the last block", make([tensor]))
    for case, tensor, why in (
        (
            "row",
            affine("w", [2, 3], 3, 4, "channel", "01 0e 0f 01 00*12 08 00 09 00*13", "00*8"),
            "code 3 of a row of 3 is not 0",
        ),
        (
            "row-last",
            affine("w", [2, 3], 3, 4, "channel", "01 0e 0f 00*13 08 00 09 00*12 80", "00*8"),
            "the last padding code of the last row is not 0",
        ),
        (
            "row-centre",
            affine("w", [2], 2, 2, "tensor", "ab aa aa*6", "00*4"),
            "padding holds the code that stands for 0 instead of code 0",
        ),
        (
            "half-group",
            affine("w", [16], 16, 4, 16, "88*15 18", "00 3c"),
            "a block that is all padding is not 0",
        ),
        (
            "block-8",
            affine("w", [17], 17, 8, 16, "01*16 02 00*14 01", "00 3c 00 3c"),
            "8-bit padding is not 0",
        ),
        (
            "block-8-asym",
            affine("w", [1], 1, 8, 16, "80 80*15", "00 00", "80"),
            "8-bit padding is -128, as the codes",
        ),
        (
            "high-plane",
            affine("w", [1], 1, 3, "tensor", "00*8 00 00 00 80", "00*4"),
            "bit 2 of the last padding code",
        ),
        (
            "zero-points",
            affine("w", [32], 32, 2, "tensor", group2, "00 00 00 3f", "06 06 00*14"),
            "the second value of the zero points is unused and not 0",
        ),
        (
            "zero-points-last",
            affine("w", [32], 32, 4, "tensor", NIBBLES, "00 00 00 3f", "05 00*15 01 00*6 40"),
            "the last value of the zero points is unused and not 0",
        ),
        (
            "zero-points-8",
            affine("w", [1], 1, 6, "tensor", "00*24", "00*4", "00*31 01"),
            "the last of 32 zero points of 8 bits is unused and not 0",
        ),
    ):
        invalid(23, case, why, make([tensor]))
    damages = (
        ("data", small(), 0, "a bit of the data is flipped"),
        ("codes", q4_asym(), 0, "a bit of the codes is flipped"),
        ("scales", q4_asym(), 64, "a bit of the scale is flipped"),
        ("zero-points", q4_asym(), 128, "a bit of the zero point is flipped"),
    )
    for case, tensor, at, why in damages:
        whole = make(
            [tensor],
            damage=lambda w, st, at=at: flip(w, st + at),  # type: ignore[misc]
        )
        invalid(24, case, why, whole)
    zero = {"sha256": "0" * 64}
    invalid(24, "digest", "sha256 is 64 zeros", make([q4(**zero)]))
    plain = {"sha256": sha(hexa(NIBBLES) + hexa("00 00 00 3f"))}
    invalid(24, "bytes-only", "sha256 of the segments' bytes alone", make([q4(**plain)]))
    for case, old, new in (
        ("name", '"name":"t"', '"name":"u"'),
        ("shape", '"shape":[4]', '"shape":[2,2]'),
        ("dtype", '"U8"', '"I8"'),
    ):
        text = (lambda b: b.replace(b'"U8"', b'"I8"')) if case == "dtype" else swap(old, new)
        invalid(24, case, f"{case} changed behind the digest", make([small()], text=text))
    for case, name, why in (
        ("slash", "a/b", "a slash"),
        ("backslash", "a\\b", "a backslash"),
        ("colon", "c:", "a colon"),
        ("control", "a\x1fb", "U+001F"),
        ("nul", "a\0b", "U+0000"),
        ("dot", ".", "the name ."),
        ("dots", "..", "the name .."),
        ("empty", "", "an empty name"),
        ("long", "n" * 256, "256 bytes"),
        ("long-utf-8", "é" * 128, "128 characters, 256 bytes"),
    ):
        invalid(25, case, f"name of a companion file: {why}", make([], [File(name, b"a")]))
    twice = [File("a", b"a"), File("a", b"b")]
    invalid(25, "twice", "two companion files of one name", make([], twice))
    invalid(25, "kind", "a segment of kind codes", make([], [File("a", b"a", "codes")]))
    wrong = File("a", b"abc")
    invalid(26, "data", "a bit is flipped", make([], [wrong], damage=lambda w, st: flip(w, st)))
    wrong = File("a", b"abc", sha256="0" * 64)
    invalid(26, "digest", "sha256 is 64 zeros", make([], [wrong]))


# ---------------------------------------------------------------- writing

README = """# Test vectors of the `.qblk` container

Made by `python regenerate.py` (standard library, no reader and no writer involved);
`python regenerate.py --check` compares. A reader is tested with this protocol:

    READER FILE [--values]

| | exit | stdout |
|---|---|---|
| valid file | 0 | one JSON object, below |
| refused file | 1 | `{"rule":"QBLK-nnn","message":...,"tensor": name or null}`, on stderr as well |
| unreadable, wrong usage | 2 | |

The object is
`{"format":"qblk","version":[1,minor],"metadata":{...},"tensors":[...],"files":[...]}`, each tensor
`{"name","shape","source_dtype","encoding","values_sha256"}`, with `--values` also `"values_hex"`,
each file `{"name","size","sha256"}`. Values are the stored bytes of a raw tensor, and the decoded
values of an affine one as binary32, little-endian, row-major. `encoding` has just the keys of
SPEC.md section 3.2.

For each `valid/X.qblk` the output with `--values` is `valid/X.json` (compare as JSON). For each
`invalid/X.qblk`, `invalid.json` names the rule that it breaks. Every other digest is right and
every other rule holds, but for consequences that no file can avoid
(a misplaced payload_offset also moves
the payload). Only `QBLK-010-many-files` is larger than 4 KiB.

"""


def write_readme() -> None:
    text = README + "## valid\n\n| file | what |\n|---|---|\n"
    text += "".join(f"| {name} | {why} |\n" for name, why in VALID)
    text += "\n## invalid\n\n| file | what |\n|---|---|\n"
    text += "".join(f"| {name[:-5]} | {case['why']} |\n" for name, case in INVALID.items())
    FILES["README.md"] = text.encode()


def main() -> int:
    valid_files()
    valid_codebooks()
    valid_levels()
    invalid_preamble()
    invalid_header()
    invalid_tensors()
    invalid_segments()
    invalid_payload()
    invalid_codebooks()
    invalid_levels()
    listing = json.dumps(INVALID, indent=1, ensure_ascii=False)
    FILES["invalid.json"] = listing.encode() + b"\n"
    write_readme()
    there = {
        path.relative_to(HERE).as_posix()
        for folder in ("valid", "invalid")
        for path in (HERE / folder).glob("*")
    }
    extra = sorted(there - set(FILES))
    if "--check" in sys.argv[1:]:
        wrong = [
            name
            for name, data in FILES.items()
            if not (HERE / name).is_file() or (HERE / name).read_bytes() != data
        ]
        for name in wrong + extra:
            print(f"differs, missing or extra: {name}")
        return 1 if wrong or extra else 0
    for name in extra:
        (HERE / name).unlink()
    for name, data in FILES.items():
        (HERE / name).parent.mkdir(exist_ok=True)
        (HERE / name).write_bytes(data)
    print(f"{len(VALID)} valid and {len(INVALID)} invalid files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
